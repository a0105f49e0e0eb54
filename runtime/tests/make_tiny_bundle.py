"""Make the bundles in data/: a few KB each, with pictures in closed form. Needs onnx, unlike the tests.

python make_tiny_bundle.py

text         = EMBEDDING[input_ids] * attention_mask
mid, skip.0  = 0.5 z_T, mean(text)
eps_i        = tanh(mid * TAU[i] + skip.0)
image        = 2 latents[:, :3] + 0.25, every pixel repeated twice in height and width

heavy computes the same, but takes more memory: eps and image are the mean of COPIES copies. It has memory estimates,
default pictures of 128 x 128 pixels, and a second image decoder, which takes little memory and halves the contrast.

checked is tiny with a safety checker: it flags pictures whose center of 4 x 4 pixels is brighter than LIMIT.
upscaled is checked with an upscaler: it repeats every pixel three times in height and width, and inverts its color.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tiue_runtime.bundle import (
    GRAPH_FILES,
    KL,
    PORTABLE,
    SAFETY_CHECKER,
    TINY,
    TOKENIZER,
    UPSCALER,
    VAE_DECODER,
    Bundle,
    Manifest,
    MemoryUse,
    Preview,
    Prompts,
    SafetyChecker,
    Schedule,
    Upscaler,
    write_bundle,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

DATA = Path(__file__).parent / "data"
WORDS = ["<pad>", "<start>", "<end>", "<unknown>", "a", "red", "blue", "heart", "star", "on", "the", "sea"]
LENGTH = 8
EMBEDDING = np.array([[i / 10, -i / 20, 1 / (1 + i)] for i in range(len(WORDS))], dtype=np.float32)
TAU = np.array([0.9, 0.7, 0.4, 0.2], dtype=np.float32)
COPIES = 64
LIMIT = 0.3  # of pixels in [-1, 1]
SCALE, SHIFT = 2.0, 0.25  # image in [-1, 1] of latents
IDENTITY = tuple(tuple(SCALE / 2 if row == column else 0.0 for column in range(3)) for row in range(3))
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def value(name: str, kind: int, *shape: str | int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def save(path: Path, nodes: list, inputs: list, outputs: list, constants: dict[str, np.ndarray]) -> None:
    tensors = [numpy_helper.from_array(array, key) for key, array in constants.items()]
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def copied(name: str, last: list, heavy: bool) -> tuple[list, dict[str, np.ndarray]]:
    """Return the nodes `last`, which compute `name`. If heavy, `name` becomes the mean of COPIES copies."""
    if not heavy:
        return last, {}
    last[-1].output[0] = "once"
    node = helper.make_node
    nodes = [
        node("Shape", ["once"], ["shape"]),
        node("Concat", ["copies", "shape"], ["many"], axis=0),
        node("Expand", ["once", "many"], ["copied"]),
        node("ReduceMean", ["copied", "leading"], [name], keepdims=0),
    ]
    return [*last, *nodes], {"copies": np.array([COPIES]), "leading": np.array([0])}


def vae(path: Path, contrast: float, heavy: bool) -> None:
    node = helper.make_node
    nodes, constants = copied(
        "image",
        [
            node("Slice", ["latents", "from", "to", "channel"], ["rgb"]),
            node("Mul", ["rgb", "scale"], ["scaled"]),
            node("Add", ["scaled", "shift"], ["shifted"]),
            node("Resize", ["shifted", "", "scales"], ["image"], mode="nearest"),
        ],
        heavy,
    )
    save(
        path,
        nodes,
        [value("latents", FLOAT, "B", 4, "h", "w")],
        [value("image", FLOAT, "B", 3, "H", "W")],
        {
            "from": np.array([0]),
            "to": np.array([3]),
            "channel": np.array([1]),
            "scale": np.float32(SCALE * contrast),
            "shift": np.float32(SHIFT * contrast),
            "scales": np.array([1, 1, 2, 2], dtype=np.float32),
            **constants,
        },
    )


def make(directory: Path, heavy: bool) -> None:
    node = helper.make_node
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    latents, text = value("latents", FLOAT, "B", 4, "h", "w"), value("text", FLOAT, "B", LENGTH, 3)
    mid, skip = value("mid", FLOAT, "B", 4, "h", "w"), value("skip.0", FLOAT, "B", 1, 1, 1)
    save(
        directory / "text_encoder.onnx",
        [
            node("Gather", ["embedding", "input_ids"], ["raw"]),
            node("Cast", ["attention_mask"], ["mask"], to=FLOAT),
            node("Unsqueeze", ["mask", "last"], ["column"]),
            node("Mul", ["raw", "column"], ["text"]),
        ],
        [value("input_ids", INT, "B", LENGTH), value("attention_mask", INT, "B", LENGTH)],
        [text],
        {"embedding": EMBEDDING, "last": np.array([-1])},
    )
    save(
        directory / "unet_encoder.onnx",
        [
            node("Mul", ["latents", "half"], ["mid"]),
            node("ReduceMean", ["text", "axes"], ["mean"], keepdims=1),
            node("Unsqueeze", ["mean", "last"], ["skip.0"]),
        ],
        [latents, text],
        [mid, skip],
        {"half": np.float32(0.5), "axes": np.array([1, 2]), "last": np.array([-1])},
    )
    eps, constants = copied(
        "eps",
        [
            node("Gather", ["tau", "step_index"], ["tau_i"]),
            node("Reshape", ["tau_i", "column"], ["t"]),
            node("Mul", ["mid", "t"], ["scaled"]),
            node("Add", ["scaled", "skip.0"], ["sum"]),
            node("Tanh", ["sum"], ["eps"]),
        ],
        heavy,
    )
    save(
        directory / "unet_decoder.onnx",
        [
            *eps,
            node("Reshape", ["step_weight", "column"], ["w_i"]),
            node("Mul", ["eps", "w_i"], ["weighted"]),
            node("ReduceSum", ["weighted", "first"], ["contribution"], keepdims=0),
        ],
        [mid, skip, value("step_index", INT, "k"), value("step_weight", FLOAT, "k")],
        [value("contribution", FLOAT, "B", 4, "h", "w")],
        {"tau": TAU, "column": np.array([-1, 1, 1, 1, 1]), "first": np.array([0]), **constants},
    )
    vae(directory / GRAPH_FILES[VAE_DECODER], contrast=1, heavy=heavy)
    if heavy:
        vae(directory / "vae_decoder_tiny.onnx", contrast=0.5, heavy=False)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    tokenizer.enable_padding(length=LENGTH, pad_id=0, pad_token="<pad>")
    tokenizer.enable_truncation(LENGTH)
    tokenizer.save(str(directory / TOKENIZER))
    (directory / "README.md").write_text("A synthetic bundle for tests.\n", encoding="utf-8")
    floats = 4 * (COPIES + 1)  # bytes of a number and its copies
    estimates = {
        "unet_decoder": MemoryUse(4 * floats, 0),  # 4 channels
        "vae_decoder": MemoryUse(3 * 4 * floats, 0),  # 3 channels of 2 x 2 pixels
    }
    manifest = Manifest(
        name=directory.name,
        license="Apache-2.0",
        created_from={"script": "make_tiny_bundle.py"},
        latent_channels=4,
        pixels_per_latent=2,
        default_height=128 if heavy else 8,
        default_width=128 if heavy else 12,
        size_multiple=4,
        precision="fp32",
        weights="fp32",
        text_length=LENGTH,
        encoder_timestep=751,
        decoder_timesteps=(751, 501, 251, 1),
        schedules={
            2: Schedule((501, 1), 0.3, (-0.5, 0.25)),
            4: Schedule((751, 501, 251, 1), 0.2, (0.5, -0.25, 1.5, 0.125)),
        },
        default_steps=4,
        variants={PORTABLE: {**GRAPH_FILES, **({"vae_decoder_tiny": "vae_decoder_tiny.onnx"} if heavy else {})}},
        vaes=(KL, TINY) if heavy else (KL,),
        preview=Preview((*IDENTITY, (0.0, 0.0, 0.0)), ((SHIFT + 1) / 2,) * 3),  # for pictures in [0, 1]
        prompts=Prompts(examples=("a red heart", "a blue star"), vocabulary=tuple(WORDS[4:])),
        memory={PORTABLE: estimates} if heavy else {},
    )
    write_bundle(directory, manifest).verify()


def make_checked(directory: Path) -> None:
    node = helper.make_node
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(DATA / "tiny", directory)
    save(
        directory / "safety_checker.onnx",
        [
            node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
            node("Sub", ["mean", "limit"], ["score"]),
        ],
        [value("image", FLOAT, "B", 3, 4, 4)],
        [value("score", FLOAT, "B")],
        {"axes": np.array([1, 2, 3]), "limit": np.float32(LIMIT)},
    )
    manifest = Bundle.load(DATA / "tiny").manifest
    variants = {PORTABLE: {**manifest.variants[PORTABLE], SAFETY_CHECKER: "safety_checker.onnx"}}
    checker = SafetyChecker(resize=6, crop=4, filter="bicubic")
    changed = replace(manifest, name=directory.name, variants=variants, safety_checker=checker, files={})
    write_bundle(directory, changed).verify()


def make_upscaled(directory: Path) -> None:
    node = helper.make_node
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(DATA / "checked", directory)
    save(
        directory / "upscaler.onnx",
        [
            node("Resize", ["image", "", "scales"], ["larger"], mode="nearest"),
            node("Mul", ["larger", "minus"], ["enlarged"]),
        ],
        [value("image", FLOAT, "B", 3, "H", "W")],
        [value("enlarged", FLOAT, "B", 3, "HH", "WW")],
        {"scales": np.array([1, 1, 3, 3], dtype=np.float32), "minus": np.float32(-1)},
    )
    manifest = Bundle.load(DATA / "checked").manifest
    variants = {PORTABLE: {**manifest.variants[PORTABLE], UPSCALER: "upscaler.onnx"}}
    changed = replace(manifest, name=directory.name, variants=variants, upscaler=Upscaler(3), files={})
    write_bundle(directory, changed).verify()


def main() -> None:
    make(DATA / "tiny", heavy=False)
    make(DATA / "heavy", heavy=True)
    make_checked(DATA / "checked")
    make_upscaled(DATA / "upscaled")


if __name__ == "__main__":
    main()
