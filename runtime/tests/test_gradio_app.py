"""The example with Gradio, started and asked as its page and its client ask. Needs Gradio, which no extra installs."""

import gc
import importlib.util
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tiue_runtime import Bundle, Cancelled, Pipeline, read_record
from tiue_runtime.bundle import write_bundle

APP = Path(__file__).parents[2] / "examples/gradio_app.py"
LONGEST = 60  # lines
LOCAL = re.compile(r"127\.0\.0\.1|localhost|::1")

pytestmark = pytest.mark.filterwarnings("default")  # those of Gradio are not ours


@pytest.fixture
def launched(tiny, tmp_path, monkeypatch):
    """Return a function that starts the application with a bundle, and returns its module and a client."""
    pytest.importorskip("gradio", reason="Gradio is not installed")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    pages = []

    def launch(bundle=tiny):
        from gradio_client import Client

        monkeypatch.setenv("TIUE_BUNDLE", str(bundle))
        spec = importlib.util.spec_from_file_location("gradio_app", APP)
        app = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(app)
        _, url, _ = app.page.launch(prevent_thread_lock=True, quiet=True)
        pages.append(app.page)
        return app, Client(url, verbose=False, analytics_enabled=False, download_files=str(tmp_path))

    yield launch
    for page in pages:
        page.close(verbose=False)
    gc.collect()  # Gradio leaves sockets open. The warnings belong here.


def ask(client, prompt="a red heart", count=1, seed="1"):
    return client.submit(prompt, count, seed, api_name="/draw")


def test_the_file_is_short():
    assert len(APP.read_text().splitlines()) < LONGEST


def test_previews_come_before_the_pictures_of_the_library(launched, pipe):
    _, client = launched()
    *previews, (pictures, said) = list(ask(client, count=2, seed="5"))
    assert len(previews) >= 4 and all(len(shown) == 2 for shown, _ in previews)
    percents = [int(text.removesuffix("%")) for _, text in previews]
    assert percents == sorted(percents)
    assert [picture["caption"] for picture in pictures] == ["seed 5", "seed 6"]
    assert re.fullmatch(r"\d+\.\d\d s on cpu", said)
    for shown, expected in zip(pictures, pipe("a red heart", num_images=2, seed=5).images, strict=True):
        with Image.open(shown["image"]) as image:
            assert image.tobytes() == expected.tobytes()
        assert read_record(shown["image"]).seed == expected.record.seed


def test_no_seed_is_a_new_one(launched):
    _, client = launched()
    seeds = [read_record(list(ask(client, seed=""))[-1][0][0]["image"]).seed for _ in range(2)]
    assert seeds[0] != seeds[1]


def test_a_bundle_without_a_matrix_for_previews_is_drawn_without(launched, copy):
    write_bundle(copy, replace(Bundle.load(copy).manifest, preview=None))
    _, client = launched(copy)
    (only,) = ask(client)
    assert only[0][0]["caption"] == "seed 1"


def test_a_mistake_is_told_in_its_message(launched):
    from gradio_client.exceptions import AppError

    _, client = launched()
    for seed in (str(2**70), "-1", "one"):
        with pytest.raises(AppError, match="seed: expected"):
            ask(client, seed=seed).result()
    assert len(ask(client).result()[0]) == 1


def test_cancelling_ends_the_request(launched, monkeypatch):
    _, client = launched()
    ends, call, going = [], Pipeline.__call__, threading.Event()

    def slow(pipe, *args, callback, **options):
        def watched(progress):
            callback(progress)
            going.wait(0.3)

        try:
            ends.append(call(pipe, *args, callback=watched, **options))
        except Cancelled as error:
            ends.append(error)
            raise

    monkeypatch.setattr(Pipeline, "__call__", slow)
    job = ask(client)
    next(iter(job))
    job.cancel()
    limit = time.monotonic() + 20
    while not ends and time.monotonic() < limit:
        time.sleep(0.05)
    assert [type(end) for end in ends] == [Cancelled]


def test_nothing_looks_beyond_this_machine(launched, monkeypatch):
    import socket

    asked = []
    find, connect = socket.getaddrinfo, socket.socket.connect
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *more, **options: asked.append(host) or find(host, *more, **options)
    )
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address) or connect(self, address))
    _, client = launched()
    list(ask(client))
    assert asked and not [address for address in asked if not LOCAL.search(str(address))]
