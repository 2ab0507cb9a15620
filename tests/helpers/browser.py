"""A headless Chromium that tests drive through chromedriver, by the W3C WebDriver protocol: JSON over HTTP.

https://www.w3.org/TR/webdriver2/ names the commands; chromedriver adds those of the browser's own tools.
"""

import base64
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key that marks an element, as the protocol defines it."""
KEYS = {
    "1": "1",
    "2": "2",
    "right": "\ue014",
    "left": "\ue012",
    "down": "\ue015",
    "tab": "\ue004",
    "space": " ",
    "home": "\ue011",
}


def missing_browser() -> str:
    """Say what is missing for a browser test; empty if it can run."""
    lacking = [name for name in ("chromedriver", "chromium") if _found(name) is None]
    return f"no {' and no '.join(lacking)} on this machine" if lacking else ""


def _found(name: str) -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome") if name == "chromium" else (name,)
    return next((path for one in names if (path := shutil.which(one))), None)


class Browser:
    """One window of the browser."""

    def __init__(self, address: str) -> None:
        self.address = address
        options = {
            "binary": _found("chromium"),
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"],
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.address = f"{address}/session/{session['sessionId']}"

    def open(self, page: Path | str) -> None:
        """Open a file, or an address, and wait until it is loaded."""
        self._send("POST", "/url", {"url": page.as_uri() if isinstance(page, Path) else page})

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a script in the page returns."""
        return self._send("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """Return the text of the first element that a CSS selector finds."""
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector)).strip()

    def press(self, *keys: str) -> None:
        """Press keys, one after another, wherever the focus is."""
        actions = [{"type": kind, "value": KEYS[key]} for key in keys for kind in ("keyDown", "keyUp")]
        self._send("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def click(self, selector: str) -> None:
        """Click on the first element that a CSS selector finds, where a person would."""
        element = self._send("POST", "/element", {"using": "css selector", "value": selector})
        self._send("POST", f"/element/{element[_ELEMENT]}/click", {})

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the pointer at one point of the window, move it to another one, and let it go."""
        points = [{"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)} for x, y in (start, end)]
        actions = [points[0], {"type": "pointerDown", "button": 0}, points[1], {"type": "pointerUp", "button": 0}]
        self._send("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": actions}]})

    def show_as(self, width: int, height: int, scheme: str = "light") -> None:
        """Give the page the size of a screen in pixels, and the colour scheme `light` or `dark`."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._tool("Emulation.setDeviceMetricsOverride", size)
        self._tool("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page to a PNG file."""
        picture = self._tool("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(picture["data"]))

    def messages(self) -> list[str]:
        """Return what the console has said since the last call, whatever its level."""
        return [f"{one['level']}: {one['message']}" for one in self._send("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Return the addresses that the pages have requested since the last call."""
        entries = self._send("POST", "/se/log", {"type": "performance"})
        events = [json.loads(entry["message"])["message"] for entry in entries]
        return [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        """End the browser."""
        self._send("DELETE", "")

    def _tool(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._send("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _send(self, method: str, path: str, content: dict[str, Any] | None = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            f"{self.address}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {path}: {json.load(error)['value']['message']}") from None


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser and its driver, and end both."""
    driver = subprocess.Popen(
        [str(_found("chromedriver")), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield from _session(driver)
    finally:
        driver.terminate()
        driver.wait(30)


def _session(driver: "subprocess.Popen[str]") -> Iterator[Browser]:
    assert driver.stdout is not None
    started = next(line for line in driver.stdout if "started successfully on port" in line)
    port = started.split("port")[-1].strip(" .\n")
    window = Browser(f"http://127.0.0.1:{port}")
    try:
        yield window
    finally:
        window.close()
