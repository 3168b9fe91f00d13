# SPDX-License-Identifier: Apache-2.0
"""The built site in a real browser, wide and narrow, light and dark.

`make test-docs` builds it first. Of some pages pictures are left in out/site, to be
looked at.
"""

import contextlib
import functools
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
from playwright.sync_api import Browser, Page, Route, sync_playwright

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "docs"
PICTURES = ROOT / "out" / "site"

# Debian's; Playwright's own browsers are not needed.
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",  # refused to root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    # Requests of the browser's own.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

HOME = "index.html"
MATHEMATICS = ["choosing.html", "api/asgd.html"]
LOOKED_AT = [HOME, "choosing.html", "api/asgd.html", "gallery.html"]
# Without a build there is one case still, and it fails.
PAGES = sorted(str(p.relative_to(SITE)) for p in SITE.rglob("*.html")) or [HOME]
WIDTHS = [1280, 390]
Scheme = Literal["light", "dark"]


class Visit(NamedTuple):
    """A page in the browser, and what went wrong on it so far."""

    page: Page
    errors: list[str]
    outside: list[str]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, and logs nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def root() -> Iterator[str]:
    """The address under which the build is served."""
    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, headless."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@contextlib.contextmanager
def visited(
    browser: Browser, root: str, path: str, width: int, scheme: Scheme = "light"
) -> Iterator[Visit]:
    """The page, once all is loaded and its mathematics set."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme
    )
    errors, outside = [], []

    def answer(route: Route) -> None:
        if route.request.url.startswith(root):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    context.route("**/*", answer)
    page = context.new_page()
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(f"failed: {request.url}"))
    page.on(
        "response",
        lambda r: errors.append(f"{r.status}: {r.url}") if r.status >= 400 else None,
    )
    page.goto(root + path)
    page.evaluate("window.MathJax?.startup?.promise")
    page.evaluate("document.fonts.ready")
    yield Visit(page, errors, outside)
    context.close()


def scrolls_sideways(page: Page) -> bool:
    """Whether the text does; code, tables and formulas may, each by itself.

    The theme hides that the page would, by letting what holds the text do so instead.
    """
    return bool(
        page.evaluate("""() => {
          let element = document.querySelector("[role=main]");
          for (; element; element = element.parentElement)
            if (element.scrollWidth > element.clientWidth &&
                getComputedStyle(element).overflowX != "visible") return true;
          const root = document.scrollingElement;
          return root.scrollWidth > root.clientWidth;
        }""")
    )


@pytest.mark.parametrize("path", PAGES)
def test_page(browser: Browser, root: str, path: str) -> None:
    """Loads whole and from nowhere else; sets its mathematics; fits a telephone."""
    with visited(browser, root, path, WIDTHS[0]) as (page, errors, outside):
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            assert not scrolls_sideways(page), width
        broken = "[...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
        assert page.evaluate(broken) == []
        mathematics = page.locator(".math")
        assert mathematics.locator("mjx-container").count() == mathematics.count()
        assert page.locator("mjx-merror").count() == 0
        assert errors == []
        assert outside == []


@pytest.mark.parametrize("path", MATHEMATICS)
def test_mathematics(browser: Browser, root: str, path: str) -> None:
    """Is there, inline and displayed, in MathJax's own fonts."""
    with visited(browser, root, path, 1280) as (page, *_):
        assert page.locator("span.math mjx-container").count() > 0
        assert page.locator("div.math mjx-container").count() > 0
        assert page.evaluate(
            "[...document.fonts].filter(f => f.family.startsWith('MJX')"
            " && f.status == 'loaded').length"
        )


def test_copy_buttons(browser: Browser, root: str) -> None:
    """Every block of code has one."""
    with visited(browser, root, HOME, 1280) as (page, *_):
        blocks = page.locator("div.highlight")
        assert blocks.locator("button.copybtn").count() == blocks.count() > 0


@pytest.mark.parametrize("width", WIDTHS)
def test_search(browser: Browser, root: str, width: int) -> None:
    """Finds the accessor from the first page, its own page among the results."""
    with visited(browser, root, HOME, width) as (page, errors, outside):
        if width < 1000:
            page.locator("label.nav-overlay-icon").first.click()
        field = page.locator("input[name=q]").first
        field.fill("averaged_params")
        field.press("Enter")
        page.wait_for_selector("#search-results li a")
        page.wait_for_load_state("networkidle")
        links = page.locator("#search-results li a")
        found = links.evaluate_all("links => links.map(link => link.href)")
        assert any(link.startswith(f"{root}api/averaged_params.html") for link in found)
        assert not scrolls_sideways(page)
        assert errors == []
        assert outside == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", LOOKED_AT)
def test_pictures(
    browser: Browser, root: str, path: str, width: int, scheme: Scheme
) -> None:
    """The scheme that the reader's system asks for is the page's."""
    with visited(browser, root, path, width, scheme) as (page, *_):
        name = path.removesuffix(".html").replace("/", "-")
        PICTURES.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=PICTURES / f"{name}-{width}-{scheme}.png", full_page=True)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        red, green, blue = map(int, ground.removeprefix("rgb(").rstrip(")").split(","))
        assert (red + green + blue > 384) == (scheme == "light")
