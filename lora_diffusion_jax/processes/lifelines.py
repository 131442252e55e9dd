"""Lifelines: connections from process 0 to the others, whose end tells of a death at once.

JAX notices a killed process by its missing heartbeats, after more than a minute, and collectives of
CPUs wait for it as long. The system closes a dead process's connections within milliseconds. Where
they cannot be made (a firewall), the heartbeats remain.
"""

import socket
from collections.abc import Callable

_GOODBYE = b"."


class Lifelines:
    """The ends of the connections that one process holds.

    Args:
        index: this process's number; 0 listens, the others connect.
        host: of process 0.
        publish: called by process 0 with the port on which it listens.
        find: called by the others; returns that port.
    """

    def __init__(
        self, index: int, host: str, publish: Callable[[int], None], find: Callable[[], int]
    ):
        self.index = index
        self.server: socket.socket | None = None
        self.lines: dict[int, socket.socket] = {}
        if index == 0:
            self.server = socket.create_server(("", 0))
            self.server.setblocking(False)
            publish(self.server.getsockname()[1])
            return
        port = find()
        try:
            line = socket.create_connection((host, port), timeout=10)
            line.sendall(index.to_bytes(4, "big"))
            line.setblocking(False)
            self.lines[0] = line
        except OSError:
            pass

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
                index = int.from_bytes(line.recv(4), "big")
            except OSError:
                line.close()
                continue
            line.setblocking(False)
            self.lines[index] = line

    def say_goodbye(self) -> None:
        """Tells the others that this process ends as it should."""
        for line in self.lines.values():
            try:
                line.sendall(_GOODBYE)
                line.close()
            except OSError:
                pass  # it is gone itself
        self.lines.clear()
