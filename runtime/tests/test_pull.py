"""Pulling bundles: from directories, a web server of this computer, and a Hub of this computer."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiue_runtime import Bundle, BundleError, Pipeline, generate
from tiue_runtime.bundle.find import find_bundle
from tiue_runtime.bundle.pulled import find_pulled, pulled_bundles, store
from tiue_runtime.hub import pull as pulling
from tiue_runtime.hub import pulled_files, sources
from tiue_runtime.hub.pull import pull
from tiue_runtime.hub.pulled_files import remove, unfinished
from tiue_runtime.tools.cli import main

COMMIT = "c" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no setting of the machine."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TIUE_BUNDLE", "TIUE_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TIUE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(sources, "time", SimpleNamespace(sleep=lambda seconds: None))
    return tmp_path / "cache"


class Handler(BaseHTTPRequestHandler):
    """A directory as a web server shows it, and as the Hub shows it. The test sets `server.faults`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        server = self.server
        with server.lock:
            server.seen.append((self.command, self.path, self.headers.get("Range")))
        path = self.path.partition("?")[0]
        found = re.fullmatch(r"/api/models/owner/name(?:/revision/([\w%.-]+))?", path)
        if found:
            return self.model_info(found[1])
        name = re.sub(rf"^/(owner/name/resolve/{COMMIT}|files)/", "", path)
        if path.startswith("/moved/"):
            return self.send(302, b"", Location=server.moved + path.removeprefix("/moved/"))
        file = server.root / name
        if name == path or not file.is_file():
            return self.send(server.missing, b"not found", **{"X-Error-Code": "EntryNotFound"})
        content = server.content.get(name, file.read_bytes())
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        begin = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if begin and server.ranges:
            first = int(begin[1])
            if first >= len(content):
                return self.send(416, b"", **{"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            return self.send(206, content[first:], name, body, **headers)
        return self.send(200, content, name, body, **headers)

    def model_info(self, revision):
        if revision not in (None, "v1", COMMIT):
            return self.send(404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        files = [path for path in self.server.root.rglob("*") if path.is_file()]
        siblings = [{"rfilename": path.name, "size": path.stat().st_size} for path in files]
        content = {"id": "owner/name", "modelId": "owner/name", "sha": COMMIT, "siblings": siblings, "tags": []}
        content |= {"private": False, "downloads": 0, "likes": 0}
        self.send(200, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def send(self, status, content, name="", body=True, **headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if not (body and self.command == "GET"):
            return
        fault = self.server.faults.pop(name, None)
        if fault == "cut":
            content = content[: len(content) // 2]
            self.close_connection = True
        if fault == "slow":
            piece = len(content) // 10 + 1
            for i in range(0, len(content), piece):
                self.wfile.write(content[i : i + piece])
                time.sleep(0.1)
            return
        self.wfile.write(content)


@pytest.fixture
def server(copy):
    """A server of the tiny bundle. `server.url` is the bundle's directory."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.root, server.content, server.faults, server.seen = copy, {}, {}, []
    server.lock, server.ranges, server.moved, server.missing = threading.Lock(), True, "", 404
    server.host = f"http://127.0.0.1:{server.server_port}"
    server.url = f"{server.host}/files/"
    threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(server, monkeypatch):
    """The same server as the Hub."""
    monkeypatch.setenv("HF_ENDPOINT", server.host)
    return server


def fetched(server):
    return [Path(path).name for method, path, _ in server.seen if method == "GET"]


def leftovers(cache):
    return [path for path in (cache / "bundles").rglob("*") if path.is_file() and path.suffix != ".lock"]


def nothing_was_pulled():
    return not pulled_bundles() and not list((store() / "contents").glob("*"))


def test_a_pulled_directory_is_found_by_name_and_draws_the_same_picture(copy, pipe):
    record = pull(str(copy))
    assert record.name == "tiny" and find_bundle("tiny") == record.directory
    shutil.rmtree(copy)  # It is a copy.
    picture = generate("a red heart", bundle="tiny", seed=1, device="cpu")[0]
    assert picture.tobytes() == pipe("a red heart", seed=1).images[0].tobytes()


def test_only_listed_files_are_taken_and_none_is_a_link(copy, tmp_path):
    (copy / "secret.txt").write_text("not in bundle.json")
    shutil.move(copy / "README.md", tmp_path / "card")
    (copy / "README.md").symlink_to(tmp_path / "card")
    directory = pull(str(copy)).directory
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert not any(path.is_symlink() for path in files)
    assert {path.name for path in files} == {*Pipeline.load(directory).bundle.manifest.files, "bundle.json"}


def test_a_bundle_comes_from_a_url(server, cache):
    record = pull(server.url)
    assert record.name == "tiny" and record.source == server.url
    Pipeline.load("tiny").bundle.verify()
    assert {path.parent.name for path in leftovers(cache)} == {"names", record.content}
    assert pull(f"{server.url}bundle.json?x=1#y", name="again").content == record.content


def test_a_bundle_comes_from_the_hub(hub, cache):
    record = pull("owner/name")
    assert (record.name, record.commit) == ("owner/name", COMMIT)
    Pipeline.load("owner/name").bundle.verify()
    assert {path.parent.name for path in leftovers(cache)} == {"names", record.content}
    assert not [path for path in record.directory.rglob("*") if path.is_symlink() or path.name.startswith(".")]
    assert pull("owner/name@v1").name == "owner/name@v1" and "owner/name@v1" in pulled_bundles()
    assert pull(f"{hub.host}/owner/name/tree/v1").name == "owner/name@v1"


@pytest.mark.parametrize(
    "source, message",
    [
        ("owner/name@nope", r"on the Hub has no revision nope"),
        ("owner/other", r"owner/other.*(Hub|fetched)"),
    ],
)
def test_what_the_hub_lacks_is_said_in_one_line(hub, source, message):
    with pytest.raises(BundleError, match=message):
        pull(source)
    assert nothing_was_pulled()


def test_a_repository_that_is_no_bundle_is_refused(hub):
    (hub.root / "bundle.json").unlink()
    with pytest.raises(BundleError, match=r"owner/name on the Hub is no bundle: expected a file bundle\.json"):
        pull("owner/name")


@pytest.mark.parametrize("name", ["unet_decoder.onnx", "tokenizer.json", "README.md"])
@pytest.mark.parametrize("place", ["url", "hub"])
def test_a_file_that_differs_from_bundle_json_is_refused(hub, place, name):
    content = (hub.root / name).read_bytes()
    hub.content[name] = bytes([content[0] ^ 1]) + content[1:]
    with pytest.raises(BundleError, match=rf"{re.escape(name)} differs from its sha256 or size in bundle\.json"):
        pull(hub.url if place == "url" else "owner/name")
    assert nothing_was_pulled()
    hub.content.clear()
    Pipeline.load(pull(hub.url if place == "url" else "owner/name").name).bundle.verify()


@pytest.mark.parametrize("extra", [b"more", None])
def test_a_file_of_another_size_is_refused(server, extra):
    content = (server.root / "README.md").read_bytes()
    server.content["README.md"] = content + extra if extra else content[:-1]
    with pytest.raises(BundleError, match=r"README\.md"):
        pull(server.url)
    assert nothing_was_pulled()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "C:\\x", ".."])
def test_names_that_leave_the_bundle_are_refused_before_anything_is_fetched(server, edit, name, tmp_path):
    server.root = edit(lambda content: content["files"].update({name: {"sha256": "0" * 64, "size": 1}}))
    with pytest.raises(BundleError, match="files"):
        pull(server.url)
    assert fetched(server) == ["bundle.json", "model.sig"] and nothing_was_pulled()


def test_a_manifest_without_an_end_is_refused(server, monkeypatch):
    monkeypatch.setattr(sources, "MANIFEST_LIMIT", 100)
    with pytest.raises(BundleError, match="expected at most 100 bytes"):
        pull(server.url)


def test_a_cut_download_continues_where_it_was(server):
    server.faults = {"unet_decoder.onnx": "cut", "bundle.json": "cut"}
    pull(server.url)
    ranges = [asked for _, path, asked in server.seen if path.endswith("unet_decoder.onnx")]
    half = (server.root / "unet_decoder.onnx").stat().st_size // 2
    assert ranges == [None, f"bytes={half}-"]


def test_a_server_without_ranges_sends_the_file_again(server):
    server.ranges, server.faults["unet_decoder.onnx"] = False, "cut"
    pull(server.url)
    Pipeline.load("tiny").bundle.verify()


def test_a_damaged_part_is_fetched_again_from_its_beginning(server):
    name = "unet_decoder.onnx"
    sha = json.loads((server.root / "bundle.json").read_text())["files"][name]["sha256"]
    part = pulled_files.begin(server.url).with_name("parts") / sha
    part.parent.mkdir()
    part.write_bytes(b"damaged")
    pull(server.url)
    assert [asked for _, path, asked in server.seen if path.endswith(name)] == ["bytes=7-", None]


def test_a_new_version_fetches_only_what_changed_and_replaces_the_old_one(server, edit):
    old = pull(server.url)
    server.seen.clear()
    card = b"another card\n"
    (server.root / "README.md").write_bytes(card)
    server.root = edit(
        lambda c: c["files"].update({"README.md": {"sha256": hashlib.sha256(card).hexdigest(), "size": len(card)}})
    )
    new = pull(server.url)
    assert fetched(server) == ["bundle.json", "model.sig", "README.md"]
    assert (new.directory / "README.md").read_bytes() == card and new.content != old.content
    assert [path.name for path in (store() / "contents").iterdir()] == [new.content]


def test_pulling_again_fetches_nothing_and_repairs_damage(server):
    record = pull(server.url)
    server.seen.clear()
    assert pull(server.url) == record and fetched(server) == ["bundle.json", "model.sig"]
    (record.directory / "README.md").write_bytes(b"damaged")
    server.seen.clear()
    pull(server.url)
    assert fetched(server) == ["bundle.json", "model.sig", "README.md"]
    Pipeline.load("tiny").bundle.verify()


@pytest.mark.parametrize(
    "target, message",
    [
        ("http://example.com/", "expected https"),
        ("file:///etc/", "302|begins with https"),
        ("https://u:p@e.org/", "password"),
    ],
)
def test_redirects_lead_only_to_places_that_a_user_could_name(server, target, message):
    server.moved = target
    with pytest.raises(BundleError, match=message):
        pull(f"{server.host}/moved/")


def test_redirects_are_followed_and_end(server):
    server.moved = server.url
    assert pull(f"{server.host}/moved/").name == "tiny"
    server.moved = f"{server.host}/moved/"
    with pytest.raises(BundleError, match=r"cannot be fetched|the server answered"):
        pull(f"{server.host}/moved/x/")


@pytest.mark.parametrize(
    "source, message",
    [
        ("", "expected OWNER/NAME"),
        ("name", "expected OWNER/NAME"),
        ("a/../b", "expected"),
        ("./none", r"expected a directory with a bundle\.json"),
        ("http://example.org/x", "expected https"),
        ("ftp://example.org/x", "begins with https://"),
        ("https://user:secret@example.org/x", "without a user name or password"),
        ("https://example.org/x.zip", "an archive"),
        ("https://[/", "is no URL"),
        ("file://[/", "is no URL"),
        ("~a-user-who-does-not-exist/x", "expected OWNER/NAME"),
    ],
)
def test_sources_that_cannot_be_are_refused_without_the_network(source, message):
    with pytest.raises(BundleError, match=message) as caught:
        pull(source)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", None])
def test_offline_refuses_with_the_remedy_and_returns_what_is_there(hub, monkeypatch, variable):
    if variable:
        monkeypatch.setenv(variable, "1")
    offline = partial(pull, offline=variable is None)
    with pytest.raises(
        BundleError, match=r"cannot be pulled offline: unset HF_HUB_OFFLINE.*or pull it from a directory"
    ):
        offline("owner/name")
    assert not hub.seen
    assert offline(str(hub.root)).name == "tiny"
    monkeypatch.delenv(variable or "none", raising=False)
    record = pull("owner/name")
    hub.seen.clear()
    monkeypatch.setenv(variable or "none", "1")
    assert offline("owner/name") == record and not hub.seen


def test_without_a_network_the_error_is_one_line(server, monkeypatch):
    server.shutdown()
    server.server_close()
    with pytest.raises(BundleError, match=r"bundle\.json cannot be fetched: .*Pull again to continue"):
        pull(server.url)


def test_loading_never_downloads_and_says_how_to_pull(hub):
    with pytest.raises(BundleError, match=r"tiue-runtime pull owner/name$"):
        Pipeline.load("owner/name")
    assert not hub.seen


def test_names_are_not_taken_from_other_bundles(copy, tmp_path, monkeypatch):
    pull(str(copy), name="mine")
    other = shutil.copytree(copy, tmp_path / "other")
    with pytest.raises(BundleError, match=r"name: mine was pulled from .*copy: remove it first"):
        pull(str(other), name="mine")
    monkeypatch.setattr(pulling, "installed_bundles", lambda: {"emoji": "package"})
    with pytest.raises(BundleError, match="name: emoji is the name of an installed bundle"):
        pull(str(other), name="emoji")
    for name in ("../x", "a/b/c", "", ".x", "x" * 300):
        with pytest.raises(BundleError, match="name: expected"):
            pull(str(other), name=name)


def test_two_names_share_the_files_and_removing_one_keeps_them(copy):
    first, second = pull(str(copy), name="one"), pull(str(copy), name="two/b")
    assert first.directory == second.directory
    remove("one")
    Pipeline.load("two/b").bundle.verify()
    assert remove("two/b") > 1000
    assert not first.directory.exists() and nothing_was_pulled()
    with pytest.raises(BundleError, match=r"there is no pulled bundle 'one' \(pulled: none\)"):
        remove("one")


def test_a_bundle_that_is_removed_or_replaced_while_in_use_gives_its_pictures_or_a_clear_error(copy, pipe):
    pull(str(copy))
    loaded, low = Pipeline.load("tiny", device="cpu"), Pipeline.load("tiny", device="cpu", memory="low")
    expected = pipe("a red heart", seed=1).images[0].tobytes()
    assert low("a red heart", seed=1).images[0].tobytes() == expected
    remove("tiny")
    assert loaded("a red heart", seed=1).images[0].tobytes() == expected
    with pytest.raises(BundleError, match="missing"):
        low("a red heart", seed=1)
    pull(str(copy))
    assert generate("a red heart", bundle="tiny", seed=1, device="cpu")[0].tobytes() == expected
    record = find_pulled("tiny")
    shutil.rmtree(record.directory)
    with pytest.raises(BundleError, match="is not a bundle"):
        Pipeline.load("tiny")


def test_a_bundle_that_is_replaced_while_in_use_is_kept_by_pipelines_and_renewed_by_generate(copy, edit):
    pull(str(copy))
    loaded = Pipeline.load("tiny", device="cpu")
    before = loaded("a red heart", seed=1).images[0].tobytes()
    assert generate("a red heart", bundle="tiny", seed=1, device="cpu")[0].tobytes() == before

    def halve(content):
        for schedule in content["schedules"].values():
            schedule["noise_weight"] /= 2

    edit(halve)
    pull(str(copy))
    assert loaded("a red heart", seed=1).images[0].tobytes() == before
    assert generate("a red heart", bundle="tiny", seed=1, device="cpu")[0].tobytes() != before


def command(*arguments):
    return [sys.executable, "-m", "tiue_runtime", *map(str, arguments)]


@pytest.mark.parametrize("place", ["url", "hub"])
def test_kill_at_any_moment_leaves_no_bundle_and_the_next_pull_completes(hub, place):
    """Each file in turn arrives slowly, and the process dies in the middle of it."""
    server, source = hub, hub.url if place == "url" else "owner/name"
    names = json.loads((server.root / "bundle.json").read_text())["files"]
    for name in names:
        server.faults = {name: "slow"}
        process = subprocess.Popen(command("pull", source), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not any(path.endswith(name) for _, path, _ in list(server.seen)) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        server.seen.clear()
        assert nothing_was_pulled() and list(unfinished()) == [source]
        with pytest.raises(BundleError):
            find_bundle("tiny" if place == "url" else source)
    server.faults = {}
    Pipeline.load(pull(source).name).bundle.verify()
    assert not unfinished()


DIES = """
import os, sys, pathlib, shutil
count = int(sys.argv[1])
def dying(function):
    def call(*arguments, **named):
        global count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), 9)
        return function(*arguments, **named)
    return call
from tiue_runtime.hub.pull import pull
import tiue_runtime.hub.pulled_files, filelock
for name in ("mkdir", "rename", "replace", "unlink", "write_bytes"):
    setattr(pathlib.Path, name, dying(getattr(pathlib.Path, name)))
os.fsync = dying(os.fsync)
shutil.copyfileobj, shutil.rmtree = dying(shutil.copyfileobj), dying(shutil.rmtree)
pull(sys.argv[2])
print("done")
"""


def test_kill_before_every_single_step_leaves_the_old_bundle_or_the_new_one(copy, edit, tmp_path):
    old = pull(str(copy))
    shutil.copytree(tmp_path / "cache", tmp_path / "before")
    card = b"another card\n"
    (copy / "README.md").write_bytes(card)
    edit(lambda c: c["files"].update({"README.md": {"sha256": hashlib.sha256(card).hexdigest(), "size": len(card)}}))
    seen, step = set(), 0
    for step in range(0, 200, 3):
        shutil.rmtree(tmp_path / "cache")
        shutil.copytree(tmp_path / "before", tmp_path / "cache")
        done = subprocess.run([sys.executable, "-c", DIES, str(step), str(copy)], capture_output=True, text=True)
        bundle = Pipeline.load("tiny").bundle  # One of the two is always there, and whole.
        bundle.verify()
        assert len(pulled_bundles()) == 1
        seen.add(bundle.directory.name)
        pull(str(copy))
        assert (find_bundle("tiny") / "README.md").read_bytes() == card
        assert len(list((store() / "contents").iterdir())) == 1
        assert not unfinished() and not list((store() / "trash").glob("*"))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout == "done\n" and len(seen) == 2 and old.content in seen


def test_two_processes_at_once_download_once(server):
    server.faults = {"unet_decoder.onnx": "slow"}
    processes = [subprocess.Popen(command("pull", server.url), stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0] and len(set(said)) == 1
    assert fetched(server).count("unet_decoder.onnx") == 1
    Pipeline.load("tiny").bundle.verify()


def test_pulling_and_removing_at_once_never_shows_half_a_bundle(copy):
    wrong = []

    def work(change):
        for _ in range(15):
            try:
                change()
            except BundleError as error:
                if not re.search("no pulled bundle|pull again|being pulled", str(error)):
                    wrong.append(error)
            try:
                Pipeline.load("tiny")
            except BundleError as error:
                if not re.search(
                    "neither|is not a bundle|is missing|changed on disk|No such file|NO_SUCHFILE|doesn't exist",
                    str(error),
                ):
                    wrong.append(error)

    changes = [partial(pull, str(copy)), partial(remove, "tiny"), partial(pull, str(copy)), partial(remove, "tiny")]
    threads = [threading.Thread(target=work, args=(change,)) for change in changes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, "\n".join(map(str, wrong))
    pull(str(copy))
    Pipeline.load("tiny").bundle.verify()


@pytest.mark.parametrize("full", ["copyfileobj", "write"])
def test_a_full_disk_is_one_line_and_the_next_pull_completes(server, monkeypatch, full):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    if full == "copyfileobj":
        monkeypatch.setattr(shutil, "copyfileobj", fail)
    else:
        monkeypatch.setattr(sources.UrlSource, "_continued", fail)
    with pytest.raises(BundleError, match=r"cannot be written: No space left on device.*TIUE_CACHE"):
        pull(str(server.root) if full == "copyfileobj" else server.url)
    assert nothing_was_pulled()
    monkeypatch.undo()


def in_mount(options, cache, *arguments):
    """Run a command with a file system of its own as the cache."""
    cache.mkdir(exist_ok=True)
    script = f'mount -t tmpfs {options} none "$1" && shift && exec "$@"'
    line = ["unshare", "--mount", "sh", "-c", script, "sh", cache, *command(*arguments)]
    return subprocess.run(line, capture_output=True, text=True)


def can_mount():
    return (
        shutil.which("unshare") and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not can_mount(), reason="a file system of its own needs root")
@pytest.mark.parametrize("options, message", [("-o size=16k", "No space left"), ("-o ro", "Read-only file system")])
def test_a_full_or_read_only_file_system_is_one_line(copy, cache, options, message):
    done = in_mount(options, cache, "pull", copy)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr and "TIUE_CACHE" in done.stderr
    assert in_mount("-o size=10m", cache, "pull", copy).returncode == 0


@pytest.mark.parametrize("damage", ["missing", "longer", "pipe", "bytes"])
def test_a_damaged_directory_is_said_to_be_the_sources_fault(copy, damage):
    path = copy / "README.md"
    content = path.read_bytes()
    path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    elif damage != "missing":
        path.write_bytes(content + b"x" if damage == "longer" else content[:-1] + b"x")
    with pytest.raises(BundleError, match=r"README\.md") as caught:
        pull(str(copy))
    assert "cache" not in str(caught.value).replace(str(store()), "") and nothing_was_pulled()


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_server_may_refuse_the_signature_that_it_lacks(server, status):
    server.missing = status
    assert pull(server.url).name == "tiny"


def test_too_small_a_disk_is_said_before_anything_is_fetched(server, monkeypatch):
    monkeypatch.setattr(pulling.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 990, 10))
    with pytest.raises(
        BundleError, match=r"the bundle needs .* MB, and .* has 0 MB: free some space, or set TIUE_CACHE"
    ):
        pull(server.url)
    assert fetched(server) == ["bundle.json", "model.sig"]


def test_a_pull_that_continues_needs_no_space_for_the_parts_that_are_there(server, monkeypatch):
    data = (server.root / "unet_decoder.onnx").read_bytes()
    part = pulled_files.begin(server.url).with_name("parts") / hashlib.sha256(data).hexdigest()
    part.parent.mkdir()
    part.write_bytes(data[:-1])
    free = Bundle.load(server.root).manifest.size - len(data) + 1
    monkeypatch.setattr(pulling.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    assert pull(server.url).name == "tiny"


def test_a_cache_that_cannot_be_written_is_one_line_and_loading_needs_none(copy, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", "/proc/none"):
        monkeypatch.setenv("TIUE_CACHE", str(place))
        with pytest.raises(BundleError, match=r"the cache of bundles cannot be written: .*TIUE_CACHE"):
            pull(str(copy))
        assert main(["list"]) == 0
        Pipeline.load(copy)
        with pytest.raises(BundleError, match="neither"):
            find_bundle("nothing")


def test_without_a_home_the_remedy_is_named_and_bundles_load(copy, monkeypatch, capsys):
    monkeypatch.delenv("TIUE_CACHE")
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert main(["pull", str(copy)]) == 2
    assert "set TIUE_CACHE to a directory" in capsys.readouterr().err
    Pipeline.load(copy)
    with pytest.raises(BundleError, match="neither"):
        find_bundle("nothing")
    assert main(["list"]) == 0


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"name": 1}', b"\xff", b'{"content": "../../etc"}', b"[" * 60_000]
)
def test_a_damaged_record_stands_for_no_bundle_and_deletes_none(copy, content):
    record = pull(str(copy))
    (store() / "names" / "damaged.json").write_bytes(content)
    assert list(pulled_bundles()) == ["tiny"] and find_pulled("damaged") is None
    pull(str(copy), name="other")
    assert record.directory.is_dir()


def test_commands_pull_list_and_remove(copy, capsys, server):
    assert main(["pull", str(copy), "--name", "owner/small"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("owner/small  ") and said.err == ""
    pulled_files.begin(server.url)
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("owner/small ") and f"pulled from {copy}" in line for line in lines)
    assert any(line.startswith(server.url) and "unfinished" in line for line in lines)
    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["owner/small"]["bytes"] == sum(
        path.stat().st_size for path in copy.iterdir() if path.name != "bundle.json"
    )
    assert main(["remove", "owner/small"]) == 0 and main(["remove", server.url]) == 0
    assert main(["remove", "owner/small"]) == 2
    assert "there is no pulled bundle 'owner/small'" in capsys.readouterr().err
    assert not unfinished()


def test_the_cache_is_where_the_platform_keeps_caches(monkeypatch):
    platformdirs = pytest.importorskip("platformdirs")
    from tiue_runtime.bundle.pulled import cache_root

    monkeypatch.delenv("TIUE_CACHE")
    assert cache_root() == Path(platformdirs.user_cache_dir("tiue", appauthor=False))
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    if sys.platform.startswith("linux"):
        assert os.fspath(cache_root()) == platformdirs.user_cache_dir("tiue", appauthor=False) == "/elsewhere/tiue"
