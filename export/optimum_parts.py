"""The text encoder and VAE decoder graphs, by optimum-onnx, which knows how to trace the libraries' models.

The only module that imports optimum.
"""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
import torch
from optimum.exporters.onnx import export
from optimum.exporters.onnx.model_configs import VaeDecoderOnnxConfig
from optimum.exporters.tasks import TasksManager
from tiue_runtime import bundle
from torch import nn

from tiue.components import Components, uses_attention_mask

from .errors import ExportError
from .graphs import OPSET
from .quiet import quiet


def text_encoder_graph(components: Components) -> ir.Model:
    """input_ids int64 (B,L) [, attention_mask int64 (B,L)] => text (B,L,D)."""
    model = components.text_encoder
    names = [bundle.INPUT_IDS, *([bundle.ATTENTION_MASK] if uses_attention_mask(model) else [])]
    base = _text_config_class(model.config.model_type)

    class Config(base):
        """optimum's configuration, reduced to the inputs that vary and the one output that is used."""

        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            return {name: {0: "batch", 1: "length"} for name in names}

        @property
        def outputs(self) -> dict[str, dict[int, str]]:
            return {"last_hidden_state": {0: "batch", 1: "length"}}

    shapes = {"batch_size": 2, "sequence_length": components.tokenizer.model_max_length}
    return _export(model, Config(model.config, task="feature-extraction"), bundle.TEXT, shapes)


def vae_decoder_graph(components: Components) -> ir.Model:
    """latents (B,C,h,w), unscaled => image (B,3,H,W) in [-1,1]."""

    class Config(VaeDecoderOnnxConfig):
        """optimum's configuration, with our input's name."""

        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            return {"latent_sample": {0: "batch", 2: "height", 3: "width"}}

        @property
        def outputs(self) -> dict[str, dict[int, str]]:
            return {"sample": {0: "batch", 2: "image_height", 3: "image_width"}}

    module = _VaeDecoder(components.vae)
    shapes = {"batch_size": 2, "width": 24, "height": 16}
    graph = _export(module, Config(module.config, task="semantic-segmentation"), bundle.IMAGE, shapes)
    graph.graph.inputs[0].name = bundle.LATENTS
    return graph


class _VaeDecoder(nn.Module):
    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae
        self.config = vae.config

    def forward(self, latent_sample: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sample": self.vae.decode(latent_sample, return_dict=False)[0]}


def _text_config_class(model_type: str) -> Any:
    # optimum files CLIP's text model, and only that, under another name and library.
    library, name = ("diffusers", "clip-text") if model_type == "clip_text_model" else ("transformers", model_type)
    try:
        constructor: Any = TasksManager.get_exporter_config_constructor(
            "onnx", model_type=name, task="feature-extraction", library_name=library
        )
    except (KeyError, ValueError) as error:
        raise ExportError(f"optimum-onnx cannot export text encoders of type {model_type}") from error
    return constructor.func


def _export(model: Any, config: Any, output: str, shapes: dict[str, int]) -> ir.Model:
    with TemporaryDirectory() as directory, quiet():
        path = Path(directory) / "model.onnx"
        export(model, config, path, opset=OPSET, input_shapes=shapes)
        graph = ir.load(path)
        ir.external_data.load_to_model(graph)
    (graph.graph.outputs[0].name,) = [output]
    return graph
