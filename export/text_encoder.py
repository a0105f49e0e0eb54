"""The text encoder's graph, by optimum-onnx, which knows how to trace every kind of it.

The only module that imports optimum.
"""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
import torch
from optimum.exporters.onnx import export
from optimum.exporters.tasks import TasksManager
from tiue_runtime import bundle

from export.errors import ExportError
from export.graphs import OPSET
from export.quiet import quiet
from tiue.components import Components
from tiue.text_encoder import uses_attention_mask


def text_encoder_graph(components: Components, dtype: torch.dtype) -> ir.Model:
    """input_ids int64 (B,L) [, attention_mask int64 (B,L)] => text float32 (B,L,D), computed in `dtype`."""
    model: Any = components.text_encoder
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
    if dtype != model.dtype:
        model = copy.deepcopy(model).to(dtype)
    return _export(model, Config(model.config, task="feature-extraction"), shapes)


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


def _export(model: Any, config: Any, shapes: dict[str, int]) -> ir.Model:
    with TemporaryDirectory() as directory, quiet():
        path = Path(directory) / "model.onnx"
        export(model, config, path, opset=OPSET, input_shapes=shapes)
        graph = ir.load(path)
        ir.external_data.load_to_model(graph)
    (text,) = graph.graph.outputs
    if text.dtype != ir.DataType.FLOAT:
        widened = ir.node("Cast", [text], {"to": ir.DataType.FLOAT})
        widened.outputs[0].shape, widened.outputs[0].dtype = text.shape, ir.DataType.FLOAT
        graph.graph.append(widened)
        graph.graph.outputs[0] = widened.outputs[0]
    graph.graph.outputs[0].name = bundle.TEXT
    return graph
