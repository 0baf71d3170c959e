# SPDX-License-Identifier: Apache-2.0
"""Headless Chromium over its debugging pipe, for pictures of pages and for what it and axe-core say about them.

The protocol is that of https://chromedevtools.github.io/devtools-protocol: JSON, each message ended by a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Browser", "Look", "browser"]

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass(frozen=True)
class Look:
    """How a page is looked at.

    Attributes:
        width: Of the window.
        dark: Whether the reader prefers dark colours.
        scale: Pixels of the picture for each of the page.
        paper: Whether it is printed.
    """

    width: int = 1280
    dark: bool = False
    scale: float = 1.0
    paper: bool = False


@dataclass
class Browser:
    """A tab."""

    _read: int
    _write: int
    _session: str = ""
    _number: int = 0
    _rest: bytes = b""
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for what it gives back; what happens meanwhile is noted.

        Raises:
            RuntimeError: it failed.
        """
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def open_tab(self) -> None:
        """Attach to a new tab."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def show(self, page: Path, look: Look) -> None:
        """Load a page; `said` holds what the console says, `asked` what it loads beside itself."""
        self.said, self.asked = [], []
        scheme = {"name": "prefers-color-scheme", "value": "dark" if look.dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="print" if look.paper else "", features=[scheme])
        self._size(look, 900)
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self.value("document.readyState") != "complete":
            pass
        self.value("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")

    def value(self, expression: str) -> Any:
        """What JavaScript gives, awaited."""
        asked = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return asked["result"].get("value")

    def picture(self, look: Look, most: int = 20_000) -> bytes:
        """The whole page as PNG, cut at a height of `most`."""
        height = min(int(self.value("document.documentElement.scrollHeight")), most)
        self._size(look, height)
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def faults(self, axe: str) -> list[dict[str, Any]]:
        """What axe-core, whose text is given, finds; the page's own policy is lifted for it."""
        self.call("Page.setBypassCSP", enabled=True)
        self.call("Page.reload")
        self.value("new Promise(done => setTimeout(done, 200))")
        self.call("Runtime.evaluate", expression=axe)
        found: list[dict[str, Any]] = self.value("axe.run().then(r => r.violations)")
        self.call("Page.setBypassCSP", enabled=False)
        return found

    def _size(self, look: Look, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=look.width, height=height, deviceScaleFactor=look.scale, mobile=look.width < 600,
        )  # fmt: skip

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("the browser ended")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.consoleAPICalled":
                self.said.append(" ".join(str(arg.get("value")) for arg in params["args"]))
            case "Log.entryAdded":
                self.said.append(params["entry"]["text"])
            case "Runtime.exceptionThrown":
                self.said.append(params["exceptionDetails"]["text"])
            case "Network.requestWillBeSent":
                self.asked.append(params["request"]["url"])


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser without a window.

    Raises:
        RuntimeError: there is no Chromium.
    """
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if program is None:
        raise RuntimeError(f"none of {', '.join(_PROGRAMS)} is installed")
    (their_read, write), (read, their_write) = os.pipe(), os.pipe()

    def as_three_and_four() -> None:
        high = [os.dup(their_read), os.dup(their_write)]  # neither may be in the way of the other
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    with tempfile.TemporaryDirectory() as profile:
        words = [
            program, "--headless=new", "--no-sandbox", "--hide-scrollbars", "--disable-gpu", "--remote-debugging-pipe",
            "--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}",
        ]  # fmt: skip
        process = subprocess.Popen(
            words, preexec_fn=as_three_and_four, pass_fds=(3, 4), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(their_read)
        os.close(their_write)
        tab = Browser(read, write)
        try:
            tab.open_tab()
            yield tab
        finally:
            process.terminate()
            process.wait(10)
            os.close(read)
            os.close(write)
