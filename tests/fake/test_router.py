"""The real vllm-router in front of prefill and decode, with both connectors.

The package (62 MB) is not in the lock: it is fetched once, by the ordinary client, and kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake.service import KEY, MODEL, PATIENCE, Service, free_port, request, until
from tests.fake.test_transfer import CHAT, side

RELEASE = "0.1.17"
_DOWNLOAD_SECONDS = 240


@pytest.fixture(scope="module")
def package() -> Path:
    """The folder that holds it; skips, with the reason, where it cannot be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secure-vllm-operator"
    folder = cache / f"vllm-router-{RELEASE}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = folder.with_suffix(f".part-{os.getpid()}")
        wanted = ("--only-binary", ":all:", "--target", str(partial), f"vllm-router=={RELEASE}")
        done = subprocess.run(  # noqa: S603 - pip of this environment
            [sys.executable, "-m", "pip", "install", "--quiet", *wanted],
            check=False, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"vllm-router {RELEASE} cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
        with contextlib.suppress(OSError):  # another worker was faster
            partial.rename(folder)
    return folder


@contextlib.contextmanager
def router(package: Path, folder: Path, *flags: str) -> Iterator[str]:
    """The router as rendered; its URL, once every worker has answered."""
    port, metrics = free_port("127.0.0.1"), free_port("127.0.0.1")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(package), "OPENAI_API_KEY": KEY, "HOME": str(folder)}
    own = ("--vllm-pd-disaggregation", "--host=127.0.0.1", f"--port={port}", f"--prometheus-port={metrics}")
    log = folder / "router.log"
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603 - the package
            [sys.executable, "-m", "vllm_router.launch_router", *own, *flags], stdout=out, stderr=out, env=environment
        )
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        with contextlib.suppress(OSError):
            return request("GET", f"{url}/readiness")[0] == 200
        return False

    try:
        until(ready, lambda: log.read_text(errors="replace")[-3000:], 2 * PATIENCE)
        yield url
    finally:
        process.kill()
        process.wait(timeout=PATIENCE)


@pytest.mark.parametrize(("connector", "name"), [("nixl", "NixlConnector"), ("mooncake", "MooncakeConnector")])
def test_requests_through_the_real_router(
    service: Service, package: Path, tmp_path: Path, connector: str, name: str
) -> None:
    bootstrap = str(free_port())
    prefill = side(service, name, "kv_producer", env={"VLLM_MOONCAKE_BOOTSTRAP_PORT": bootstrap})
    decode = side(service, name, "kv_consumer")
    prefill.healthy()
    decode.healthy()
    workers = (
        "--prefill",
        f"http://{prefill.address}:{prefill.port}",
        *([bootstrap] if connector == "mooncake" else []),
    )
    to = (*workers, f"--decode=http://{decode.address}:{decode.port}", f"--kv-connector={connector}")
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with router(package, tmp_path, *to) as url:
        status, answer = request("POST", f"{url}/v1/chat/completions", CHAT, headers)
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "Hello from behind the gateway.")
        assert request("POST", f"{url}/v1/completions", {"model": MODEL, "prompt": "hi"}, headers)[0] == 200
        status, stream = request("POST", f"{url}/v1/chat/completions", CHAT | {"stream": True}, headers)
        assert (status, stream.strip().endswith("data: [DONE]")) == (200, True)
        for one in (prefill, decode):
            assert "vllm:request_success_total" in one.ask("GET", "/metrics")[1]
            assert " 0.0\n" not in one.ask("GET", "/metrics")[1].partition("request_success_total{")[2], "not asked"
        prefill.end()
        assert request("POST", f"{url}/v1/chat/completions", CHAT, headers)[0] >= 500
