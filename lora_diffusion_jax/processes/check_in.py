"""Waits until all processes have called process 0, and names those who have not.

JAX itself waits for all to connect, and aborts without naming anyone. So they first meet here, at
the coordinator's address. A call is a line `lora_diffusion_jax INDEX COUNT SHA256_OF_TOKEN WHO`; the
answer, when all have called or time is up, is `ok` or `error MESSAGE`. Callers that send anything
else, nothing, or another token are dropped; they neither end nor delay the start. The token is that of
the environment, else a random one that process 0 keeps for others of its user in a folder that the
processes share, while they meet.
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

from lora_diffusion_jax import files
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.processes.ending import WHO
from lora_diffusion_jax.untrusted import read_file

TOKEN = "LORA_DIFFUSION_TOKEN"  # environment variable: a secret shared by the processes of a job
TOKEN_FILE = ".token"  # in the shared folder, readable by its owner alone
_MAX_LINE = 10_000  # bytes
_LINE_SECONDS = 10.0  # for a caller to send its line
_CALL = re.compile(
    r"lora_diffusion_jax (\d{1,6}) (\d{1,6}) ([0-9a-f]{64}) ([ -~]{1,300})\n", re.ASCII
)


def _token(folder: Path | None = None) -> str:
    """The SHA-256 of the token as this process sees it now, that of "" without one."""
    text = os.environ.get(TOKEN, "").encode()
    if not text and folder is not None:
        with contextlib.suppress(UserError):  # not there, or another user's
            text = read_file(folder / TOKEN_FILE, 1000)
    return hashlib.sha256(text).hexdigest()


@contextlib.contextmanager
def _offered_token(folder: Path | None, host: str) -> Iterator[str]:
    """The token of process 0; without one in the environment, a new one lies in the folder meanwhile."""
    made: list[Path] = []
    if folder is not None and not os.environ.get(TOKEN):
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        with contextlib.suppress(OSError):  # it may be read-only
            folder.mkdir(parents=True, exist_ok=True)
            with files.atomic(folder / TOKEN_FILE, sync=False) as temporary:
                temporary.chmod(0o600)
                temporary.write_text(secrets.token_hex())
    token = _token(folder)
    if (
        token == _token()
        and not os.environ.get(TOKEN)
        and not ipaddress.ip_address(host).is_loopback
    ):
        print(
            f"warning: whoever reaches {host} can take the place of a process; set the same secret {TOKEN} "
            "in the environment of all processes.",
            file=sys.stderr,
            flush=True,
        )
    try:
        yield token
    finally:
        with contextlib.suppress(OSError):
            if folder is not None:
                (folder / TOKEN_FILE).unlink(missing_ok=True)
            for path in made:  # the run creates its own
                path.rmdir()


class _Callers:
    """The processes that have called, with process 0, which answers all of them at once."""

    def __init__(self, count: int, token: str):
        self.count, self.token = count, token
        self.names = {0: WHO}
        self.complete = asyncio.Event()
        self.answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def __str__(self) -> str:
        return "; ".join(f"{i} ({who})" for i, who in sorted(self.names.items()))[:1000]

    async def receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handles one connection."""
        try:
            async with asyncio.timeout(_LINE_SECONDS):
                call = _CALL.fullmatch((await reader.readline()).decode())
            if call and hmac.compare_digest(call[3], self.token):
                answer = await self.wait(int(call[1]), int(call[2]), call[4], reader)
                writer.write(f"{answer}\n".encode())
        except (OSError, ValueError, asyncio.CancelledError):  # gone, slow, or not a line of text
            pass
        finally:
            writer.close()

    async def wait(self, index: int, count: int, who: str, reader: asyncio.StreamReader) -> str:
        """The answer to a caller, when all have called."""
        if count != self.count or index >= count or index in self.names:
            problem = (
                f"{who} has --process_id={index} and --num_processes={count}; expected a free number of "
                f"{self.count}. Present: {self}."
            )
            print(f"warning: refused a process: {problem}", file=sys.stderr, flush=True)
            return f"error {problem}"
        self.names[index] = who
        if len(self.names) == count:
            self.complete.set()
        hung_up: asyncio.Future = asyncio.ensure_future(reader.read(1))
        await asyncio.wait([hung_up, self.answer], return_when=asyncio.FIRST_COMPLETED)
        if hung_up.done():  # the same process may be started again
            del self.names[index]
        return await self.answer


async def lead(host: str, port: int, count: int, limit: float, folder: Path | None = None) -> None:
    """Process 0: listens until all have called.

    Args:
        host: the IP address of the interface.
        port: where it listens.
        count: number of processes.
        limit: seconds.
        folder: that all processes share, if there is one, for the token.

    Raises:
        UserError: some have not called within `limit` seconds, or the address cannot be used.
    """
    with _offered_token(folder, host) as token:
        await _lead(host, port, limit, _Callers(count, token))


async def _lead(host: str, port: int, limit: float, callers: _Callers) -> None:
    count = callers.count
    try:
        server = await asyncio.start_server(callers.receive, host, port, limit=_MAX_LINE)
    except OSError as error:
        raise UserError(
            f"Process 0 cannot listen at {host}:{port}: {error.strerror or error}. Choose another port, or "
            "stop the program that uses it. If the address belongs to another machine (NAT), set "
            "JAX_COORDINATOR_BIND_ADDRESS to HOST:PORT of this one."
        ) from error
    problem = ""
    try:
        await asyncio.wait_for(callers.complete.wait(), limit)
    except TimeoutError:
        missing = ", ".join(str(i) for i in range(count) if i not in callers.names)
        problem = (
            f"After {limit:.0f} s, process {missing} of {count} had not called at {host}:{port}. Present: "
            f"{callers}. Start the others with the same command and their own --process_id, and check "
            f"that they can reach this address and have the same {TOKEN}."
        )
    server.close()
    callers.answer.set_result(f"error {problem}" if problem else "ok")
    await asyncio.sleep(0.1)  # until the answers are sent
    if problem:
        raise UserError(problem)


async def call(
    host: str, port: int, count: int, index: int, limit: float, folder: Path | None = None
) -> None:
    """Another process: calls process 0 until it answers; see `lead`.

    Raises:
        UserError: process 0 names others that are missing, refuses this process, or does not answer
            within `limit` seconds.
    """
    reason: object = ""
    try:
        async with asyncio.timeout(limit + 2):  # process 0 gives up first, and names the missing
            while True:
                answer = ""
                try:
                    reader, writer = await asyncio.open_connection(host, port, limit=_MAX_LINE)
                    reason = "it is still waiting for others"
                    # A file system may show a token late.
                    line = (
                        f"lora_diffusion_jax {index} {count} {_token(folder)} {ascii(WHO)[1:-1]}\n"
                    )
                    writer.write(line.encode())
                    answer = (await reader.readline()).decode("ascii", "replace")
                    writer.close()
                    reason = f"it hung up; is {TOKEN} the same?"
                except (OSError, ValueError) as error:  # process 0 is not there yet
                    reason = error
                if answer == "ok\n":
                    return
                if answer.startswith("error "):
                    raise UserError("".join(filter(str.isprintable, answer[6:])))
                await asyncio.sleep(0.5)
    except TimeoutError:
        raise UserError(
            f"Process {index} got no answer from process 0 at {host}:{port} within {limit:.0f} s "
            f"({reason}). Check that process 0 was started, that the address is its own, and that no "
            "firewall closes the port."
        ) from None
