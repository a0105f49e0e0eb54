"""Quantizing a student's graphs by their own activations: prompts and noise go through them, as at run time."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir
import torch
from tiue_runtime import bundle, noise

from export.int8 import Array, calibrate, evaluate, quantizable, quantize
from export.plan import Plan, latent_sizes
from tiue.text_encoder import encode_text

# Layers whose rounding leaves less signal over noise stay in float: 5 of 142 in the default model. At 0, its worst
# picture of four is 2 dB further from float's. At 32, it is 2 dB nearer and takes a tenth more time.
SIGNAL_DB = 28.0

# Things, creatures, people, places and styles. The parity check uses other prompts.
CALIBRATION_PROMPTS = (
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
    """Prompts and noise on their way through a student's graphs.

    Activations have other ranges at other sizes, and values beyond a measured range are cut off. So the pictures
    alternate between the default size and halves of either side.
    """

    def __init__(self, plan: Plan, progress: Callable[[str], None]):
        """Choose prompts and noise.

        Args:
            plan: of the export.
            progress: told how many layers were quantized.
        """
        manifest = self._manifest = plan.manifest
        self._progress = progress
        prompts = plan.options.calibration_prompts or CALIBRATION_PROMPTS
        (height, width), (half_height, half_width) = latent_sizes(manifest)
        sizes = [(height, width), (half_height, width), (height, half_width)]
        self._noise: list[Array] = [
            noise.gaussian(i, (manifest.latent_channels, *sizes[i % len(sizes)]))[None] for i in range(len(prompts))
        ]
        with torch.no_grad():
            self._text: list[Array] = [encode_text(plan.student.components, [prompt]).numpy() for prompt in prompts]
        self._latents: list[Array] = []

    def quantize(self, graphs: Mapping[str, ir.Model]) -> None:
        """Quantize the UNet's decoder or the image decoders, in place.

        The UNet must come before the image decoders, which take its latents. Other graphs stay: the text encoder, and
        the UNet's encoder, whose errors would reach the prediction of every timestep. They would take 5 dB from the
        worst picture of the default model, for a tenth of the time.

        Args:
            graphs: by name; both halves of the UNet together.
        """
        if bundle.UNET_DECODER in graphs:
            self._quantize_unet(graphs[bundle.UNET_ENCODER], graphs[bundle.UNET_DECODER])
            return
        for name in self._manifest.vae_graphs.values():
            if name in graphs:
                self._quantize(graphs[name], [{bundle.LATENTS: z_0} for z_0 in self._latents])

    def _quantize_unet(self, encoder: ir.Model, decoder: ir.Model) -> None:
        """Quantize the decoder, and keep the latents that both halves made in float."""
        pairs = zip(self._noise, self._text, strict=True)
        features = evaluate(encoder, [{bundle.LATENTS: z, bundle.TEXT: text} for z, text in pairs])
        schedule = self._manifest.schedules[self._manifest.default_steps]
        index = np.array(self._manifest.step_rows(self._manifest.default_steps), np.int64)
        weight = np.array(schedule.step_weights, np.float32)
        names = {str(value.name) for value in decoder.graph.inputs}

        def runs() -> Iterator[dict[str, Array]]:
            for of_picture in features:
                kept = {name: value for name, value in of_picture.items() if name in names}
                for i in range(len(index)):
                    yield {**kept, bundle.STEP_INDEX: index[i : i + 1], bundle.STEP_WEIGHT: weight[i : i + 1]}

        made = self._quantize(decoder, runs())
        steps = len(index)
        self._latents = [
            np.float32(schedule.noise_weight) * z
            + np.sum([run[bundle.CONTRIBUTION] for run in made[i * steps : (i + 1) * steps]], axis=0)
            for i, z in enumerate(self._noise)
        ]

    def _quantize(self, graph: ir.Model, runs: Iterable[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """Quantize a graph by the activations of runs. Returns the outputs that the runs had in float."""
        ranges, made = calibrate(graph, runs)
        total = len(quantizable(graph))
        done = quantize(graph, ranges, SIGNAL_DB)
        self._progress(f"int8: {done} of {total} layers between the first and the last; others lose too much")
        return made
