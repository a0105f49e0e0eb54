"""Tracing the text encoder with optimum-onnx, which knows every kind of it. Only this module imports optimum."""

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
from export.quiet import quiet
from export.trace import OPSET
from tiue.components import Components
from tiue.text_encoder import uses_attention_mask


def text_encoder_graph(components: Components, dtype: torch.dtype) -> ir.Model:
    """Trace a text encoder.

    Args:
        components: of the student.
        dtype: the precision to compute in.

    Returns:
        A graph: input_ids int64 (B, L) and, where the model uses it, attention_mask int64 (B, L)
        => text float32 (B, L, D).

    Raises:
        ExportError: optimum-onnx does not know the type of the text encoder.
    """
    model: Any = components.text_encoder
    names = [bundle.INPUT_IDS, *([bundle.ATTENTION_MASK] if uses_attention_mask(model) else [])]
    base = _text_config_class(model.config.model_type)

    class Config(base):
        """Optimum's configuration, reduced to the inputs that vary and the one output in use."""

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
    # Optimum has CLIP's text model, and only that, under another name and library.
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
