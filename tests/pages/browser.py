"""A real browser without a library: Chromium's DevTools protocol over two pipes."""

import base64
import fcntl
import json
import os
import shutil
import subprocess

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--remote-debugging-pipe"),
)


class Browser:
    """One page of a headless Chromium; use as a context manager.

    Attributes:
        messages: what the page wrote to the console, and what was refused to it.
    """

    def __init__(self, profile):
        self.profile, self.number, self.session = profile, 0, None
        self.messages = []

    def __enter__(self):
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (*os.pipe(), *os.pipe())]
        self.process = subprocess.Popen(  # it reads from descriptor 3 and writes to 4
            ["bash", "-c", f'exec "$@" 3<&{high[0]} 4>&{high[3]}', "bash", CHROMIUM, *_OPTIONS]
            + [f"--user-data-dir={self.profile}"],
            pass_fds=(high[0], high[3]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(high[0])
        os.close(high[3])
        self.out, self.back = os.fdopen(high[1], "wb", buffering=0), os.fdopen(high[2], "rb")
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.out.close()
        self.back.close()

    def _read(self):
        text = b""
        while not text.endswith(b"\0"):
            byte = self.back.read1(1 << 16) if not text else self.back.read(1)
            assert byte, "the browser has ended"
            text += byte
        *others, message = [json.loads(part) for part in text.split(b"\0") if part]
        self.waiting = getattr(self, "waiting", []) + others + [message]

    def _next(self):
        while not getattr(self, "waiting", []):
            self._read()
        message = self.waiting.pop(0)
        if message.get("method") in (
            "Runtime.consoleAPICalled",
            "Log.entryAdded",
            "Runtime.exceptionThrown",
        ):
            self.messages.append(json.dumps(message["params"]))
        return message

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.out.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url, width=1280, dark=False):
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call(
            "Page.navigate", url="about:blank"
        )  # a change of the fragment alone loads nothing
        while self._next().get("method") != "Page.loadEventFired":
            pass
        self.call("Page.navigate", url=url)
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def run(self, script):
        """The value of an expression of JavaScript in the page, of JSON types."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path):
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))
