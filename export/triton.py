"""A model repository for NVIDIA's Triton Inference Server. It is a bundle, with each graph in a folder of its own.

    emoji/config.pbtxt                  the model that clients ask for pictures
    emoji/1/model.py                    triton_model.py: tokens, noise and the sum
    emoji/1/settings.json, tokenizer.json
    emoji_text_encoder/config.pbtxt     likewise unet_encoder, unet_decoder, vae_decoder
    emoji_text_encoder/1/model.onnx

Triton reads the folders only, so bundle.json and the model card lie beside them.
"""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
from tiue_runtime import bundle

_VERSION = "1"
_MOST_PICTURES = 4  # of one run; on a GPU, nothing was measured
_TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.INT64: "TYPE_INT64",
}

Tensor = tuple[str, str, list[int]]  # name, type, dimensions

_INPUTS: dict[str, str] = {
    "prompt": "TYPE_STRING",
    "seed": "TYPE_UINT64",
    "steps": "TYPE_INT32",
    "height": "TYPE_INT32",
    "width": "TYPE_INT32",
}


def repository_file(name: str, graph: str) -> str:
    """Return the file of a graph in a repository. name: of the bundle."""
    return f"{model_name(name)}_{graph}/{_VERSION}/model.onnx"


def model_name(name: str) -> str:
    """Turn the name of a bundle into one that Triton, its addresses and file systems take."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:100].strip("_") or "tiue"


def write_models(directory: Path, manifest: bundle.Manifest) -> None:
    """Make a repository of a directory that has the graphs where `repository_file` says, and tokenizer.json."""
    name = model_name(manifest.name)
    (files,) = manifest.variants.values()
    graphs: dict[str, dict[str, list[str]]] = {}
    for graph in bundle.GRAPHS:
        proto = onnx.load(directory / files[graph], load_external_data=False).graph
        inputs, outputs = _tensors(proto.input), _tensors(proto.output)
        graphs[graph] = {"inputs": [one[0] for one in inputs], "outputs": [one[0] for one in outputs]}
        # The numbers of pictures and of timesteps are dimensions of the graphs, so Triton makes no batches of its own.
        _write_config(directory, f"{name}_{graph}", "onnxruntime", 0, inputs, outputs)
    inputs = [(tensor, kind, [1]) for tensor, kind in _INPUTS.items()]
    outputs = [("image", "TYPE_UINT8", [-1, -1, 3]), ("seed", "TYPE_UINT64", [1])]
    _write_config(directory, name, "python", _MOST_PICTURES, inputs, outputs)
    version = directory / name / _VERSION
    version.mkdir()
    shutil.copyfile(Path(__file__).with_name("triton_model.py"), version / "model.py")
    shutil.copyfile(directory / bundle.TOKENIZER, version / bundle.TOKENIZER)
    (version / "settings.json").write_text(json.dumps(_settings(manifest, graphs), indent=2) + "\n", encoding="utf-8")


def _settings(manifest: bundle.Manifest, graphs: dict[str, dict[str, list[str]]]) -> dict[str, Any]:
    """Return what model.py has to know of the student."""
    return {
        "latent_channels": manifest.latent_channels,
        "pixels_per_latent": manifest.pixels_per_latent,
        "sizes": manifest.made_for,  # (height, width) in pixels, the default first
        "text_length": manifest.text_length,
        "default_steps": manifest.default_steps,
        "schedules": {
            steps: {
                "step_index": manifest.step_rows(steps),
                "step_weights": schedule.step_weights,
                "noise_weight": schedule.noise_weight,
            }
            for steps, schedule in manifest.schedules.items()
        },
        "graphs": graphs,
    }


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return inputs or outputs of a graph. A dimension that varies is -1."""
    found: list[Tensor] = []
    for value in values:
        tensor = value.type.tensor_type
        shape = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
        found.append((value.name, _TYPES[tensor.elem_type], shape))
    return found


def _write_config(
    directory: Path, name: str, backend: str, most: int, inputs: list[Tensor], outputs: list[Tensor]
) -> None:
    """Write a model's config.pbtxt. most: pictures that Triton may gather; 0: it gathers none."""
    lines = [f'name: "{name}"', f'backend: "{backend}"', f"max_batch_size: {most}"]
    if most:
        # A picture needs its prompt alone. The model's own work is small and needs no GPU.
        lines += ["dynamic_batching { }", "instance_group [ { kind: KIND_CPU } ]"]
    for field, tensors in (("input", inputs), ("output", outputs)):
        for tensor, kind, shape in tensors:
            optional = " optional: true" if most and field == "input" and tensor != "prompt" else ""
            dims = ", ".join(map(str, shape))
            lines.append(f'{field} {{ name: "{tensor}" data_type: {kind} dims: [ {dims} ]{optional} }}')
    (directory / name).mkdir(exist_ok=True)
    (directory / name / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")
