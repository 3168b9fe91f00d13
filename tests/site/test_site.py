# SPDX-License-Identifier: Apache-2.0
"""The built site in a browser, wide and narrow, light and dark.

`make test-docs` builds it first. Screenshots of some pages are saved to out/site.
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
FOLDER = ROOT / "out" / "site"

# Debian's package: Playwright's own browsers are not needed.
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",  # Chromium has no sandbox for root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    # No requests by the browser itself.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

HOME = "index.html"
API = "reference/api/asgd_optax."
MATHEMATICS = ["reference/weightings.html", API + "asgd.html"]
SCREENSHOTS = [
    HOME,
    "tutorial/first_ema.html",
    API + "asgd.html",
    "reference/gallery.html",
]
# Without a build one case remains, which fails.
PAGES = sorted(str(p.relative_to(SITE)) for p in SITE.rglob("*.html")) or [HOME]
WIDTHS = [1280, 390]
Scheme = Literal["light", "dark"]


class Visit(NamedTuple):
    """A page in the browser, its errors so far and its requests to other sites."""

    page: Page
    errors: list[str]
    outside: list[str]


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serve files without logging."""

    def log_message(self, format: str, *args: object) -> None:
        """Do nothing."""


@pytest.fixture(scope="module")
def root() -> Iterator[str]:
    """Serve the build and return its address."""
    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start Chromium without a window."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@contextlib.contextmanager
def visited(
    browser: Browser, root: str, path: str, width: int, scheme: Scheme = "light"
) -> Iterator[Visit]:
    """Open a page and wait until everything is loaded and MathJax has finished."""
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
    """Return whether the text scrolls; code, tables and formulas may, by themselves.

    The theme hides a page that is too wide: the element around the text scrolls then.
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


def broken_names(page: Page) -> list[str]:
    """Return the names in tables that do not fit on one line.

    A word of a literal that has more than one rectangle is broken.
    """
    broken: list[str] = page.evaluate(r"""() => {
      const names = [];
      for (const code of document.querySelectorAll("article td code")) {
        const walker = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
        for (let node; (node = walker.nextNode()); )
          for (const match of node.data.matchAll(/\w+/g)) {
            const range = document.createRange();
            range.setStart(node, match.index);
            range.setEnd(node, match.index + match[0].length);
            const rectangles = [...range.getClientRects()];
            const lines = new Set(rectangles.map(r => Math.round(r.top)));
            if (lines.size > 1) names.push(match[0]);
          }
      }
      return names;
    }""")
    return broken


@pytest.mark.parametrize("path", PAGES)
def test_page_loads_without_errors_and_fits_its_width(
    browser: Browser, root: str, path: str
) -> None:
    """Nothing is requested from other sites, and all formulas are set."""
    with visited(browser, root, path, WIDTHS[0]) as (page, errors, outside):
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            assert not scrolls_sideways(page), width
            assert broken_names(page) == [], width
        unusable = "[...document.images].filter(i => !i.naturalWidth || !i.alt.trim())"
        assert page.evaluate(f"{unusable}.map(i => i.src)") == []
        mathematics = page.locator(".math")
        assert mathematics.locator("mjx-container").count() == mathematics.count()
        assert page.locator("mjx-merror").count() == 0
        assert errors == []
        assert outside == []


@pytest.mark.parametrize("path", MATHEMATICS)
def test_formulas_are_set_inline_and_displayed(
    browser: Browser, root: str, path: str
) -> None:
    """In MathJax's own fonts."""
    with visited(browser, root, path, 1280) as (page, *_):
        assert page.locator("span.math mjx-container").count() > 0
        assert page.locator("div.math mjx-container").count() > 0
        assert page.evaluate(
            "[...document.fonts].filter(f => f.family.startsWith('MJX')"
            " && f.status == 'loaded').length"
        )


def test_names_in_code_and_text_link_to_their_pages(
    browser: Browser, root: str
) -> None:
    with visited(browser, root, "how_to/nnx.html", 1280) as (page, *_):
        for kind in ("a.sphinx-codeautolink-a", "p a:has(code)"):
            links = page.locator(f"article {kind}")
            found = links.evaluate_all("links => links.map(link => link.href)")
            assert any(API + "average_iterates.html" in link for link in found), kind


def test_every_card_of_the_gallery_links_to_a_page(browser: Browser, root: str) -> None:
    with visited(browser, root, "reference/gallery.html", 1280) as (page, *_):
        cards = page.locator("article .sd-card")
        assert cards.locator("a.sd-stretched-link").count() == cards.count() > 0


def test_signatures_have_types(browser: Browser, root: str) -> None:
    with visited(browser, root, API + "average_iterates.html", 1280) as (page, *_):
        signature = page.locator("dt.sig").first.inner_text()
        assert "weighting: Weighting | float | None = None" in signature


def test_every_code_block_has_a_copy_button(browser: Browser, root: str) -> None:
    with visited(browser, root, "how_to/nnx.html", 1280) as (page, *_):
        blocks = page.locator("div.highlight")
        assert blocks.locator("button.copybtn").count() == blocks.count() > 0


@pytest.mark.parametrize("width", WIDTHS)
def test_search_finds_the_page_of_a_function(
    browser: Browser, root: str, width: int
) -> None:
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
        page_of_function = f"{root}{API}averaged_params.html"
        assert any(link.startswith(page_of_function) for link in found)
        assert not scrolls_sideways(page)
        assert errors == []
        assert outside == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", SCREENSHOTS)
def test_page_follows_the_color_scheme_of_the_system(
    browser: Browser, root: str, path: str, width: int, scheme: Scheme
) -> None:
    with visited(browser, root, path, width, scheme) as (page, *_):
        name = path.removesuffix(".html").replace("/", "-")
        FOLDER.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=FOLDER / f"{name}-{width}-{scheme}.png", full_page=True)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        red, green, blue = map(int, ground.removeprefix("rgb(").rstrip(")").split(","))
        assert (red + green + blue > 384) == (scheme == "light")
