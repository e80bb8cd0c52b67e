"""The page of `securevllm explain` in a real Chromium: what is on it, light and dark, and that it asks for nothing."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from securevllm import explain
from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.render.meta import Owner
from tests.browser import chromium

if TYPE_CHECKING:
    from securevllm.explain import View
    from tests.browser.chromium import Page

PROGRAM = chromium.find()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium on this machine: install the package chromium, or name it in $CHROMIUM"
)

RICH: dict[str, Any] = {
    "model": {"name": "owner/model", "source": {"huggingFace": {}}},
    "image": "vllm/vllm-openai:v0.33.0",
    "gateway": {
        "routes": {"profiles": ["chat", "rerank"], "allow": [{"method": "POST", "path": "/pooling"}]},
        "authentication": {"none": "I accept that <b>everybody</b> may ask & see"},
        "clients": {"namespaceSelector": {}, "cidrs": ["198.51.100.0/24"]},
    },
    "security": {"egress": [{"to": {"cidrs": ["0.0.0.0/0"]}, "ports": [{"port": 443}], "why": "images of users"}]},
}
SMALL: dict[str, Any] = {"model": {"name": "/models/other"}, "image": "vllm/vllm-openai:v0.33.0"}
GROUPED: dict[str, Any] = SMALL | {"parallelism": {"tensor": 8, "nodes": 2}, "replicas": 2}
SCHEMES = ("light", "dark")

TEXTS = "[...document.querySelectorAll('{}')].map(e => e.textContent)"
CONTRASTS = """
(() => {
  const rgb = text => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
  const light = text => {
    const [r, g, b] = rgb(text).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!colour.startsWith('rgba(0, 0, 0, 0')) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.querySelectorAll('h1, h2, p, li, th, td, b, code, span, summary, .soft')]
    .filter(e => e.textContent.trim())
    .map(e => {
      const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName, e.textContent.slice(0, 40)];
    })
    .filter(([ratio]) => ratio < 4.5);
})()
"""
"""Texts whose contrast is less than WCAG 2.2 AA asks for (4.5 to 1)."""


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    assert PROGRAM is not None
    async with chromium.page(PROGRAM) as opened:
        yield opened


@pytest.fixture(scope="module")
def views() -> list[View]:
    named = (("llama", RICH), ("other", SMALL), ("large", GROUPED))
    return [explain.view(Owner(name, "team", "uid"), parse(name, spec), Context()) for name, spec in named]


@pytest.fixture(scope="module")
def file(views: list[View], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "explain.html"
    path.write_text(explain.html(*views), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_everything_is_on_the_page(page: Page, file: Path, views: list[View], scheme: str) -> None:
    await page.open(file, scheme=scheme)
    assert await page.eval(TEXTS.format("h1")) == [f"team/{view.name}" for view in views]
    assert await page.eval("document.title") == "Who may talk to whom: team/llama, team/other, team/large"
    assert await page.eval("document.documentElement.lang") == "en"
    assert await page.eval("document.querySelectorAll('section').length") == len(views)
    headings = await page.eval(TEXTS.format("section:first-of-type h2"))
    assert headings == [
        "Who may talk to whom",
        "Routes that pass the gateway",
        "What the spec gives up",
        "Published holes in this vLLM",
        "What no NetworkPolicy sees",
        "What listens",
    ]
    for index, view in enumerate(views, 1):
        section = f"section:nth-of-type({index})"
        flows, routes, sockets = await page.eval(
            f"[...document.querySelectorAll('{section} table')].map(t => [...t.tBodies[0].rows]"
            ".map(r => [...r.cells].map(c => c.textContent)))"
        )
        assert [(row[0], row[4]) for row in flows] == [(flow.direction.value, flow.why) for flow in view.flows]
        assert [(row[0], row[1]) for row in routes] == [(route.method, route.path) for route in view.routes]
        assert {row[2] for row in sockets} >= {socket.name for socket in view.sockets}
        assert await page.eval(f"document.querySelectorAll('{section} .fact').length") == len(view.summary)
        names = await page.eval(TEXTS.format(f"{section} svg .name"))
        assert {pods.role for pods in view.pods} <= set(names)
        assert len(await page.eval(TEXTS.format(f"{section} svg g.edge text"))) == len(
            {(flow.direction, flow.source, flow.destination) for flow in view.flows}
        )


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_the_page_asks_for_nothing_and_runs_nothing(page: Page, file: Path, scheme: str) -> None:
    await page.open(file, scheme=scheme)
    assert page.requests == [file.as_uri()]
    assert page.complaints == []
    outside = "script, link, img, iframe, object, embed, form, base, [src], [href], [onload], [onclick], [style]"
    assert await page.eval(f"document.querySelectorAll('{outside}').length") == 0
    assert await page.eval("document.cookie + localStorage.length") in {"0", ""}


async def test_the_content_policy_holds(page: Page, file: Path) -> None:
    """Had a tag of a user got through, nothing of it would run or load."""
    await page.open(file, scheme="light")
    await page.eval("document.body.append(Object.assign(new Image(), {src: 'https://example.org/x.png'}))")
    await page.eval("document.body.insertAdjacentHTML('beforeend', '<b onclick=\"window.hit = 1\">x</b>')")
    await page.eval("document.body.lastChild.click()")
    assert await page.eval("window.hit === undefined")
    assert [text for text in page.complaints if "Content Security Policy" in text]
    assert not [url for url in page.requests if url.startswith("https:")] or page.complaints


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_words_of_a_user_are_text(page: Page, file: Path, scheme: str) -> None:
    await page.open(file, scheme=scheme)
    risks = await page.eval(TEXTS.format("section:first-of-type h2:nth-of-type(3) + ul li"))
    assert "gateway.authentication.none: I accept that <b>everybody</b> may ask & see" in risks


async def test_light_and_dark_differ_and_both_can_be_read(page: Page, file: Path) -> None:
    seen = {}
    for scheme in SCHEMES:
        await page.open(file, scheme=scheme)
        seen[scheme] = await page.eval("getComputedStyle(document.body).backgroundColor")
        assert await page.eval(CONTRASTS) == []
    assert seen == {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 22, 29)"}


@pytest.mark.parametrize("width", [1280, 390])
async def test_nothing_sticks_out_of_the_window(page: Page, file: Path, width: int) -> None:
    """Wide tables and drawings scroll by themselves; the page does not."""
    await page.open(file, scheme="light", width=width)
    assert await page.eval("document.documentElement.scrollWidth") <= width


async def test_labels_of_the_drawing_lie_within_it(page: Page, file: Path) -> None:
    await page.open(file, scheme="light")
    outside = await page.eval(
        "[...document.querySelectorAll('svg')].flatMap(s => [...s.querySelectorAll('text, rect')].filter(e => {"
        " const [a, b] = [e.getBoundingClientRect(), s.getBoundingClientRect()];"
        " return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;"
        "}).map(e => e.outerHTML))"
    )
    assert outside == []


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_screenshot_is_a_picture(page: Page, file: Path, scheme: str, tmp_path: Path) -> None:
    await page.open(file, scheme=scheme)
    picture = base64.b64decode(await page.screenshot())
    (tmp_path / f"{scheme}.png").write_bytes(picture)  # for who looks at it: pytest --basetemp
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 50_000
