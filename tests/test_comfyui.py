"""The node for ComfyUI, used as ComfyUI uses a node. A stand-in has the few names of ComfyUI that the node needs."""

import importlib.util
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from tiue_runtime import Bundle, Pipeline, RequestError
from tiue_runtime.bundle import write_bundle

NODE = Path(__file__).parents[1] / "examples/comfyui_tiue.py"
TINY = Path(__file__).parents[1] / "runtime/tests/data/tiny"
LONGEST = 60  # lines


class InterruptProcessingException(Exception):
    pass


class ComfyUI:
    """Interrupting, and what the page shows of a node's progress."""

    def __init__(self):
        self.shown, self.interrupted, self.interrupt_after = [], False, None

    def progress_bar(self, total):
        bar = ModuleType("bar")
        bar.update_absolute = lambda value, total=None, preview=None: self.update(value / total, preview)
        return bar

    def update(self, fraction, preview):
        self.shown.append((fraction, preview))
        if self.interrupt_after == len(self.shown):
            self.interrupted = True

    def throw(self):
        if self.interrupted:
            self.interrupted = False
            raise InterruptProcessingException

    def run(self, mappings, name, **given):
        """Run a node: check and complete its inputs, make it, call it."""
        node = mappings[name]
        inputs = node.INPUT_TYPES()
        values = {key: options["default"] for key, (_, options) in inputs["required"].items()} | given
        for key, value in values.items():
            kind, options = {**inputs["required"], **inputs.get("optional", {})}[key]
            assert isinstance(value, {"STRING": str, "INT": int}[kind])
            assert kind == "STRING" or options["min"] <= value <= options["max"]
        outputs = getattr(node(), node.FUNCTION)(**values)
        assert isinstance(outputs, tuple) and len(outputs) == len(node.RETURN_TYPES)
        return outputs


@pytest.fixture
def comfyui(monkeypatch):
    comfyui = ComfyUI()
    comfy, management, utils = (ModuleType(name) for name in ("comfy", "comfy.model_management", "comfy.utils"))
    comfy.model_management, comfy.utils = management, utils
    management.processing_interrupted = lambda: comfyui.interrupted
    management.throw_exception_if_processing_interrupted = comfyui.throw
    utils.ProgressBar = comfyui.progress_bar
    for module in (comfy, management, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return comfyui


@pytest.fixture
def node(comfyui):
    """Load the file as ComfyUI loads the files of custom_nodes."""
    spec = importlib.util.spec_from_file_location("comfyui_tiue", NODE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    return lambda **given: comfyui.run(module.NODE_CLASS_MAPPINGS, "TiuePicture", **given)


def test_the_file_is_short():
    assert len(NODE.read_text().splitlines()) < LONGEST


def test_pictures_are_those_of_the_library_and_previews_are_shown(node, comfyui):
    (images,) = node(seed=1, batch_size=2)
    with Pipeline.load("emoji") as pipe:
        expected = pipe("a red heart", seed=1, num_images=2, output_type="np", memory="sequential").images
    assert images.dtype == torch.float32 and images.shape == expected.shape
    assert torch.equal(images, torch.from_numpy(expected))
    assert 0 <= images.min() < images.max() <= 1
    fractions = [fraction for fraction, _ in comfyui.shown]
    assert fractions == sorted(fractions) and fractions[-1] == 1
    previews = [preview for _, preview in comfyui.shown if preview]
    assert len(previews) == len(comfyui.shown) - 2  # The text encoder and the encoder come before the first timestep.
    for kind, picture, most in previews:
        assert kind in ("JPEG", "PNG") and isinstance(picture, Image.Image) and most >= 1


def test_sizes_and_a_bundle_by_its_directory(node, comfyui):
    (images,) = node(prompt="a blue star", bundle=str(TINY), steps=2, width=4, height=16)
    assert images.shape == (1, 16, 4, 3)
    assert node(bundle=str(TINY), steps=0, width=0, height=0)[0].shape == node(bundle=str(TINY))[0].shape


def test_a_bundle_without_a_matrix_for_previews_is_drawn_without(node, comfyui, tmp_path):
    bundle = shutil.copytree(TINY, tmp_path / "bundle")
    write_bundle(bundle, replace(Bundle.load(bundle).manifest, preview=None))
    assert node(bundle=str(bundle))[0].shape[0] == 1
    assert comfyui.shown and not any(preview for _, preview in comfyui.shown)


def test_interrupting_ends_the_node_as_comfyui_expects(node, comfyui):
    comfyui.interrupt_after = 2
    with pytest.raises(InterruptProcessingException):
        node(batch_size=4)
    assert len(comfyui.shown) == 2
    comfyui.interrupt_after = None
    assert node()[0].shape[0] == 1  # The next request is not interrupted.


def test_a_mistake_is_told_in_the_message(node):
    with pytest.raises(RequestError, match="width"):
        node(width=3)
    with pytest.raises(RequestError, match="steps"):
        node(steps=3)


def test_one_bundle_stays_loaded(node, monkeypatch):
    loaded = []
    load = Pipeline.load.__func__
    monkeypatch.setattr(Pipeline, "load", lambda bundle: loaded.append(bundle) or load(Pipeline, bundle))
    for _ in range(3):
        node(bundle=str(TINY))
    assert loaded == [str(TINY)]


def test_a_bundle_is_freed_before_the_next_one_is_loaded(node, monkeypatch):
    before, load = [], Pipeline.load.__func__

    def counted(bundle):
        assert not any(pipeline() for pipeline in before)
        pipeline = load(Pipeline, bundle)
        before.append(weakref.ref(pipeline))
        return pipeline

    monkeypatch.setattr(Pipeline, "load", counted)
    for bundle in (str(TINY), "emoji", str(TINY)):
        node(bundle=bundle)
    assert len(before) == 3
