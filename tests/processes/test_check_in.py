"""Processes meet before JAX starts: who is missing is named, and strangers change nothing."""

import asyncio
import contextlib
import re
import socket
import threading
import time

import pytest

from lora_diffusion_jax import processes
from lora_diffusion_jax.errors import UserError
from lora_diffusion_jax.processes import check_in

HOST = "127.0.0.1"
LIMIT = 20.0
OF_NO_TOKEN = check_in._token()


def free_port():
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return listener.getsockname()[1]


class Meeting:
    """Processes of a job that check in, in threads; afterwards `errors` has the error of each or ''."""

    def __init__(self, *calls, port=None, limit=LIMIT, folder=None):
        self.folder = folder
        self.port = port or free_port()
        self.errors = [""] * len(calls)
        arguments = [(place, limit, *call) for place, call in enumerate(calls)]
        self.threads = [threading.Thread(target=self._call, args=given) for given in arguments]
        for thread in self.threads:
            thread.start()

    def _call(self, place, limit, count, index):
        try:
            if index == 0:
                asyncio.run(check_in.lead(HOST, self.port, count, limit, self.folder))
            else:
                asyncio.run(check_in.call(HOST, self.port, count, index, limit, self.folder))
        except UserError as error:
            self.errors[place] = str(error)

    def end(self):
        for thread in self.threads:
            thread.join(LIMIT + 10)
            assert not thread.is_alive()
        return self.errors

    def connect(self):
        """A stranger's connection to process 0, once that listens."""
        for _ in range(500):
            with contextlib.suppress(ConnectionRefusedError):
                return socket.create_connection((HOST, self.port), timeout=5)
            time.sleep(0.02)
        raise AssertionError("process 0 does not listen")


def test_all_that_call_go_on_and_the_port_is_free():
    port = free_port()
    for _ in range(2):
        assert Meeting((4, 0), (4, 3), (4, 1), (4, 2), port=port).end() == [""] * 4


def test_the_missing_are_named_to_all():
    errors = Meeting((5, 0), (5, 2), (5, 4), limit=1.5).end()
    assert errors[0] == errors[1] == errors[2]
    assert re.search(r"process 1, 3 of 5 had not called at .*Present: 0 \(.*; 2 \(", errors[0])
    (alone,) = Meeting((2, 1), limit=0.1).end()
    assert "got no answer from process 0" in alone


@pytest.mark.parametrize(("count", "index"), [(3, 1), (2, 5)])
def test_a_process_of_another_job_is_refused_and_the_others_go_on(count, index):
    job = Meeting((2, 0))
    (refused,) = Meeting((count, index), port=job.port).end()
    assert (
        f"--process_id={index} and --num_processes={count}; expected a free number of 2" in refused
    )
    assert Meeting((2, 1), port=job.port).end() == job.end() == [""]


def test_one_number_given_twice():
    leader, *others = Meeting((3, 0), (3, 1), (3, 1), limit=1.5).end()
    refused, waiting = sorted(others, key=lambda error: "had not called" in error)
    assert re.search("--process_id=1 .* expected a free number of 3. Present: 0 .*; 1 ", refused)
    assert leader == waiting
    assert "process 2 of 3 had not called" in leader


LINES = [
    b"",
    b"\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"\xff\xfe\x00\n",
    b"[" * 9000 + b"\n",
    b"x" * 100_000 + b"\n",
    b'{"index": 1e999, "count": 2}\n',
    f"lora_diffusion_jax 1e999 2 {OF_NO_TOKEN} me\n".encode(),
    f"lora_diffusion_jax -1 2 {OF_NO_TOKEN} me\n".encode(),
    f"lora_diffusion_jax 99 2 {OF_NO_TOKEN} me\n".encode(),
    f"lora_diffusion_jax 0 2 {OF_NO_TOKEN} me\n".encode(),
    f"lora_diffusion_jax 1 99 {OF_NO_TOKEN} me\n".encode(),
    f"lora_diffusion_jax 1 2 {OF_NO_TOKEN} \x1b[2J\n".encode(),
    f"lora_diffusion_jax 1 2 {OF_NO_TOKEN[::-1]} me\n".encode(),
    f"lora_diffusion_jax 1 2 {OF_NO_TOKEN} it hangs up\n".encode(),
]


def test_strangers_neither_end_nor_delay_nor_take_over_the_start():
    job = Meeting((3, 0))
    with job.connect(), job.connect() as slow:
        for line in LINES:
            with job.connect() as stranger, contextlib.suppress(ConnectionError):
                stranger.sendall(line)
        slow.sendall(b"lora_diffusion")
        time.sleep(0.2)
        with pytest.raises(ConnectionRefusedError):  # it listens on this interface alone
            socket.create_connection(("127.0.0.2", job.port))
        assert job.threads[0].is_alive()
        assert Meeting((3, 1), (3, 2), port=job.port).end() == ["", ""]
        assert job.end() == [""]


def test_silent_callers_are_dropped(monkeypatch):
    monkeypatch.setattr(check_in, "_LINE_SECONDS", 0.1)
    job = Meeting((2, 0), limit=1.0)
    with job.connect() as silent:
        assert silent.recv(1) == b""
    job.end()


def test_an_impostor_cannot_hold_a_process_beyond_its_limit():
    with socket.create_server((HOST, port := free_port())) as impostor:
        began, job = time.monotonic(), Meeting((2, 1), port=port, limit=0.1)
        connection, _ = impostor.accept()
        with connection, contextlib.suppress(ConnectionError):
            while job.threads[0].is_alive() and time.monotonic() - began < 10:
                connection.sendall(b"e")
                time.sleep(0.05)
    assert time.monotonic() - began < 8


def test_a_caller_without_the_token_is_dropped(monkeypatch):
    monkeypatch.setenv(check_in.TOKEN, "a secret")
    job = Meeting((2, 0))
    with job.connect() as stranger:
        stranger.sendall(f"lora_diffusion_jax 1 2 {OF_NO_TOKEN} me\n".encode())
        assert stranger.recv(1) == b""
    assert Meeting((2, 1), port=job.port).end() == job.end() == [""]


def test_without_a_token_a_file_in_the_workdir_keeps_strangers_out(tmp_path):
    """One that calls first does not take a process's place; nothing is left behind."""
    folder = tmp_path / "new" / "workdir"
    job = Meeting((2, 0), folder=folder)
    with job.connect() as stranger:
        stranger.sendall(f"lora_diffusion_jax 1 2 {OF_NO_TOKEN} stranger\n".encode())
        assert stranger.recv(1) == b""
    assert (folder / check_in.TOKEN_FILE).stat().st_mode & 0o777 == 0o600
    assert Meeting((2, 1), port=job.port, folder=folder).end() == job.end() == [""]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "10.0.0.1"])
def test_an_address_that_others_reach_without_any_token_is_one_warning(host, tmp_path, capsys):
    (tmp_path / "file").touch()  # so that the folder cannot be made
    with check_in._offered_token(tmp_path / "file" / "workdir", host) as token:
        assert token == OF_NO_TOKEN
    expected = f"whoever reaches {host} .* set the same secret {check_in.TOKEN}"
    found = re.findall(expected, capsys.readouterr().err)
    assert len(found) == (host == "10.0.0.1")


def test_process_0_needs_its_address():
    with socket.create_server((HOST, port := free_port())):
        (error,) = Meeting((2, 0), port=port, limit=1.0).end()
    assert f"cannot listen at {HOST}:{port}" in error


def test_flags_that_do_not_suffice(monkeypatch):
    with pytest.raises(UserError, match="Missing --num_processes and --process_id"):
        processes.join("127.0.0.1:1")
    with pytest.raises(UserError, match="--heartbeat_timeout=0"):
        processes.join("127.0.0.1:1", 2, 1, heartbeat_timeout_seconds=0)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES=two"):
        processes.join()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match="Invalid --process_id=2; expected 0 to 1"):
        processes.join()
    with pytest.raises(UserError, match="'nowhere' of process 0; expected HOST:PORT"):
        processes.join("nowhere", 2, 1)
