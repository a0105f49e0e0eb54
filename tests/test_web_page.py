"""The page in examples/web, in a browser: it draws, also without a network, on screens of all kinds."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from tiue_runtime.bundle import Bundle, write_bundle

pytest.importorskip("playwright")

from axe_playwright_python.sync_playwright import Axe
from browser import browser, chromium, served
from PIL import Image

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "examples" / "web" / "build.mjs"
TINY = ROOT / "runtime" / "tests" / "data" / "tiny"
FILES = json.loads((ROOT / "models" / "emoji" / "tiue_emoji" / "bundle.json").read_text())["files"]
SIZE = f"{round(sum(file['size'] for file in FILES.values()) / 1e6)} MB"
PATIENCE = 120_000  # milliseconds

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium() is None, reason="Chromium is not installed"),
    pytest.mark.skipif(
        not (ROOT / "runtime" / "web" / "dist" / "static").is_dir() or not shutil.which("node"),
        reason="the package in runtime/web is not built",
    ),
]


def build(*arguments):
    return subprocess.run(["node", BUILD, *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def started():
    with browser() as chrome:
        yield chrome


@pytest.fixture
def visit(started):
    """Open a page of a new profile. Errors in its console fail the test."""
    contexts, problems = [], []

    def opened(url, **options):
        context = started.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(url)
        return page

    opened.problems = problems
    yield opened
    for context in contexts:
        context.close()
    assert not problems


def get_the_model(page):
    page.get_by_role("button", name="Get the model").click()
    page.get_by_text("Ready.").wait_for()


def draw(page, prompt):
    page.get_by_label("What should it show?").fill(prompt)
    page.keyboard.press("Enter")
    page.get_by_text("Drawn in").wait_for()


def colors(page):
    """Return how many colors each picture on the page has."""
    return page.locator("#pictures canvas").evaluate_all(
        """canvases => canvases.map(canvas => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return new Set(new Uint32Array(data.buffer)).size;
        })"""
    )


def test_it_draws_isolated_and_then_without_a_network(site, visit, tmp_path):
    with served(site) as url:
        page = visit(url, viewport={"width": 640, "height": 990})
        page.get_by_text(SIZE).wait_for()
        get_the_model(page)
        assert page.evaluate("crossOriginIsolated")
        draw(page, "a red heart")
        assert len(colors(page)) == 4 and min(colors(page)) > 20
        if picture := os.environ.get("SCREENSHOT"):
            page.screenshot(path=picture, full_page=True)
        with page.expect_download() as download:
            page.get_by_role("button", name="Save picture 1").click()
        download.value.save_as(tmp_path / "heart.png")
        assert download.value.suggested_filename.startswith("a-red-heart-")
        with Image.open(tmp_path / "heart.png") as image:
            assert json.loads(image.info["tiue"])["prompt"] == "a red heart"
    # The server is gone.
    page.reload()
    page.get_by_text("Ready.").wait_for()
    page.get_by_role("button", name="a rocket").click()
    page.get_by_text("Drawn in").wait_for()
    assert min(colors(page)) > 20


def test_a_request_is_cancelled_and_an_earlier_one_repeated(site, visit):
    with served(site) as url:
        page = visit(url)
        get_the_model(page)
        draw(page, "a red heart")
        first = page.locator("#pictures canvas").first.evaluate("canvas => canvas.toDataURL()")
        page.get_by_label("What should it show?").fill("a rocket")
        # At once, because the pictures can be quicker than the hand.
        page.evaluate("['draw', 'cancel'].forEach(id => document.getElementById(id).click())")
        page.get_by_text("Cancelled.").wait_for()
        page.get_by_role("button", name="Draw again: a red heart").click()
        page.get_by_text("Drawn in").wait_for()
        assert page.locator("#pictures canvas").first.evaluate("canvas => canvas.toDataURL()") == first


def test_a_server_that_fails_is_named_and_tried_again(site, visit):
    with served(site) as url:
        page = visit(url)
        page.context.route("**/model/vae_decoder.onnx", lambda route: route.fulfill(status=404))
        page.get_by_role("button", name="Get the model").click()
        page.get_by_role("alert").filter(has_text="vae_decoder.onnx: the server answered 404").wait_for()
        visit.problems.clear()  # The browser itself reports the answer.
        page.context.unroute("**/model/vae_decoder.onnx")
        get_the_model(page)
        assert not page.locator("#problem").inner_text()


def test_code_that_does_not_arrive_is_explained(site, visit):
    with served(site) as url:
        page = visit("about:blank")
        page.add_init_script("delete Navigator.prototype.serviceWorker")  # A service worker would keep the code.
        page.route("**/lib/tiue-runtime.js", lambda route: route.fulfill(status=404))
        page.goto(url)
        page.get_by_role("button", name="Get the model").click()
        page.get_by_role("alert").filter(has_text="tiue-runtime.js").wait_for()
        assert page.get_by_role("button", name="Get the model").is_enabled()
        visit.problems.clear()  # The browser itself reports the answer.


def test_a_bundle_without_a_matrix_for_previews_in_a_browser_that_keeps_nothing(visit, tmp_path):
    bundle = shutil.copytree(TINY, tmp_path / "bundle")
    write_bundle(bundle, replace(Bundle.load(bundle).manifest, preview=None))
    assert build(tmp_path / "site", bundle).returncode == 0
    with served(tmp_path / "site") as url:
        page = visit("about:blank")
        page.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('denied'); } })")
        page.goto(url)
        get_the_model(page)
        draw(page, "a red heart")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1100])
def test_everyone_can_use_it(site, visit, scheme, width):
    """axe-core finds nothing, and nothing is wider than the screen, before and after drawing."""
    with served(site) as url:
        page = visit(url, color_scheme=scheme, viewport={"width": width, "height": 800}, reduced_motion="reduce")
        page.get_by_text(SIZE).wait_for()
        check_accessibility(page)
        get_the_model(page)
        draw(page, "a red heart")
        check_accessibility(page)


def check_accessibility(page):
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "expected a directory to write"), (("out", "nowhere"), "nowhere is not a bundle")],
)
def test_mistakes_end_with_one_line(arguments, message):
    done = build(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
