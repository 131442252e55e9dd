"""Lifelines: connections from process 0 to the others, whose end tells of a death at once.

JAX notices a killed process by its missing heartbeats, after more than a minute, and collectives of
CPUs wait for it as long. The system closes a dead process's connections within milliseconds. Where
they cannot be made (a firewall), the heartbeats remain.
"""

import secrets
import socket
from collections.abc import Callable

_GOODBYE = b"."
_TOKEN = 16  # bytes


class Lifelines:
    """The ends of the connections that one process holds.

    Args:
        index: this process's number; 0 listens, the others connect.
        count: number of processes.
        host: of process 0.
        publish: called by process 0 with where it listens, a text for the others alone.
        find: called by the others; returns that text.
    """

    def __init__(
        self,
        index: int,
        count: int,
        host: str,
        publish: Callable[[str], None],
        find: Callable[[], str],
    ):
        self.count = count
        self.server: socket.socket | None = None
        self.lines: dict[int, socket.socket] = {}
        if index == 0:
            self.server = socket.create_server(("", 0))
            self.server.setblocking(False)
            # Who does not know the token is a stranger, whose coming and going means nothing.
            self.token = secrets.token_bytes(_TOKEN)
            publish(f"{self.server.getsockname()[1]} {self.token.hex()}")
            return
        port, token = find().split()
        try:
            line = socket.create_connection((host, int(port)), timeout=10)
            line.sendall(bytes.fromhex(token) + index.to_bytes(4, "big"))
        except OSError:
            return
        self._keep(0, line)

    def _keep(self, index: int, line: socket.socket) -> None:
        """Holds a connection; keepalive finds a machine that vanished without closing it."""
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        line.setblocking(False)
        self.lines[index] = line

    def lost(self) -> list[int]:
        """The processes whose connection ended without a goodbye since the last call."""
        self._accept()
        gone = []
        for index, line in list(self.lines.items()):
            try:
                heard = line.recv(64)
            except BlockingIOError:
                continue
            except OSError:
                heard = b""
            if heard.endswith(_GOODBYE) or not heard:
                line.close()
                del self.lines[index]
            if not heard:
                gone.append(index)
        return gone

    def _accept(self) -> None:
        while self.server is not None:
            try:
                line, _ = self.server.accept()
            except BlockingIOError:
                return
            line.settimeout(1)
            try:
                said = line.recv(_TOKEN + 4, socket.MSG_WAITALL)
            except OSError:
                said = b""
            index = int.from_bytes(said[_TOKEN:], "big")
            known = secrets.compare_digest(said[:_TOKEN], self.token)
            if known and 0 < index < self.count and index not in self.lines:
                self._keep(index, line)
            else:
                line.close()

    def say_goodbye(self) -> None:
        """Tells the others that this process ends as it should."""
        for line in self.lines.values():
            try:
                line.sendall(_GOODBYE)
                line.close()
            except OSError:
                pass  # it is gone itself
        self.lines.clear()
