"""The roll call: processes find one another before JAX joins them, or learn who is missing.

JAX ends a process from inside, without a word about who was missing, when the others do not come in
time. So they first meet here, on the same address and port, which is free again when JAX takes it.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from lora_diffusion_jax.errors import UserError

_RETRY_SECONDS = 0.5
_LONGEST_LINE = 65_536


def answer(
    address: str, count: int, index: int, limit: float, facts: Mapping[str, str] | None = None
) -> None:
    """Returns, in every process at about the same time, when all of them have called.

    Args:
        address: HOST:PORT of process 0, which listens there on every interface.
        count: number of processes, >= 2.
        index: this one's, 0 to count - 1.
        limit: seconds to wait for the others.
        facts: what must be the same everywhere (versions), by name.

    Raises:
        UserError: some did not call in time (it names them), one number was given twice, counts or
            facts differ, or the address cannot be used. All that called get the same message.
    """
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"The coordinator's address is {address!r}; give HOST:PORT of process 0.")
    if not 0 <= index < count:
        raise UserError(f"process_id is {index}; with {count} processes it is 0 to {count - 1}.")
    me = {
        "index": index,
        "count": count,
        "who": f"{socket.gethostname()}, process {os.getpid()}",
        "facts": dict(facts or {}),
    }
    deadline = time.monotonic() + limit
    if index == 0:
        _lead(address, int(port), me, deadline, limit)
    else:
        _follow(address, (host.strip("[]"), int(port)), me, deadline, limit)


def _lead(address: str, port: int, me: dict[str, Any], deadline: float, limit: float) -> None:
    """Process 0: hears the others, and tells them to go on or why not."""
    callers: dict[int, tuple[dict[str, Any], socket.socket]] = {}
    try:
        with _listen(port, address) as server:
            while len(callers) < me["count"] - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    raise UserError(_missing(address, me, callers, limit)) from None
                caller = _hear(connection)
                if caller is None:  # not one of us, or gone already
                    connection.close()
                    continue
                problem = _conflict(me, caller, callers)
                if problem is not None:
                    callers[-1] = caller, connection
                    raise UserError(problem)
                callers[caller["index"]] = caller, connection
        _tell(callers, {"go": True})
    except UserError as error:
        _tell(callers, {"error": str(error)})
        raise


def _listen(port: int, address: str) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        )
    except OSError as error:
        raise UserError(
            f"Process 0 cannot listen at {address}: {error.strerror or error}. Choose another port, "
            "or end the program that holds it (perhaps an earlier run)."
        ) from error


def _hear(connection: socket.socket) -> dict[str, Any] | None:
    connection.settimeout(10)
    try:
        caller = json.loads(connection.makefile().readline(_LONGEST_LINE))
        int(caller["index"]), int(caller["count"]), str(caller["who"]), dict(caller["facts"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return caller


def _conflict(
    me: dict[str, Any],
    caller: dict[str, Any],
    callers: Mapping[int, tuple[dict[str, Any], socket.socket]],
) -> str | None:
    """Why this caller cannot take part, or None."""
    if caller["count"] != me["count"]:
        return (
            f"Process {caller['index']} ({caller['who']}) was started as one of {caller['count']} "
            f"processes, process 0 ({me['who']}) as one of {me['count']}; give all the same "
            "--num_processes."
        )
    for name, mine in me["facts"].items():
        theirs = caller["facts"].get(name)
        if theirs != mine:
            return (
                f"{name} is {theirs} in process {caller['index']} ({caller['who']}) and {mine} in "
                f"process 0 ({me['who']}); it must be the same everywhere."
            )
    known = {0: me} | {index: other for index, (other, _) in callers.items()}
    twin = known.get(caller["index"])
    if twin is not None and not _has_hung_up(callers.get(caller["index"])):
        return (
            f"process_id {caller['index']} was given twice: to {twin['who']} and to "
            f"{caller['who']}. Give every process its own, and end those of an earlier start."
        )
    return None


def _has_hung_up(call: tuple[dict[str, Any], socket.socket] | None) -> bool:
    if call is None:
        return False
    call[1].setblocking(False)
    try:
        return call[1].recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _missing(
    address: str,
    me: dict[str, Any],
    callers: Mapping[int, tuple[dict[str, Any], socket.socket]],
    limit: float,
) -> str:
    absent = [i for i in range(1, me["count"]) if i not in callers]
    here = "; ".join(
        f"{i} ({other['who']})"
        for i, other in sorted({0: me, **{i: c for i, (c, _) in callers.items()}}.items())
    )
    return (
        f"After {limit:.0f} s, {len(absent)} of {me['count']} processes had not called at {address}: "
        f"number {', '.join(map(str, absent))}. Here: {here}. Start them with the same command and "
        "their own --process_id, and see that they reach this address."
    )


def _tell(
    callers: Mapping[int, tuple[dict[str, Any], socket.socket]], message: dict[str, Any]
) -> None:
    """Sends all the same and waits until they hang up, so that the port is free afterwards."""
    for _, connection in callers.values():
        try:
            connection.settimeout(5)
            connection.sendall(json.dumps(message).encode() + b"\n")
            connection.recv(1)
        except OSError:
            pass  # it is gone: whoever waits for it later will say so
        finally:
            connection.close()


def _follow(
    address: str, place: tuple[str, int], me: dict[str, Any], deadline: float, limit: float
) -> None:
    """The others: call process 0 until it answers."""
    reason: object = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(place, timeout=left) as connection:
                connection.sendall(json.dumps(me).encode() + b"\n")
                connection.settimeout(left + 5)  # process 0 gives up first, and says who is missing
                message = json.loads(connection.makefile().readline(_LONGEST_LINE))
        except (OSError, ValueError) as error:  # not there yet, or gone before it answered
            reason = error
            time.sleep(_RETRY_SECONDS)
            continue
        if "error" in message:
            raise UserError(message["error"])
        return
    raise UserError(
        f"Process {me['index']} ({me['who']}) could not reach process 0 at {address} within "
        f"{limit:.0f} s ({reason}). See that it was started, that the address is its own, and that no "
        "firewall closes the port."
    )
