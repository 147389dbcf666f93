"""A headless Chromium, driven over WebDriver's plain HTTP: pages are opened, looked into, photographed."""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

PATIENCE_S = 60
# every element of the page, also those inside shadow roots, where TensorBoard keeps its plots
DEEP = """
const found = [];
const walk = (node) => {
  for (const one of node.querySelectorAll('*')) { found.push(one); if (one.shadowRoot) walk(one.shadowRoot); }
};
walk(document);
"""


@dataclass
class Browser:
    """One window. ``folder`` takes the photographs."""

    session: str
    folder: Path

    def open(self, address: str) -> None:
        self._ask("POST", "/url", {"url": address})

    def run(self, script: str) -> Any:
        """What a script returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": []})

    def deep(self, script: str) -> Any:
        """What a script returns that finds every element in ``found``."""
        return self.run(DEEP + script)

    def wait(self, script: str, what: str, seconds: float = PATIENCE_S) -> Any:
        """What a ``deep`` script returns as soon as that is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.deep(script)):
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}: {self.shot('failed')}"
            time.sleep(0.25)
        return value

    def errors(self) -> list[str]:
        """Errors in the page's log since the last call; a missing favicon is none."""
        lines = self._ask("POST", "/se/log", {"type": "browser"})
        return [line["message"] for line in lines if line["level"] == "SEVERE" and "favicon.ico" not in line["message"]]

    def shot(self, name: str) -> Path:
        """A photograph of the whole page."""
        file = self.folder / f"{name}.png"
        self._ask("POST", "/window/rect", {"width": 1400, "height": 1000})
        height = int(self.run("return Math.max(document.documentElement.scrollHeight, 700)"))
        self._ask("POST", "/window/rect", {"width": 1400, "height": min(height + 150, 6000)})
        file.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))
        return file

    def look(self, width: int, height: int = 900, dark: bool = False, media: str = "screen") -> None:
        """Show the page on a screen of this size, light or dark; from then on for every page that is opened."""
        self._devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def look_freely(self) -> None:
        """End ``look``."""
        self._devtools("Emulation.clearDeviceMetricsOverride")
        self._devtools("Emulation.setEmulatedMedia", media="", features=[])

    def whole(self, file: Path, width: int, dark: bool = False, highest: int = 16000) -> Path:
        """A photograph of the page from its head to its foot."""
        self.look(width, dark=dark)
        height = int(self.run("return document.documentElement.scrollHeight"))
        self.look(width, min(height, highest), dark)
        return self.view(file)

    def view(self, file: Path) -> Path:
        """A photograph of what the screen shows."""
        file.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))
        return file

    def hide_scrollbars(self, hidden: bool) -> None:
        """Scroll bars take no place, as on a telephone, or do again."""
        self._devtools("Emulation.setScrollbarsHidden", hidden=hidden)

    def _devtools(self, command: str, **values: Any) -> Any:
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": values})

    def _ask(self, verb: str, path: str, body: Any = None) -> Any:
        return ask(verb, self.session + path, body)


def ask(verb: str, address: str, body: Any = None) -> Any:
    """The value of a WebDriver answer; its error fails the test."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=verb)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{verb} {address}: {error.read().decode()[:500]}") from error


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def until_served(address: str, process: subprocess.Popen[Any], seconds: float = PATIENCE_S) -> None:
    """Wait until a server that was just started answers."""
    deadline = time.monotonic() + seconds
    while True:
        assert process.poll() is None, f"it ended with {process.returncode} before {address} was served"
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address, timeout=5).close()
            return
        assert time.monotonic() < deadline, f"{address} was not served within {seconds} s"
        time.sleep(0.2)


def _programs() -> list[str]:
    """chromium and its driver; a skip with the reason, or a failure where the tests must run."""
    found = [next(filter(None, map(shutil.which, names)), None) for names in (
        ("chromium", "chromium-browser", "google-chrome"), ("chromedriver", "chromium.chromedriver"),
    )]  # fmt: skip
    if not all(found):
        reason = "chromium and chromedriver are needed (make browser; Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("DIST_PRUNE_MUST_RUN"):
            pytest.fail(reason)
        pytest.skip(reason)
    return [str(program) for program in found]


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start the driver and a window, end both; photographs go to ``folder``."""
    chromium, driver = _programs()
    port = free_port()
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    root, session = f"http://127.0.0.1:{port}", ""
    try:
        until_served(f"{root}/status", process)
        arguments = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1000",
            "--disable-background-networking", "--no-first-run", f"--user-data-dir={folder / 'profile'}",
        ]  # fmt: skip
        wanted = {
            "goog:chromeOptions": {"binary": chromium, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        made = ask("POST", f"{root}/session", {"capabilities": {"alwaysMatch": wanted}})
        session = f"{root}/session/{made['sessionId']}"
        yield Browser(session, folder)
    finally:
        if session:
            with contextlib.suppress(AssertionError, OSError):
                ask("DELETE", session)
        process.terminate()
        process.wait(20)


def photograph(window: Browser, page: Path, picture: Path, width: int, height: int, dark: bool = False) -> None:
    """The top of a page on a screen of this size, as a small PNG: how the pictures of docs/images are made."""
    window.look(width, height, dark)
    window.hide_scrollbars(True)
    window.open(page.resolve().as_uri())
    window.view(picture)
    window.hide_scrollbars(False)
    with Image.open(picture) as image:
        small = image.convert("RGB").quantize(128)
    small.save(picture, optimize=True)


if __name__ == "__main__":  # python -m tests.support.browser PAGE PICTURE WIDTH HEIGHT [dark]
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder)) as window:
        page, picture, width, height, *dark = sys.argv[1:]
        photograph(window, Path(page), Path(picture), int(width), int(height), bool(dark))
