"""Quantising a student's graphs by what it draws: prompts and noise go through them in turn, as at run time."""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from tiue_runtime import bundle, noise

from export.int8 import Array, calibrate, evaluate, quantise
from tiue.checkpoint import Student
from tiue.text_encoder import encode_text

# Layers whose rounding leaves less signal over noise than this stay in float: of the default model 5 of 142. At 0 its
# worst picture of four is 2 dB further from float's, at 32 it is 2 dB nearer and takes a tenth more time.
SIGNAL_DB = 28.0

# Things, creatures, people, places, styles and texts: none of them is in the gate.
PROMPTS = (
    "a lighthouse on a cliff in a storm, oil painting",
    "portrait photo of an old fisherman with a white beard",
    "a bowl of ramen, top view",
    "a dog running on the beach",
    "a red sports car in a city at night, neon lights",
    "an astronaut riding a horse, digital art",
    "a smiling face with sunglasses",
    "a wooden cabin in a snowy forest",
    "a cup of coffee and a croissant on a table",
    "a green parrot in the jungle, close-up",
    "isometric drawing of a small house",
    "a blue butterfly on a yellow flower",
    "a crowded market street in Morocco",
    "a steam train crossing a stone bridge",
    "pencil sketch of a ballet dancer",
    "a bouquet of roses in a vase",
)


class Calibration:
    """Prompts and noise on their way through a student's graphs, in turn at its own size and at half of either side.

    Activations have other ranges in other sizes; what is beyond a measured range is cut off.
    """

    def __init__(
        self, student: Student, manifest: bundle.Manifest, prompts: Sequence[str], report: Callable[[str], None]
    ):
        """report: told what was quantised."""
        self._manifest, self._report = manifest, report
        sizes = _sizes(manifest)
        self._noise: list[Array] = [
            noise.gaussian(i, (manifest.latent_channels, *sizes[i % len(sizes)]))[None] for i in range(len(prompts))
        ]
        with torch.no_grad():
            self._text: list[Array] = [encode_text(student.components, [prompt]).numpy() for prompt in prompts]
        self._latents: list[Array] = []

    def unet(self, encoder: ir.Model, decoder: ir.Model) -> None:
        """Quantise the decoder, in place, and keep the latents that both halves made before.

        The encoder stays in float32: it runs once, and what it loses would be in the prediction of every timestep. Of
        the default model's pictures it would take 5 dB in the worst case of the gate, for a tenth of the time.
        """
        pairs = zip(self._noise, self._text, strict=True)
        features = evaluate(encoder, [{bundle.LATENTS: z, bundle.TEXT: text} for z, text in pairs])
        schedule = self._manifest.schedules[self._manifest.default_steps]
        index = np.array(self._manifest.step_rows(self._manifest.default_steps), np.int64)
        weight = np.array(schedule.step_weights, np.float32)
        names = {str(value.name) for value in decoder.graph.inputs}

        def runs() -> Iterator[dict[str, Array]]:
            for of_one in features:
                kept = {name: value for name, value in of_one.items() if name in names}
                for i in range(len(index)):
                    yield {**kept, bundle.STEP_INDEX: index[i : i + 1], bundle.STEP_WEIGHT: weight[i : i + 1]}

        made = self._quantise(decoder, runs())
        steps = len(index)
        self._latents = [
            np.float32(schedule.noise_weight) * z
            + np.sum([run[bundle.CONTRIBUTION] for run in made[i * steps : (i + 1) * steps]], axis=0)
            for i, z in enumerate(self._noise)
        ]

    def vae(self, graph: ir.Model) -> None:
        """Quantise an image decoder, in place, by the latents that the UNet made."""
        self._quantise(graph, [{bundle.LATENTS: z_0} for z_0 in self._latents])

    def _quantise(self, graph: ir.Model, runs: Any) -> list[dict[str, Array]]:
        ranges, made = calibrate(graph, runs)
        done, of = quantise(graph, ranges, SIGNAL_DB)
        self._report(f"int8: {done} of {of} layers between the first and the last; others lose too much")
        return made


def _sizes(manifest: bundle.Manifest) -> list[tuple[int, int]]:
    """Heights and widths of latents."""
    multiple = manifest.size_multiple // manifest.pixels_per_latent
    height, width = (side // manifest.pixels_per_latent for side in (manifest.default_height, manifest.default_width))
    half_height, half_width = (max(side // multiple // 2, 1) * multiple for side in (height, width))
    return [(height, width), (half_height, width), (height, half_width)]
