"""A real Chromium, driven over the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/)."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
START_SECONDS = 60
ANSWER_SECONDS = 30


def find() -> str | None:
    """The program: `$CHROMIUM`, or the first of the usual names."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab, with everything that it asked the network for and everything that it complained about."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, session: str) -> None:
        self._socket, self._session = socket, session
        self._ids = itertools.count(1000)
        self.requests: list[str] = []
        self.complaints: list[str] = []

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events on the way are kept."""
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": params, "sessionId": self._session})
        async with asyncio.timeout(ANSWER_SECONDS):
            while True:
                message = await self._socket.receive_json()
                if message.get("id") == number:
                    if "error" in message:
                        raise AssertionError(f"{method}: {message['error']}")
                    return dict(message["result"])
                self._event(message)

    def _event(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(params["entry"]["text"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))

    async def open(self, path: Path, *, scheme: str, width: int = 1280) -> None:
        """Load a file, as a reader with this colour scheme and width of window sees it."""
        for domain in ("Page", "Network", "Log", "Runtime"):
            await self.send(f"{domain}.enable")
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.send("Emulation.setEmulatedMedia", features=features)
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        await self.send("Page.navigate", url=path.as_uri())
        for _ in range(ANSWER_SECONDS * 20):
            if await self.eval("document.readyState") == "complete" and await self.eval("location.protocol") == "file:":
                return
            await asyncio.sleep(0.05)
        raise AssertionError("the page did not load")

    async def eval(self, expression: str) -> Any:
        """Value of a JavaScript expression. It runs beside the page: its content policy does not hold for us."""
        answer = await self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def screenshot(self) -> bytes:
        """The whole page as PNG, in base64."""
        answer = await self.send("Page.captureScreenshot", captureBeyondViewport=True)
        return str(answer["data"]).encode()


@asynccontextmanager
async def page(program: str) -> AsyncIterator[Page]:
    """A browser of its own with one empty tab; ended at the end."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            program,
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-extensions", "--disable-background-networking", "--disable-component-update"),
            *("--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            port, path = await _address(Path(folder) / "DevToolsActivePort", process)
            async with aiohttp.ClientSession(trust_env=False) as session:
                url = f"ws://127.0.0.1:{port}{path}"
                async with session.ws_connect(url, max_msg_size=0) as socket:
                    yield await _tab(socket)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def _address(file: Path, process: asyncio.subprocess.Process) -> tuple[str, str]:
    for _ in range(START_SECONDS * 20):
        if process.returncode is not None:
            raise AssertionError(f"Chromium ended with {process.returncode}")
        lines = await asyncio.to_thread(_lines, file)
        if len(lines) == 2:
            return lines[0], lines[1]
        await asyncio.sleep(0.05)
    raise AssertionError(f"Chromium did not listen within {START_SECONDS} s")


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="ascii").split() if file.exists() else []


async def _tab(socket: aiohttp.ClientWebSocketResponse) -> Page:
    async def ask(number: int, method: str, **params: Any) -> dict[str, Any]:
        await socket.send_json({"id": number, "method": method, "params": params})
        async with asyncio.timeout(ANSWER_SECONDS):
            while True:
                message = await socket.receive_json()
                if message.get("id") == number:
                    return dict(message["result"])

    target = await ask(1, "Target.createTarget", url="about:blank")
    attached = await ask(2, "Target.attachToTarget", targetId=target["targetId"], flatten=True)
    return Page(socket, attached["sessionId"])
