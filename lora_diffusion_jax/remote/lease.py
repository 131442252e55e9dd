"""A lease on a run in an object store, where files cannot be locked.

The lease number n is the object `.lease/n`: who holds it, and until when, which its holder moves on while it
lives. The highest number counts. A run may be taken over when its lease has expired, was given back, or is of
a process of this machine that has ended: by creating number n+1, which GCS and S3 grant to one of several
processes. Because not every store does, who created it looks after a moment whether it is still his own.
"""

import contextlib
import datetime
import json
import os
import re
import secrets
import threading
import time
from pathlib import Path
from typing import Any

from lora_diffusion_jax import files
from lora_diffusion_jax.errors import UserError, printable
from lora_diffusion_jax.remote import mirror

FOLDER = ".lease"
SECONDS = 60.0  # that a lease lasts unless it is renewed
SETTLE = 1.0  # seconds after which a store without exclusive writing shows who was last
_NUMBER = re.compile("[0-9]{6}")


class Lease:
    """The right to write to a run, until it is released or its process dies.

    Used as a context manager, like `files.Lock`.

    Args:
        run: the run's folder in the mirror.
        taken: the error's message when another process holds it; `{holder}` in it is replaced by what that
            process wrote, and until when its lease lasts.
        holder: what to write for others to read.
        seconds: how long it lasts without being renewed; it is renewed three times as often.

    Raises:
        TakenError: another process holds it.
        UserError: the store cannot be used.
    """

    def __init__(self, run: Path, taken: str, holder: str, *, seconds: float = SECONDS):
        self.run, self.taken, self.holder, self.seconds = run, taken, holder, seconds
        self.token, self.lost = secrets.token_hex(16), ""
        self._busy = threading.Lock()  # writing to the object
        self._ended = threading.Event()
        self.number = self._acquire()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")
        self._thread.start()
        mirror.set_fence(run, self.check)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the lease back; others may take it at once."""
        self._ended.set()
        self._thread.join()
        mirror.set_fence(self.run, None)
        # What cannot be given back expires.
        with contextlib.suppress(UserError), self._busy:
            if not self.lost and self._is_mine():
                self._write(self.number, until=0.0)

    def check(self) -> None:
        """Raises UserError if another process may have taken the run over."""
        if not self.lost and time.monotonic() - self.renewed > self.seconds / 2:
            self._renew()  # after a pause of this process, or of the network
        if self.lost:
            raise UserError(
                f"{mirror.url_of(self.run)} was taken over by {self.lost} while this process could not renew "
                "its lease; it stopped without writing more. Nothing is lost: the other run goes on from "
                "the last checkpoint."
            )

    def _acquire(self) -> int:
        numbers = self._numbers()
        number = numbers[-1] + 1 if numbers else 1
        if numbers and not _is_free(found := self._read(numbers[-1])):
            raise self._error(found)
        try:
            self._write(number, create=True)
        except FileExistsError:
            raise self._error(self._read(number)) from None
        time.sleep(SETTLE)
        latest = self._numbers()[-1:] or [number]
        now = self._read(latest[0])
        if now.get("token") != self.token:
            raise self._error(now)
        mirror.remove(self.run, [f"{FOLDER}/{old:06d}" for old in numbers])
        return number

    def _error(self, found: dict[str, Any]) -> files.TakenError:
        until = datetime.datetime.fromtimestamp(found.get("until", 0)).astimezone()
        text = f"{printable(found.get('holder', 'unknown'), 200)}; its lease lasts until {until:%H:%M:%S}"
        return files.TakenError(self.taken.replace("{holder}", text))

    def _numbers(self) -> list[int]:
        names = mirror.listing(self.run / FOLDER)
        return sorted(int(name) for name in names if _NUMBER.fullmatch(name))

    def _read(self, number: int) -> dict[str, Any]:
        """A lease as the store has it; {} if it is gone."""
        path = self.run / FOLDER / f"{number:06d}"
        system, name = mirror._open(path)
        with mirror.store_errors(path):
            try:
                data = system.cat_file(name)
            except FileNotFoundError:
                return {}
        try:
            found = json.loads(data)
            if not (type(found["until"]) in (int, float) and 0 <= found["until"] < 1e11):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{mirror.url_of(path)} is damaged, so that it cannot be known whether the run is in use. "
                "Remove it if no process trains there."
            ) from None
        return found

    def _write(self, number: int, *, until: float | None = None, create: bool = False) -> None:
        now = time.time() + self.seconds if until is None else until
        record = {"holder": self.holder, "until": round(now, 1), "token": self.token}
        data = json.dumps(record | {"process": this_process()}).encode()
        path = self.run / FOLDER / f"{number:06d}"
        system, name = mirror._open(path)
        began = time.monotonic()
        with mirror.store_errors(path):
            system.pipe_file(name, data, mode="create" if create else "overwrite")
        self.renewed = began

    def _is_mine(self) -> bool:
        """Whether this lease is still the highest and its own; else notes who has the run."""
        latest = self._numbers()[-1:] or [self.number]
        found = self._read(latest[0])
        if found.get("token") == self.token:
            return True
        self.lost = str(found.get("holder", "another process"))
        return False

    def _renew(self) -> None:
        with self._busy:
            if self._is_mine():
                self._write(self.number)

    def _keep(self) -> None:
        while not self._ended.wait(self.seconds / 3) and not self.lost:
            if not mirror.is_mirrored(self.run):  # closed
                return
            with contextlib.suppress(UserError):  # the network may come back; `check` tries again
                self._renew()


def _is_free(found: dict[str, Any]) -> bool:
    """Whether a lease has expired, or its process was one of this machine and has ended."""
    if not found or found["until"] < time.time():
        return True
    there, here = found.get("process"), this_process()
    if not isinstance(there, dict) or any(there.get(k) != here[k] for k in ("boot", "namespace")):
        return False
    pid = there.get("pid")
    return type(pid) is int and there.get("started") != _started(pid)


def this_process() -> dict[str, Any]:
    """What identifies this process among all that ran since the machine was started, or in containers."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    pid = os.getpid()
    return {
        "boot": boot.read_text().strip() if boot.exists() else secrets.token_hex(16),
        "namespace": namespace,
        "pid": pid,
        "started": _started(pid),
    }


def _started(pid: int) -> str:
    """When a process of this machine was started, in the kernel's ticks; '' if it has ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if status[0] == "Z" else status[19]  # a zombie does nothing more
