"""Upscalers at export: read by spandrel without torchvision, traced with sizes that vary, or refused in one line."""

import hashlib
import importlib.util
import sys

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiue_runtime import bundle
from tolerances import REORDERED

from export import assemble
from export.errors import ExportError
from export.export_options import Options
from export.onnx import main
from export.plan import make_plan
from export.source import load_source
from export.trace import upscaler_graph
from export.upscaler import load_upscaler

pytestmark = pytest.mark.skipif(  # Importing it fails without torchvision.
    importlib.util.find_spec("spandrel") is None, reason="pip install --no-deps spandrel==0.4.2 einops"
)


@pytest.fixture
def path(tmp_path):
    save_file(tiny.upscaler(), tmp_path / "compact.safetensors")
    return tmp_path / "compact.safetensors"


def closed_form(image):
    """RealESRGAN Compact: convolutions with PReLU, rearranged to pixels and added to the picture."""
    tensors = tiny.upscaler()
    x = unit = image / 2 + 0.5
    for i in (0, 2, 4):
        x = F.conv2d(x, tensors[f"body.{i}.weight"], tensors[f"body.{i}.bias"], padding=1)
        x = F.prelu(x, tensors[f"body.{i + 1}.weight"]) if i < 4 else x
    return (F.pixel_shuffle(x, 2) + F.interpolate(unit, scale_factor=2, mode="nearest")) * 2 - 1


def test_it_is_loaded_without_torchvision_and_leaves_nothing_behind(path):
    found = load_upscaler(path)
    assert (found.scale, found.multiple) == (2, 1)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.origin == f"RealESRGAN Compact, compact.safetensors, sha256 {digest}"
    assert "torchvision" not in sys.modules or sys.modules["torchvision"].__spec__ is not None
    image = torch.rand(2, 3, 10, 14) * 2 - 1
    torch.testing.assert_close(found.module(image), closed_form(image), rtol=0, atol=REORDERED)


def test_the_graph_takes_any_size(path, tmp_path):
    ir.save(upscaler_graph(load_upscaler(path)), tmp_path / "upscaler.onnx")
    session = ort.InferenceSession(tmp_path / "upscaler.onnx")
    for shape in ((1, 3, 64, 64), (3, 3, 20, 8), (1, 3, 1, 1)):
        image = torch.rand(shape) * 2 - 1
        (made,) = session.run([bundle.ENLARGED], {bundle.IMAGE: image.numpy()})
        np.testing.assert_allclose(made, closed_form(image).numpy(), atol=REORDERED)


def test_the_command_records_it(path, tmp_path, monkeypatch):
    exported = []
    monkeypatch.setattr(assemble, "export_bundle", lambda student, _, options, *__: exported.append((student, options)))
    directory = tiny.save_pipeline(tiny.sd15(), tmp_path / "base")
    assert main(["--ckpt", str(directory), "--upscaler", str(path)]) == 0
    manifest = make_plan(*exported[0]).manifest
    assert manifest.upscaler == bundle.Upscaler(2) and manifest.graphs[-1] == "upscaler"
    assert manifest.created_from["upscaler"].startswith("RealESRGAN Compact, compact.safetensors")
    assert make_plan(load_source(directory), Options()).manifest.upscaler is None


def gray():
    tensors = tiny.upscaler()
    return tensors | {"body.0.weight": tensors["body.0.weight"][:, :1], "body.4.weight": tensors["body.4.weight"][:4],
                      "body.4.bias": tensors["body.4.bias"][:4]}  # fmt: skip


def same_size():
    tensors = tiny.upscaler()
    return tensors | {"body.4.weight": tensors["body.4.weight"][:3], "body.4.bias": tensors["body.4.bias"][:3]}


def without(name):
    return {key: tensor for key, tensor in tiny.upscaler().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no tensors"),
        ({"conv_in.weight": torch.ones(1)}, r"is no upscaler that spandrel 0\.\S+ knows"),
        (gray(), "from 1 to 1 channels: expected one of RGB pictures"),
        (same_size(), "that enlarges by 1: expected an upscaler"),
        (without("body.2.bias"), "cannot be loaded as an upscaler"),
        (tiny.upscaler() | {"body.1.weight": torch.full((4,), torch.nan)}, r"body\.1\.weight holds infinity or NaN"),
    ],
)
def test_what_is_no_upscaler(tmp_path, tensors, message):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "file.safetensors")
    with pytest.raises(ExportError, match=message):
        load_upscaler(tmp_path / "file.safetensors")


def test_files_of_other_kinds(tmp_path, capsys):
    with pytest.raises(ExportError, match="no such upscaler"):
        load_upscaler(tmp_path / "absent.safetensors")
    torch.save(tiny.upscaler(), tmp_path / "compact.pth")
    with pytest.raises(ExportError, match="is a pickle of PyTorch, which can run programs and is never loaded"):
        load_upscaler(tmp_path / "compact.pth")
    assert main(["--ckpt", str(tmp_path), "--upscaler", str(tmp_path / "compact.pth")]) == 2
    assert "is a pickle" in capsys.readouterr().err.splitlines()[-1]


def test_without_spandrel_the_message_says_how_to_get_it(path, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--ckpt", str(tmp_path), "--upscaler", str(path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("--upscaler needs spandrel: pip install --no-deps spandrel==0.4.2 einops")
