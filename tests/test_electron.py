"""The example for Electron, without Electron: its processes in Node, and its page in Chromium."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "electron"
RUNTIME = ROOT / "runtime" / "web"
BUNDLES = {"tiny": ROOT / "runtime/tests/data/tiny", "emoji": ROOT / "models/emoji/tiue_emoji"}

pytestmark = pytest.mark.skipif(
    not shutil.which("node") or not (RUNTIME / "dist/src/index.js").is_file(),
    reason="the package in runtime/web is not built",
)


@pytest.fixture
def application(tmp_path):
    """A copy whose packages are those of this checkout, as `npm install` would link them."""
    copy = shutil.copytree(EXAMPLE, tmp_path / "electron", ignore=shutil.ignore_patterns("node_modules"))
    (copy / "node_modules").mkdir()
    (copy / "node_modules" / "tiue-runtime").symlink_to(RUNTIME)
    return copy


def run(application, name, bundle, **environment):
    command = ["node", "--test", f"tests/{name}.test.mjs"]
    given = {**os.environ, "BUNDLE": str(BUNDLES[bundle]), **environment}
    done = subprocess.run(command, cwd=application, env=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "# fail 0" in done.stdout and "# pass 0" not in done.stdout


def test_window_messages_and_process(application):
    run(application, "application", "tiny")


def test_the_main_module_ends_before_electron_is_ready(application):
    """Electron waits for the end of that module. So the module must not wait for Electron."""
    electron = application / "node_modules" / "electron"
    electron.mkdir()
    (electron / "package.json").write_text('{"type": "module", "exports": "./index.js"}')
    (electron / "index.js").write_text(
        'import { FakeElectron } from "../../tests/stand_in.mjs";\n'
        "export const { app, BrowserWindow, ipcMain, utilityProcess } = new FakeElectron();\n"
    )
    program = """
        import { app } from "electron";
        let isReady;
        app.whenReady = () => new Promise((resolve) => (isReady = resolve));
        await import("./main.js");
        isReady();
    """
    command = ["node", "--input-type=module", "--eval", program]
    done = subprocess.run(command, cwd=application, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed")
def test_the_page_with_its_process(application):
    run(application, "page", "emoji", CHROMIUM=shutil.which("chromium"))
