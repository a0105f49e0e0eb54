"""Make data/tiny: a bundle of a few KB whose answers are known in closed form. Needs onnx; the tests do not.

python make_tiny_bundle.py

text         = EMBEDDING[input_ids] * attention_mask
mid, skip.0  = 0.5 z_T, mean(text)
eps_i        = tanh(mid * TAU[i] + skip.0)
image        = latents[:, :3], every pixel repeated twice in height and width
"""

import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tiue_runtime.bundle import GRAPH_FILES, PORTABLE, TOKENIZER, Manifest, Schedule, write_bundle
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

DIRECTORY = Path(__file__).parent / "data" / "tiny"
WORDS = ["<pad>", "<start>", "<end>", "<unknown>", "a", "red", "blue", "heart", "star", "on", "the", "sea"]
LENGTH = 8
EMBEDDING = np.array([[i / 10, -i / 20, 1 / (1 + i)] for i in range(len(WORDS))], dtype=np.float32)
TAU = np.array([0.9, 0.7, 0.4, 0.2], dtype=np.float32)
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def value(name: str, kind: int, *shape: str | int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def save(name: str, nodes: list, inputs: list, outputs: list, constants: dict[str, np.ndarray]) -> None:
    tensors = [numpy_helper.from_array(array, key) for key, array in constants.items()]
    graph = helper.make_graph(nodes, name, inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, DIRECTORY / GRAPH_FILES[name])


def main() -> None:
    node = helper.make_node
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    DIRECTORY.mkdir(parents=True)
    latents, text = value("latents", FLOAT, "B", 4, "h", "w"), value("text", FLOAT, "B", LENGTH, 3)
    mid, skip = value("mid", FLOAT, "B", 4, "h", "w"), value("skip.0", FLOAT, "B", 1, 1, 1)
    save(
        "text_encoder",
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
        "unet_encoder",
        [
            node("Mul", ["latents", "half"], ["mid"]),
            node("ReduceMean", ["text", "axes"], ["mean"], keepdims=1),
            node("Unsqueeze", ["mean", "last"], ["skip.0"]),
        ],
        [latents, text],
        [mid, skip],
        {"half": np.float32(0.5), "axes": np.array([1, 2]), "last": np.array([-1])},
    )
    save(
        "unet_decoder",
        [
            node("Gather", ["tau", "step_index"], ["tau_i"]),
            node("Reshape", ["tau_i", "column"], ["t"]),
            node("Reshape", ["step_weight", "column"], ["w_i"]),
            node("Mul", ["mid", "t"], ["scaled"]),
            node("Add", ["scaled", "skip.0"], ["sum"]),
            node("Tanh", ["sum"], ["eps"]),
            node("Mul", ["eps", "w_i"], ["weighted"]),
            node("ReduceSum", ["weighted", "first"], ["contribution"], keepdims=0),
        ],
        [mid, skip, value("step_index", INT, "k"), value("step_weight", FLOAT, "k")],
        [value("contribution", FLOAT, "B", 4, "h", "w")],
        {"tau": TAU, "column": np.array([-1, 1, 1, 1, 1]), "first": np.array([0])},
    )
    save(
        "vae_decoder",
        [
            node("Slice", ["latents", "from", "to", "channel"], ["rgb"]),
            node("Resize", ["rgb", "", "scales"], ["image"], mode="nearest"),
        ],
        [latents],
        [value("image", FLOAT, "B", 3, "H", "W")],
        {
            "from": np.array([0]),
            "to": np.array([3]),
            "channel": np.array([1]),
            "scales": np.array([1, 1, 2, 2], dtype=np.float32),
        },
    )
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    tokenizer.enable_padding(length=LENGTH, pad_id=0, pad_token="<pad>")
    tokenizer.enable_truncation(LENGTH)
    tokenizer.save(str(DIRECTORY / TOKENIZER))
    (DIRECTORY / "README.md").write_text("A synthetic bundle for tests.\n", encoding="utf-8")
    manifest = Manifest(
        name="tiny",
        licence="Apache-2.0",
        created_from={"script": "make_tiny_bundle.py"},
        latent_channels=4,
        pixels_per_latent=2,
        default_height=8,
        default_width=12,
        size_multiple=4,
        vae_scaling_factor=0.5,
        vae_shift_factor=0.25,
        text_length=LENGTH,
        encoder_timestep=751,
        decoder_timesteps=(751, 501, 251, 1),
        schedules={
            2: Schedule((501, 1), 0.3, (-0.5, 0.25)),
            4: Schedule((751, 501, 251, 1), 0.2, (0.5, -0.25, 1.5, 0.125)),
        },
        default_steps=4,
        precision="fp32",
        variants={PORTABLE: GRAPH_FILES},
    )
    write_bundle(DIRECTORY, manifest).verify()


if __name__ == "__main__":
    main()
