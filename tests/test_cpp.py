"""The reader in C++, which was written from docs/bundle.md alone, makes the pictures that the runtime makes."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from tiue_runtime import Pipeline
from tiue_runtime.bundle import Bundle
from tiue_runtime.noise import gaussian
from tokenizers import Tokenizer
from tolerances import GOLDEN_IMAGE_LEVELS, OTHER_RUNTIME_DB

ROOT = Path(__file__).parents[1]
EMOJI = ROOT / "models" / "emoji" / "tiue_emoji"
TINY = ROOT / "runtime" / "tests" / "data" / "tiny"
HEADERS = ("onnxruntime_cxx_api.h", "nlohmann/json.hpp", "unicode/normalizer2.h")
REQUESTS = [
    ("a red heart", 1),
    ("", 0),
    ("A  Naïve\tÜNICODE e\u0301 ΣΑΣ İstanbul", 2**32),
    ("日本語 🎈 \u200b\u00a0'don't' [MASK]x", 2**64 - 1),
    ("unaffable " * 40, 7),
    ("x" * 101, 8),
    ("a red heart, FLUENT", 9),
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def generate(tmp_path_factory):
    """The compiled example. Its headers are found as the compiler finds them, for example through CPATH."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("cpp")
    includes = "".join(f"#include <{header}>\n" for header in HEADERS)
    found = subprocess.run([compiler, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"], input=includes, text=True)
    if found.returncode:
        pytest.skip(f"the compiler does not find all of {', '.join(HEADERS)}; set CPATH")
    # The wheel has the library without the names that the linker and the loader look for.
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(library)
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra"]
    link = ["-L", folder, "-lonnxruntime", "-licuuc", f"-Wl,-rpath,{folder}"]
    program = folder / "generate"
    built = subprocess.run(
        [compiler, *flags, ROOT / "examples/cpp/generate.cpp", "-o", program, *link], capture_output=True, text=True
    )
    assert built.returncode == 0 and "generate.cpp" not in built.stderr, built.stderr
    return program


@pytest.mark.parametrize("directory", [EMOJI, TINY], ids=["emoji", "tiny"])
@pytest.mark.parametrize(("prompt", "seed"), REQUESTS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # The default model knows none of these words.
def test_ids_noise_latents_and_picture_are_those_of_the_runtime(generate, directory, prompt, seed, tmp_path):
    picture, values = tmp_path / "picture.bmp", tmp_path / "values.bin"
    command = [generate, "--bundle", directory, "--seed", str(seed), "--out", picture, "--values", values, prompt]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest = Bundle.load(directory).manifest
    drawn = manifest.in_style(prompt, seed)
    data = values.read_bytes()
    ids = np.frombuffer(data, np.int64, manifest.text_length)
    noise, latents = np.frombuffer(data, np.float32, offset=ids.nbytes).reshape(2, -1)

    assert ids.tolist() == Tokenizer.from_file(str(directory / "tokenizer.json")).encode(drawn).ids
    np.testing.assert_array_equal(noise, gaussian(seed, noise.shape))
    with Pipeline.load(directory, device="cpu") as pipe:
        expected = pipe(prompt, seed=seed, output_type="latent").images
        (image,) = pipe.decode(expected)
    error = np.mean((latents - expected.ravel()) ** 2)
    assert error <= np.mean(expected**2) * 10 ** (-OTHER_RUNTIME_DB / 10)
    with Image.open(picture) as own:
        levels = np.abs(np.asarray(own.convert("RGB"), np.int16) - np.asarray(image, np.int16))
    assert levels.max() <= GOLDEN_IMAGE_LEVELS


def test_a_safety_checker_is_said_not_to_run(generate, tmp_path):
    command = [generate, "--bundle", TINY.with_name("checked"), "--out", tmp_path / "picture.bmp", "a red heart"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == "generate: warning: this example does not run the safety checker of the bundle\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bundle", "nowhere", "a cat"], "cannot read nowhere"),
        (["--sede", "1", "a cat"], "unknown flag --sede"),
        (["a cat"], "usage: "),
        (["--bundle", EMOJI, "--seed", "x", "a cat"], "--seed"),
        (["--bundle", EMOJI, "--out", "no/such/folder.bmp", "a cat"], "cannot write no/such/folder.bmp"),
    ],
)
def test_mistakes_end_with_one_line(generate, arguments, message, tmp_path):
    done = subprocess.run([generate, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
