"""The package for JavaScript (runtime/web) against the runtime for Python: tokens of strange prompts, and pictures."""

import json
import random
import shutil
import subprocess
import unicodedata
from pathlib import Path

import numpy as np
import onnx
import pytest
import test_tokenizer_files
from PIL import Image
from tiue_runtime import Pipeline, read_record
from tiue_runtime.bundle import Bundle, write_bundle
from tiue_runtime.repeating import load_for
from tiue_runtime.tokenizer import PromptTokenizer

from export.assemble import write_tokenizer

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "runtime/web/dist"
TINY = ROOT / "runtime/tests/data/tiny"
EMOJI = ROOT / "models/emoji/tiue_emoji"

pytestmark = pytest.mark.skipif(
    not (BUILT / "tests/encode.js").exists() or shutil.which("node") is None,
    reason="needs Node and the package for JavaScript: make test-web",
)


def node(script, *arguments, **options):
    command = ["node", str(BUILT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, **options)


def assigned(first, last, step=1):
    """Return characters of Unicode 14, with the marks of Unicode 3.2. Libraries differ about later ones."""
    known = (chr(code) for code in range(first, last, step) if not 0xD800 <= code < 0xE000)
    old = unicodedata.ucd_3_2_0.category
    return [
        one
        for one in known
        if unicodedata.category(one) != "Cn" and not (unicodedata.combining(one) and old(one) == "Cn")
    ]


POOLS = [
    list("abcdefghij   "),
    assigned(0, 0x300),
    assigned(0x300, 0x3000),
    assigned(0x3000, 0x10000, 7),
    assigned(0x4E00, 0x4F00),
    assigned(0x1F300, 0x1FAFF),
    assigned(0x10000, 0x110000, 97),
    list("\u200d\ufe0f\u0301\u0308 \t\n\x00\x1c\x85\xa0\u2028\u3000\ufeff\ufffd\xadΣς\u0130ßﬁ\u212a\u212b"),
    ["[SEP]", "[CLS]", "[PAD]", "<|endoftext|>", "<|startoftext|>", " ", "heart", "red", "'s", "don't", "''", "``"],
]


def strange_prompts(seed, count):
    draw = random.Random(seed)
    for _ in range(count):
        pools = draw.sample(POOLS, draw.choice([1, 1, 2, 3]))
        prompt = "".join(draw.choice(draw.choice(pools)) for _ in range(draw.choice([0, 1, 2, 5, 10, 30, 60])))
        yield prompt * (200 if draw.random() < 0.03 else 1)


@pytest.mark.parametrize("model", ["emoji", *test_tokenizer_files.MODELS])
def test_strange_prompts_have_the_same_tokens(tmp_path, model):
    if model == "emoji":
        path, length = EMOJI / "tokenizer.json", 32
    else:
        components = test_tokenizer_files.MODELS[model](tmp_path / "tokenizer")
        path, length = tmp_path / "tokenizer.json", components.tokenizer.model_max_length
        write_tokenizer(path, components)
    prompts = list(strange_prompts(model, 500))
    asked = json.dumps({"tokenizer": str(path), "length": length, "prompts": prompts})
    tokenizer = PromptTokenizer(path, length)
    for prompt, made in zip(prompts, json.loads(node("tests/encode.js", input=asked).stdout), strict=True):
        tokens = tokenizer([prompt])
        assert made == [tokens.input_ids[0].tolist(), tokens.attention_mask[0].tolist()], ascii(prompt)


@pytest.mark.parametrize("device", ["cpu", "wasm"])
def test_python_reads_and_repeats_pictures_of_javascript(tmp_path, device):
    path = tmp_path / "heart.png"
    seed = 2**63 + 1
    node("src/cli/main.js", "generate", "a red heart", "--seed", seed, "--device", device, "--bundle", TINY, "-o", path)
    record = read_record(path)
    assert (record.prompt, record.seed, record.device, record.bundle) == ("a red heart", seed, device, "tiny")
    with load_for(record, TINY) as pipeline:
        [image] = pipeline.repeat(path).images  # A difference would be a warning, and warnings are errors.
    with Image.open(path) as saved:
        np.testing.assert_array_equal(np.asarray(saved), np.asarray(image))


@pytest.mark.parametrize("device", ["cpu", "wasm"])
def test_graphs_with_external_data_draw_the_same(tmp_path, device):
    bundle = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    graph = bundle / "text_encoder.onnx"
    model = onnx.load(graph)
    onnx.save(model, graph, save_as_external_data=True, location="weights.data", size_threshold=100)
    write_bundle(bundle, Bundle.load(TINY).manifest)
    assert (bundle / "weights.data").stat().st_size > 0
    for folder in (TINY, bundle):
        made = tmp_path / f"{folder.name}.png"
        node(
            "src/cli/main.js",
            "generate",
            "a red heart",
            "--device",
            device,
            "--seed",
            1,
            "--bundle",
            folder,
            "-o",
            made,
        )
    with Image.open(tmp_path / "tiny.png") as one, Image.open(tmp_path / "bundle.png") as other:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_the_default_model_draws_the_same(tmp_path):
    path = tmp_path / "heart.png"
    node("src/cli/main.js", "generate", "a red heart", "--seed", 1, "--bundle", EMOJI, "-o", path)
    with Pipeline.load(EMOJI, device="cpu") as pipeline, Image.open(path) as saved:
        [image] = pipeline("a red heart", seed=1).images
        difference = np.asarray(saved).astype(int) - np.asarray(image).astype(int)
    assert np.abs(difference).max() <= 1
