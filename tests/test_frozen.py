"""A frozen application draws on a machine without Python, without a network and without a home directory."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
from installed import ROOT, build_wheels, copy_checkout, new_environment
from screens import draw_a_heart, screen, why_no_screen

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the machine without Python is a Linux chroot"),
]
PICTURE = b"\x89PNG"


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A fresh environment with the wheels, their dependencies and PyInstaller: what an application's developer has."""
    place = tmp_path_factory.mktemp("developer")
    build_wheels(copy_checkout(place), "./runtime", "./models/emoji")
    programs = new_environment(place / "env", with_pip=True)
    command = [programs / "python", "-m", "pip", "install", "-q", "--find-links", "dist"]
    packages = ["tiue-runtime[cpu]", "tiue-emoji", f"pyinstaller=={version('pyinstaller')}"]
    subprocess.run([*command, *packages], cwd=place, check=True, env=without_path())
    return programs


def without_path():
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def freeze(programs, place, *flags, program=ROOT / "examples/picture.py"):
    shutil.copyfile(program, place / "hello.py")
    command = [programs / "pyinstaller", "--noconfirm", "--log-level", "WARN", *flags, "hello.py"]
    subprocess.run(command, cwd=place, check=True, env=without_path())
    return place / "dist"


def empty_root(place, application):
    """A directory with the application, the C library, /tmp and nothing else: no Python, no /etc, no /proc."""
    root = place / "root"
    shutil.copytree(application, root / "app", symlinks=True)
    for name in ("tmp", "work"):
        (root / name).mkdir()
    program = next(path for path in (root / "app/hello", root / "app/hello/hello") if path.is_file())
    needed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    libraries = {Path(path) for path in re.findall(r"(/\S+)", needed)}
    folder = next(path.parent for path in libraries if path.name.startswith("libc.so"))
    # PyInstaller leaves the C library to the system, as it must.
    parts = ("libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1", "libresolv.so.2")
    for path in {*libraries, *(folder / name for name in parts)}:
        if path.is_file():
            (root / path.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / path.relative_to("/"))
    return root, f"/{program.relative_to(root)}"


def run_alone(root, program, *arguments):
    """Run in the root, with no environment and no network. Returns the seconds and what it printed."""
    command = [shutil.which("unshare"), "--net", shutil.which("chroot"), root, program, *arguments]
    begun = time.perf_counter()
    done = subprocess.run(command, env={}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - begun, done.stdout


def can_isolate():
    if os.geteuid() or not (shutil.which("unshare") and shutil.which("chroot")):
        return False
    return subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0


@pytest.mark.parametrize("flags", [(), ("--onefile",)], ids=["folder", "file"])
def test_a_frozen_application_draws_on_a_machine_without_python(programs, tmp_path, flags, capsys):
    if not can_isolate():
        pytest.skip("chroot and unshare need root")
    dist = freeze(programs, tmp_path, *flags)
    root, program = empty_root(tmp_path, dist)
    assert not [path for path in root.rglob("*") if re.fullmatch(r"python3?(\.\d+)?", path.name) and path.is_file()]
    times = [run_alone(root, program, "a red heart")[0] for _ in range(3)]
    picture = root / "picture.png"
    assert picture.read_bytes().startswith(PICTURE)
    command = [programs / "python", ROOT / "examples/picture.py", "a red heart"]
    subprocess.run(command, cwd=tmp_path, check=True, env=without_path())
    assert picture.read_bytes() == (tmp_path / "picture.png").read_bytes()
    assert not list(dist.rglob("hf_xet"))  # Nothing here pulls models.
    with capsys.disabled():
        seconds = ", ".join(f"{second:.2f}" for second in times)
        print(f"\n{' '.join(flags) or 'folder'}: {megabytes(dist)} MB; seconds from start to picture: {seconds}")


def megabytes(folder):
    return round(sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6)


PULLING = """
import sys

from tiue_runtime import generate
from tiue_runtime.hub.pull import pull

for source in sys.argv[1:]:
    pulled = pull(source, name=f"pulled-{len(source)}")
    generate("a red heart", seed=1, bundle=pulled.name)[0].save("picture.png")
    print(pulled.source)
"""


class Hub(SimpleHTTPRequestHandler):
    """The default model as a repository of the Hub, OWNER/NAME, and as a directory of a web server."""

    protocol_version = "HTTP/1.1"
    files = ROOT / "models/emoji/tiue_emoji"
    commit = "c" * 40

    def log_message(self, *_):
        pass

    def end_headers(self):
        self.send_header("ETag", f'"{Path(self.path).name}"')
        self.send_header("X-Repo-Commit", self.commit)
        super().end_headers()

    def translate_path(self, path):
        return str(self.files / Path(path).name)

    def do_GET(self):
        if not self.path.startswith("/api/models/"):
            return super().do_GET()
        names = [{"rfilename": path.name, "size": path.stat().st_size} for path in self.files.iterdir()]
        about = {"id": "owner/name", "sha": self.commit, "siblings": names, "tags": [], "downloads": 0, "likes": 0}
        content = json.dumps({**about, "private": False}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        return None


@pytest.mark.parametrize("flags", [(), ("--exclude-module", "hf_xet")], ids=["whole", "without-xet"])
def test_a_frozen_application_pulls_models(programs, tmp_path, flags, capsys):
    (tmp_path / "pulling.py").write_text(PULLING)
    dist = freeze(programs, tmp_path, *flags, program=tmp_path / "pulling.py")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        variables = {"HF_ENDPOINT": host, "TIUE_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)}
        command = [dist / "hello/hello", "owner/name", f"{host}/files/"]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        server.shutdown()
    assert done.stdout.split() == ["owner/name", f"{host}/files/"], done.stderr
    assert (tmp_path / "picture.png").read_bytes().startswith(PICTURE)
    with capsys.disabled():
        print(f"\npulling {' '.join(flags)}: {megabytes(dist)} MB")


@pytest.mark.skipif(bool(why_no_screen()), reason=why_no_screen() or "-")
def test_the_frozen_desktop_application_draws(programs, tmp_path, capsys):
    package = f"PySide6-Essentials=={version('PySide6-Essentials')}"
    subprocess.run([programs / "python", "-m", "pip", "install", "-q", package], check=True, env=without_path())
    shutil.copytree(ROOT / "examples/desktop", tmp_path / "examples/desktop")
    flags = ["--noconfirm", "--log-level", "ERROR", "--paths", ".", "--name", "tiue-desktop"]
    command = [programs / "pyinstaller", *flags, "examples/desktop/__main__.py"]
    subprocess.run(command, cwd=tmp_path, check=True, env=without_path())
    folder = tmp_path / "dist/tiue-desktop"
    with screen() as shown:
        # Without a UTF-8 locale, Qt prints advice on stderr, which a desktop application keeps empty.
        home = {"HOME": str(tmp_path), "LANG": "C.UTF-8", "DISPLAY": shown.environment["DISPLAY"]}
        runs = [draw_a_heart(shown, [folder / "tiue-desktop", "--device", "cpu"], env=home) for _ in range(3)]
    with capsys.disabled():
        seconds = ", ".join(f"{first:.2f} and {second:.2f}" for first, second in runs)
        print(f"\ndesktop: {megabytes(folder)} MB; seconds from start to window and to model: {seconds}")
