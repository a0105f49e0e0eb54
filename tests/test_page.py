"""The server's page in headless Chromium, as people use it: make test-browser."""

import base64
import functools
import io
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from tiue_runtime import Pipeline, read_record

pytest.importorskip("playwright.sync_api", reason="playwright is missing")
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
AXE = ROOT / "build/browser/node_modules/axe-core/axe.min.js"
CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
PATIENCE = 60  # seconds
SIZES = {"wide": (1200, 860), "phone": (390, 844)}

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="chromium is missing")]


@contextmanager
def serving(*flags):
    """Run a server on a free port. Yields its address and its process."""
    command = [sys.executable, "-m", "tiue_runtime", "serve", "--port", "0", "--device", "cpu", "--bundle", "emoji"]
    server = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found, server.stderr.read()
        yield found[0], server
    finally:
        server.terminate()
        server.communicate()


@pytest.fixture(scope="module")
def address():
    with serving() as (address, _):
        yield address


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pipe():
    with Pipeline.load("emoji", device="cpu") as pipe:
        yield pipe


@pytest.fixture
def open_page(chromium):
    """open_page(address, **options of a browser's context) => a page. No error may appear in its console."""
    contexts, problems = [], []

    def opened(address, size="wide", expect_errors=False, **options):
        width, height = SIZES[size]
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        if not expect_errors:
            page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def page(open_page, address):
    page = open_page(address)
    page.wait_for_selector("#counts input")
    return page


def draw(page, prompt="a red heart", count=1, seed="5"):
    page.fill("#prompt", prompt)
    page.fill("#seed", seed)
    page.locator(f'#counts input[value="{count}"]').check(force=True)
    page.click("#draw")
    idle(page)


def until(page, expression):
    """Wait until an expression is true. Playwright's own way needs eval, which the page forbids."""
    limit = time.monotonic() + PATIENCE
    while not page.evaluate(expression):
        assert time.monotonic() < limit, expression
        page.wait_for_timeout(20)


def idle(page):
    until(page, "document.querySelector('#draw').textContent === 'Draw' && !document.querySelector('.plate')")


def notice(page):
    until(page, "document.querySelector('#notice').textContent")
    return page.text_content("#notice")


def newest(page):
    """Return the file of the picture that the store got last."""
    data = page.evaluate(
        """async () => {
            const { listKept } = await import(new URL("page/store.js", document.baseURI));
            const [picture] = await listKept(1);
            const bytes = new Uint8Array(await picture.blob.arrayBuffer());
            return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
        }"""
    )
    return base64.b64decode(data)


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB").tobytes()


def drop(page, data, name="heart.png"):
    """Drag a file over the page and drop it, by the events of a browser."""
    page.evaluate(
        """([data, name]) => {
            const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], name));
            for (const type of ["dragenter", "dragover", "drop"]) {
                document.body.dispatchEvent(new DragEvent(type, { dataTransfer, bubbles: true, cancelable: true }));
            }
        }""",
        [base64.b64encode(data).decode(), name],
    )


def saved(pipe, tmp_path, **options):
    """Return a file as the library writes it. The page asks for previews, so it draws the timesteps one by one."""
    pipe("a sunflower", memory="sequential", **options).images[0].save(tmp_path / "flower.png")
    return (tmp_path / "flower.png").read_bytes()


def test_pictures_are_those_of_the_library_and_previews_come_first(page, pipe, tmp_path):
    page.evaluate(
        """() => {
            window.seen = new Set();
            const look = () => document.querySelectorAll(".plate img").forEach((image) => window.seen.add(image.src));
            new MutationObserver(look).observe(document.body, { childList: true, subtree: true });
        }"""
    )
    draw(page, count=2)
    assert page.evaluate("window.seen.size") >= 2
    assert page.locator("#gallery li").count() == 2 and page.text_content("#gallery-count") == "2 pictures"
    assert page.text_content("#status") == "2 pictures are finished."
    data = newest(page)
    assert pixels(data) == pipe("a red heart", seed=6, memory="sequential").images[0].tobytes()
    (tmp_path / "heart.png").write_bytes(data)
    assert read_record(tmp_path / "heart.png").seed == 6


def test_the_gallery_outlives_the_page_and_forgets_what_it_is_told_to(page):
    draw(page, count=2)
    page.reload()
    page.wait_for_selector("#gallery li")
    assert page.locator("#gallery li").count() == 2
    page.locator("#gallery button").first.click()
    page.click("#viewer-delete")
    until(page, "document.querySelectorAll('#gallery li').length === 1")
    assert page.evaluate("document.activeElement.closest('#gallery') !== null")
    page.click("#clear")
    page.click("#confirm button[value=no]")
    assert page.locator("#gallery li").count() == 1
    page.click("#clear")
    page.click("#confirm button[value=yes]")
    page.wait_for_selector("#empty", state="visible")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.reload()
    page.wait_for_selector("#empty", state="visible")
    draw(page)
    page.click("#clear")
    page.click("#confirm button[value=yes]")
    page.wait_for_selector("#empty", state="visible")
    draw(page)
    page.click("#clear")
    page.keyboard.press("Escape")  # The answer of the last time was yes.
    page.reload()
    page.wait_for_selector("#gallery li")


def test_older_pictures_are_shown_on_request(page):
    page.evaluate(
        """async () => {
            const { keep } = await import(new URL("page/store.js", document.baseURI));
            const blob = new Blob(["x"], { type: "image/png" });
            const facts = { prompt: "old", size: "64x64", steps: null, model: "emoji", made: 0 };
            for (let seed = 0; seed < 100; seed += 1) await keep({ blob, seed: String(seed), ...facts });
        }"""
    )
    page.reload()
    until(page, "document.querySelectorAll('#gallery li').length === 48")
    assert page.text_content("#gallery-count") == "100 pictures"
    page.evaluate("['first', 'second'].forEach(() => document.querySelector('#more').click())")
    until(page, "document.querySelectorAll('#gallery li').length === 96")
    page.focus("#more")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('#gallery li').length === 100")
    until(page, "document.querySelector('#more').hidden")
    assert page.evaluate("document.activeElement.closest('#gallery') !== null")
    assert page.locator("#gallery .seed").last.text_content() == "seed 0"


def test_a_file_is_drawn_again_when_it_is_dropped_or_chosen(page, pipe, tmp_path):
    seed = 2**64 - 3  # JavaScript's numbers would round it.
    data = saved(pipe, tmp_path, seed=seed)
    drop(page, data)
    page.wait_for_selector("#gallery li button")
    idle(page)
    assert pixels(newest(page)) == pixels(data) and page.text_content("#gallery .seed") == f"seed {seed}"
    assert page.input_value("#prompt") == "a sunflower" and page.input_value("#seed") == str(seed)
    page.set_input_files("#file", tmp_path / "flower.png")
    until(page, "document.querySelectorAll('#gallery li button').length === 2")
    page.locator("#gallery button").first.click()
    page.click("#viewer-repeat")
    until(page, "document.querySelectorAll('#gallery li button').length === 3")
    assert pixels(newest(page)) == pixels(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"hello", "This is no PNG picture."),
        (lambda data: b"", "This is no PNG picture."),
        (lambda data: data[:40], "The picture does not say how it was made"),
        (lambda data: data[:100] + b"\xff" * 60, "damaged"),
        (lambda data: data.replace(b'"bundle": "emoji"', b'"bundle": "other"'), "made with the model other"),
        (lambda data: data.replace(b'"format": 1', b'"format": 9'), "a newer version wrote it"),
        (lambda data: data.replace(b'"seed": ', b'"feed": '), "from noise that no file holds"),
        (lambda data: data.replace(b'"prompt": ', b'"prompp": '), "from text embeddings"),
        (lambda data: data.replace(b'{"format"', b'["format"'), "The record in the picture is damaged."),
    ],
)
def test_a_foreign_or_damaged_file_is_refused_with_a_message(page, pipe, tmp_path, change, message):
    drop(page, change(saved(pipe, tmp_path, seed=5)))
    assert message in notice(page)
    assert page.locator("#gallery li").count() == 0
    draw(page)
    assert page.text_content("#notice") == ""


def test_a_downloaded_file_has_its_record(page, tmp_path):
    draw(page)
    page.locator("#gallery button").first.click()
    with page.expect_download() as download:
        page.click("#viewer-download")
    assert download.value.suggested_filename == "a-red-heart-5.png"
    download.value.save_as(tmp_path / "heart.png")
    assert read_record(tmp_path / "heart.png").prompt == "a red heart"


def problems(page):
    """Return what axe-core finds."""
    assert AXE.is_file(), "axe-core is missing: make test-browser installs it"
    page.evaluate(AXE.read_text(encoding="utf-8"))
    page.wait_for_timeout(500)  # Colors that fade in would be measured.
    found = page.evaluate("axe.run(document).then((result) => result.violations)")
    return [(problem["id"], problem["nodes"][0]["html"][:200]) for problem in found]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(open_page, address, theme, size):
    page = open_page(address, size, color_scheme=theme, bypass_csp=True)
    page.wait_for_selector("#counts input")
    assert problems(page) == []
    draw(page, count=2)
    draw(page, prompt="")
    assert problems(page) == []
    page.locator("#gallery button").first.click()
    assert problems(page) == []
    page.click("#viewer-close")
    page.click("#clear")
    assert problems(page) == []


def test_axe_finds_nothing_while_a_picture_is_drawn(open_page, address):
    page = open_page(address, bypass_csp=True)
    page.route("**/generations", lambda route: None)  # It is never answered.
    page.fill("#prompt", "a red heart")
    page.click("#draw")
    page.wait_for_selector(".plate")
    assert problems(page) == []


def test_everything_works_by_the_keyboard(page):
    page.keyboard.type("a red heart")  # The prompt has the focus.
    page.keyboard.press("Enter")
    page.wait_for_selector("#gallery button")
    idle(page)
    focused = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        focused.add(page.evaluate("document.activeElement.id || document.activeElement.parentElement.tagName"))
        if page.evaluate("document.activeElement.closest('#gallery') !== null"):
            break
    assert {"LABEL", "size", "seed", "draw", "file", "clear"} <= focused
    page.keyboard.press("Enter")
    assert page.is_visible("#viewer") and page.evaluate("document.activeElement.id") == "viewer-download"
    page.keyboard.press("Escape")
    assert not page.is_visible("#viewer")
    assert page.evaluate("document.activeElement.closest('#gallery') !== null")


def test_cancel_and_escape_end_the_drawing(page):
    page.route("**/generations", lambda route: None)  # It is never answered.
    for cancel in (lambda: page.click("#draw"), lambda: page.keyboard.press("Escape")):
        page.fill("#prompt", "a red heart")
        page.click("#draw")
        page.wait_for_selector(".plate")
        assert page.text_content("#draw") == "Cancel"
        cancel()
        idle(page)
        assert page.text_content("#status") == "The drawing was cancelled." and not page.text_content("#notice")
    page.unroute("**/generations")
    draw(page)
    assert page.locator("#gallery li").count() == 1


def press(page, **event):
    """Send a key to the prompt, with facts of its event that a keyboard cannot be told to give."""
    page.evaluate(
        """(event) => document.querySelector("#prompt").dispatchEvent(
            new KeyboardEvent("keydown", { bubbles: true, cancelable: true, ...event }))""",
        event,
    )


def test_keys_of_an_input_method_neither_draw_nor_cancel(page):
    page.route("**/generations", lambda route: None)  # It is never answered.
    page.fill("#prompt", "a red heart")
    for facts in ({"isComposing": True}, {"keyCode": 229}):
        press(page, key="Enter", **facts)
        assert page.locator(".plate").count() == 0
    press(page, key="Enter")
    page.wait_for_selector(".plate")
    for facts in ({"isComposing": True}, {"keyCode": 229}):
        press(page, key="Escape", **facts)
        assert page.text_content("#draw") == "Cancel"
    press(page, key="Escape")
    idle(page)


def test_a_double_click_or_two_keys_draw_once(open_page, address):
    page = open_page("about:blank", expect_errors=True)
    page.route("**/v1/models", lambda route: route.abort())
    page.goto(address)
    assert "cannot be reached" in notice(page)
    page.unroute("**/v1/models")
    page.fill("#prompt", "a red heart")
    page.evaluate("['first', 'second'].forEach(() => document.querySelector('#composer').requestSubmit())")
    page.wait_for_selector("#gallery button")
    idle(page)
    assert page.locator("#gallery li").count() == 1
    page.dblclick("#draw")
    idle(page)
    assert page.locator("#gallery li").count() == 2 and page.text_content("#notice") == ""


MODEL = {"license": "unknown", "steps": [1], "default_steps": 1, "examples": [], "device": "cpu", "most_pictures": 10}


def test_the_last_choice_of_a_model_counts_and_other_choices_stay(open_page, address):
    page = open_page("about:blank", expect_errors=True)
    asked, held = [], []

    def models(route):
        name = route.request.url.rpartition("/")[2]
        if name == "models":
            content = {"data": [{"id": name} for name in ("one", "slow", "quick", "gone")]}
        else:
            content = {"tiue": {**MODEL, "sizes": ["64x64", "64x32" if name == "one" else "32x64"]}}
        fulfill = functools.partial(route.fulfill, status=404 if name == "gone" else 200, json=content)
        held.append(fulfill) if name == "slow" else fulfill()

    page.route("**/v1/models**", models)
    page.route("**/generations", lambda route: (asked.append(route.request.post_data_json), route.abort()))
    page.goto(address)
    page.wait_for_selector("#counts input")
    page.select_option("#size", "64x32")
    page.locator('#counts input[value="4"]').check(force=True)
    page.select_option("#model-choice", "slow")
    page.select_option("#model-choice", "quick")
    until(page, "document.querySelector('#size').lastElementChild.value === '32x64'")
    assert page.input_value("#size") == "64x64"
    while not held:
        page.wait_for_timeout(10)
    held[0]()
    page.select_option("#model-choice", "gone")
    assert "status 404" in notice(page)
    until(page, "document.querySelector('#model-choice').value === 'quick'")
    page.fill("#prompt", "a red heart")
    page.click("#draw")
    while not asked:
        page.wait_for_timeout(10)
    assert [(wish["model"], wish["n"]) for wish in asked] == [("quick", 4)]


def test_a_picture_that_the_full_storage_gives_up_at_last_is_not_called_kept(page):
    page.evaluate(
        """() => {
            const add = IDBObjectStore.prototype.add;
            IDBObjectStore.prototype.add = function (picture) {
                const request = add.call(this, picture);
                request.addEventListener("success", () => this.transaction.abort());
                return request;
            };
        }"""
    )
    draw(page, prompt="zorblax")
    said = notice(page)
    assert "does not keep the picture" in said and "knows no word of 'zorblax'" in said
    assert not page.evaluate("document.querySelector('#notice').classList.contains('note')")


def test_an_api_key_is_asked_for_and_kept_in_the_tab(open_page):
    with serving("--api-key", "secret") as (address, _):
        page = open_page(address, expect_errors=True)
        page.wait_for_selector("#key-form")
        page.fill("#key", "\u043a\u043b\u044e\u0447")
        page.click("#key-form button")
        until(page, "document.querySelector('#notice').textContent.includes('no key can have')")
        page.fill("#key", "wrong")
        page.click("#key-form button")
        until(page, "document.querySelector('#notice').textContent.includes('Authorization')")
        until(page, "document.querySelector('#key').value === ''")
        assert "API key" in notice(page) and page.is_visible("#key-form")
        page.fill("#key", "secret")
        page.click("#key-form button")
        page.wait_for_selector("#key-form", state="hidden")
        draw(page)
        assert page.locator("#gallery li").count() == 1 and page.text_content("#notice") == ""
        assert page.evaluate("JSON.stringify(localStorage)").count("secret") == 0
        assert page.evaluate("document.cookie") == ""
        page.reload()
        page.wait_for_selector("#counts input")
        assert not page.is_visible("#key-form")


def answering(status, body, content_type="application/json"):
    return lambda route: route.fulfill(status=status, body=body, content_type=content_type)


ERROR = '{"error": {"message": "32 requests are waiting already; try again in 12 s"}}'


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (answering(429, ERROR), "32 requests are waiting already; try again in 12 s"),
        (answering(500, "<html>"), "The server answered with status 500."),
        (answering(200, f"data: {ERROR}\n\n", "text/event-stream"), "32 requests are waiting already"),
        (answering(200, "", "text/event-stream"), "The connection to the server was lost."),
        (answering(200, "data: {broken\n\n", "text/event-stream"), "The connection to the server was lost."),
        (lambda route: route.abort(), "The server cannot be reached."),
    ],
)
def test_errors_of_the_server_are_shown(open_page, address, answer, message):
    page = open_page(address, expect_errors=True)
    page.wait_for_selector("#counts input")
    page.route("**/generations", answer)
    draw(page)
    assert message in notice(page)
    page.unroute("**/generations")
    draw(page)
    until(page, "document.querySelectorAll('#gallery li').length === 1")  # It may ask first what the server can draw.
    idle(page)
    assert page.text_content("#notice") == ""


def test_a_server_that_ends_in_the_middle_of_a_drawing_is_missed(open_page):
    with serving() as (address, server):
        page = open_page(address, expect_errors=True)
        page.wait_for_selector("#counts input")
        page.fill("#prompt", "a red heart")
        page.locator('#counts input[value="8"]').check(force=True)
        page.click("#draw")
        page.wait_for_selector(".plate img")
        server.kill()
        assert "The connection to the server was lost." in notice(page)
        idle(page)
        page.click("#draw")
        until(page, "document.querySelector('#notice').textContent.includes('cannot be reached')")


def test_wrong_fields_and_unknown_words_are_explained(open_page, address):
    page = open_page(address, expect_errors=True)
    page.wait_for_selector("#counts input")
    draw(page, prompt=" ")
    assert "for example: a red heart" in notice(page)
    for seed in ("-1", "1.5", "x", str(2**64)):
        draw(page, seed=seed)
        assert notice(page).startswith("The seed is a whole number") and page.locator("#gallery li").count() == 0
    draw(page, count=2, seed=str(2**64 - 1))
    assert notice(page) == f"The seed is a whole number from 0 to {2**64 - 2}."
    draw(page, seed=str(2**64 - 1))
    assert page.text_content("#gallery .seed") == f"seed {2**64 - 1}"
    draw(page, prompt="zorblax")
    assert "knows no word of 'zorblax'" in notice(page) and page.locator("#gallery li").count() == 2
    page.fill("#seed", "")
    page.focus("#seed")
    page.keyboard.insert_text(f"  {2**64 - 4}  ")  # Nothing is cut off what is pasted.
    page.click("#draw")
    idle(page)
    assert page.text_content("#gallery .seed") == f"seed {2**64 - 4}"
    page.fill("#prompt", "")
    page.focus("#prompt")
    page.keyboard.insert_text("x" * 4001)
    page.click("#draw")
    until(page, "document.querySelector('#notice').textContent.includes('at most 4,000 characters, got 4,001')")


def test_nothing_runs_but_the_page_s_own_scripts_and_nothing_comes_from_elsewhere(open_page, chromium, address):
    page = open_page(address, expect_errors=True)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    page.wait_for_selector("#counts input")
    draw(page, prompt="<img src=x onerror='window.ran = 1'><script>window.ran = 1</script>")
    page.locator("#gallery button").first.click()
    assert "onerror" in page.text_content("#viewer-prompt")
    assert asked and all(url.startswith((address, "blob:")) for url in asked)
    refused = page.evaluate(
        """() => {
            const inline = document.createElement("script");
            inline.append(document.createTextNode("window.ran = 1"));
            document.body.append(inline);
            const unsafe = [
                () => { document.body.innerHTML = "x"; },
                () => { document.body.setAttribute("onclick", "window.ran = 1"); },
            ];
            return unsafe.every((act) => { try { act(); return false; } catch { return true; } });
        }"""
    )
    assert refused and page.evaluate("window.ran") is None
    files = [path.read_text(encoding="utf-8") for path in (ROOT / "runtime/tiue_runtime/serve/page").glob("*.*")]
    assert len(files) > 8 and not [text for text in files if re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)]


def test_the_theme_is_chosen_and_remembered(page):
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.click("#theme")
    page.click("#theme")
    assert page.text_content("#theme") == "Theme: dark" and page.evaluate(background) != light
    page.reload()
    assert page.text_content("#theme") == "Theme: dark" and page.evaluate(background) != light


def test_the_page_draws_if_the_browser_keeps_nothing(chromium, address):
    context = chromium.new_context()
    context.add_init_script(
        """for (const name of ["localStorage", "sessionStorage", "indexedDB"]) {
            Object.defineProperty(window, name, { get() { throw new DOMException("closed", "SecurityError"); } });
        }"""
    )
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#counts input")
    draw(page)
    assert page.locator("#gallery img").count() == 1 and "does not keep" in notice(page)
    page.click("#theme")
    assert page.text_content("#theme") == "Theme: light"
    context.close()


def test_events_are_read_whatever_way_the_stream_is_cut(page):
    events = page.evaluate(
        """async () => {
            const { readEvents } = await import(new URL("page/api.js", document.baseURI));
            const events = [': quiet', 'event: a\\ndata: {"text": "ü €"}', 'data: [1,\\ndata: 2]', 'data: [DONE]', ''];
            const bytes = new TextEncoder().encode(events.join('\\n\\n'));
            const found = [];
            for (const size of [1, 2, 3, 7, 1000]) {
                const stream = new ReadableStream({ start(controller) {
                    for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
                    controller.close();
                } });
                for await (const event of readEvents(stream)) found.push(event);
            }
            return found;
        }"""
    )
    assert events == [{"text": "ü €"}, [1, 2]] * 5
