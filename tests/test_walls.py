"""Which package may import which, and where a device's kind may be compared: read from the sources."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiue_runtime.ort.devices import KINDS

ROOT = Path(__file__).parents[1]
RUNTIME = "runtime/tiue_runtime"
TRAINING = ("torch", "diffusers", "transformers", "onnx", "tiue", "export")


def sources(*patterns: str) -> list[Path]:
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    assert found
    return found


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or within a function, also by import_module("name")."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize(
    ("files", "never"),
    [
        ([f"{RUNTIME}/**/*.py"], TRAINING),
        ([f"{RUNTIME}/*.py", f"{RUNTIME}/[!o]*/**/*.py"], ("onnxruntime",)),  # ort/ alone imports it
        (["tiue/**/*.py"], ("tiue_runtime", "export")),
        (["tiue/*.py", "export/*.py"], ("tiue.distill",)),
        ([f"{RUNTIME}/serve/*.py"], [f"tiue_runtime.{part}" for part in ("graphs", "sampler", "request", "run")]),
    ],
)
def test_no_import_goes_through_a_wall(files, never):
    # `python -m tiue` is the command line of training: its door, and the one exception.
    paths = [path for path in sources(*files) if path != ROOT / "tiue/__main__.py"]
    assert not [(path.name, name) for path in paths for name in imported(path) if within(name, never)]


@pytest.mark.parametrize("folder", ["bundle", "host"])
def test_the_lowest_floor_imports_the_standard_library_only(folder):
    allowed = (*sys.stdlib_module_names, "tiue_runtime.errors", f"tiue_runtime.{folder}")
    for path in sources(f"{RUNTIME}/{folder}/*.py"):
        assert not [name for name in imported(path) if not within(name, allowed)], path


@pytest.mark.parametrize(
    ("folder", "module"),
    [
        *((RUNTIME, module) for module in ("torch", "diffusers", "transformers", "onnx", "onnxruntime")),
        (f"{RUNTIME}/ort", "torch"),
        (f"{RUNTIME}/bundle", "numpy"),
        (f"{RUNTIME}/host", "numpy"),
        ("tiue", "tiue.distill"),
        ("tiue", "tiue_runtime"),
        ("tiue/distill", "tiue_runtime"),
        ("export", "tiue.distill"),
    ],
)
def test_ruff_refuses_the_same(folder, module):
    def check(code: str) -> int:
        command = [sys.executable, "-m", "ruff", "check", "-q", "--select", "TID251", "--no-cache"]
        command += ["--stdin-filename", f"{folder}/new.py", "-"]
        return subprocess.run(command, input=code, cwd=ROOT, text=True, stdout=subprocess.DEVNULL).returncode

    assert check(f"import {module}\n") == 1 and check("import os\n") == 0


def test_no_two_modules_of_the_packages_have_the_same_name():
    names = [path.stem for path in sources(f"{RUNTIME}/**/*.py", "tiue/**/*.py", "export/*.py")]
    allowed = {"__init__", "__main__", "cli", "errors"}
    assert not {name for name in names if names.count(name) > 1} - allowed


def test_kinds_of_devices_are_compared_in_one_module():
    """Everything else asks the row of KINDS, so that another kind is one more row."""

    def is_kind(node: ast.expr) -> bool:
        return (isinstance(node, ast.Attribute) and node.attr == "kind") or (
            isinstance(node, ast.Constant) and node.value in KINDS
        )

    compared = [
        f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        for path in sources(f"{RUNTIME}/**/*.py")
        if path != ROOT / RUNTIME / "ort/devices.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare) and any(map(is_kind, (node.left, *node.comparators)))
    ]
    assert not [place for place in compared if "dtype.kind" not in place]  # that of numpy's types is another thing
