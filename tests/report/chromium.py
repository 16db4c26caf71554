"""A headless Chromium, driven by its own protocol over two pipes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.launching import ROOT

UNPACKED = ROOT / ".venv" / "chromium"
Message = dict[str, Any]


def chromium() -> Path | None:
    """The program, unpacked by `make test-peers` or installed; None if there is none."""
    unpacked = UNPACKED / "usr/lib/chromium/chromium-headless-shell"
    installed = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    return unpacked if unpacked.exists() else Path(installed) if installed else None


class Page:
    """One page of one browser. `events`: all that it has told of the page, in order; `folder`: goes when it ends."""

    def __init__(self, program: Path, width: int = 1280, height: int = 900) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        self.folder = Path(self._profile.name)
        read_by_it, self._commands = os.pipe()
        answers, written_by_it = os.pipe()
        folders = sorted({str(path.parent) for path in UNPACKED.glob("usr/lib/**/*.so*")})
        words = [str(program), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        words += [f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}", "about:blank"]
        self._process = subprocess.Popen(  # it takes commands from descriptor 3, and answers on 4
            ["bash", "-c", f'exec "$0" "$@" 3<&{read_by_it} 4>&{written_by_it}', *words],
            env={**os.environ, "LD_LIBRARY_PATH": ":".join([*folders, os.environ.get("LD_LIBRARY_PATH", "")])},
            pass_fds=(read_by_it, written_by_it),
            stderr=subprocess.DEVNULL,
        )
        os.close(read_by_it)
        os.close(written_by_it)
        self._answers = os.fdopen(answers, "rb")
        self.events: list[Message] = []
        self._session, self._sent = "", 0
        made = self.call("Target.createTarget", url="about:blank", width=width, height=height)
        self._session = self.call("Target.attachToTarget", targetId=made["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._commands)
        self._answers.close()
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> Message:
        """The result of a command of the protocol; AssertionError where the browser refuses it."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._sent:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _next(self) -> Message:
        content = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            content += byte
        return json.loads(content)

    def open(self, path: Path) -> None:
        """Open a file, and wait until it is drawn."""
        self.events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not self.told("Page.loadEventFired"):
            self.events.append(self._next())
        self.settle()

    def settle(self) -> None:
        """Wait for the next two frames: what was asked for is drawn."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def told(self, method: str) -> list[Message]:
        """The parameters of every event of this name since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def run(self, script: str) -> Any:
        """The value of a script in the page."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **other: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **other)

    def move(self, x: float, y: float) -> None:
        self.mouse("mouseMoved", x, y)
        self.settle()

    def click(self, x: float, y: float, count: int = 1) -> None:
        for nth in range(1, count + 1):
            self.mouse("mousePressed", x, y, button="left", buttons=1, clickCount=nth)
            self.mouse("mouseReleased", x, y, button="left", clickCount=nth)
        self.settle()

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.mouse("mouseMoved", *start)
        self.mouse("mousePressed", *start, button="left", buttons=1, clickCount=1)
        self.mouse("mouseMoved", *end, button="left", buttons=1)
        self.mouse("mouseReleased", *end, button="left", clickCount=1)
        self.settle()

    def prefer(self, scheme: str) -> None:
        """`dark` or `light`."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.settle()

    def screenshot(self, path: Path) -> None:
        """A PNG of what the window shows."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
