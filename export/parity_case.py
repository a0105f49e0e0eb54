"""One batch size and resolution of the parity check: inputs, PyTorch's outputs, and the outputs of the graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from tiue_runtime import bundle
from tiue_runtime.images import to_pil, to_unit
from tiue_runtime.safety import prepare
from torch import Tensor

from export.execution import Array, GraphSession
from export.plan import Plan
from tiue.components import decode_latents
from tiue.hoist import hoist
from tiue.safety_checker import score
from tiue.text_encoder import encode_text, tokenize

PARITY_PROMPTS = ("a red heart", "", "Zwölf Boxkämpfer, a very long prompt " * 20)

_CORNER, _LARGE_CORNER = 64, 128  # pixels: multiples of all that models and upscalers ask for


class Output(NamedTuple):
    """One output of a graph, and PyTorch's."""

    name: str
    made: Array
    expected: Array


class ParityCase:
    """A batch of prompts and noise.

    A graph takes what the graphs before it made, as at run time. PyTorch takes its own outputs.
    """

    def __init__(self, plan: Plan, batch: int, height: int, width: int, *, largest: bool = False):
        """Choose prompts and noise.

        Args:
            plan: of the export.
            batch, height, width: B, h and w.
            largest: run the decoder one timestep at a time only. All at once would take more memory than the rest of
                an export together.
        """
        self.name = f"{batch}, {height}x{width}"
        self._plan = plan
        self._largest = largest
        self._prompts = [PARITY_PROMPTS[i % len(PARITY_PROMPTS)] for i in range(batch)]
        channels = plan.manifest.latent_channels
        self._noise = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(batch))
        self._latents = height * width
        self._made: dict[str, Array] = {bundle.LATENTS: self._noise.numpy()}  # by the graphs so far

    @torch.no_grad()
    def outputs(self, session: GraphSession) -> list[Output]:
        """Run the next graph of the chain, and compute the same with PyTorch."""
        stages = {
            bundle.TEXT_ENCODER: self._text_outputs,
            bundle.UNET_ENCODER: self._feature_outputs,
            bundle.UNET_DECODER: self._latent_outputs,
            bundle.SAFETY_CHECKER: self._score_outputs,
            bundle.UPSCALER: self._enlarged_outputs,
        }
        return list(stages.get(session.graph, self._image_outputs)(session))

    @cached_property
    def _text(self) -> Tensor:
        """Text embeddings (B, L, D)."""
        return encode_text(self._plan.student.components, self._prompts)

    @cached_property
    def _features(self) -> tuple[Tensor, ...]:
        encoder, _ = hoist(self._plan.student.tiue(), [])
        return encoder(self._noise, self._text)

    @cached_property
    def _z_0(self) -> dict[int, Tensor]:
        """Latents (B, C, h, w) by step count. The largest case has those of the most steps only."""
        student = self._plan.student
        counts = [max(student.schedules)] if self._largest else list(student.schedules)
        return {n: student.tiue(n)(self._noise, self._text) for n in counts}

    @cached_property
    def _images(self) -> dict[str, Tensor]:
        """Images (B, 3, H, W) of the longest schedule's latents, by the name of the decoder's graph."""
        z_0 = self._z_0[max(self._z_0)]
        return {graph: decode_latents(vae, z_0) for graph, vae in self._plan.vaes.items()}

    def _run(self, session: GraphSession, feeds: Mapping[str, Array], steps: int = 1) -> dict[str, Array]:
        return session(feeds, rows=steps * len(self._noise), latents=self._latents)

    def _text_outputs(self, session: GraphSession) -> Iterator[Output]:
        ids, mask = tokenize(self._plan.student.components, self._prompts)
        feeds = {bundle.INPUT_IDS: ids.numpy()}
        if mask is not None:
            feeds[bundle.ATTENTION_MASK] = mask.numpy()
        self._made |= self._run(session, feeds)
        yield Output(bundle.TEXT, self._made[bundle.TEXT], self._text.numpy())

    def _feature_outputs(self, session: GraphSession) -> Iterator[Output]:
        features = self._run(session, {name: self._made[name] for name in (bundle.LATENTS, bundle.TEXT)})
        self._made |= features
        for (name, made), expected in zip(features.items(), self._features, strict=True):
            yield Output(name, made, expected.numpy())

    def _latent_outputs(self, session: GraphSession) -> Iterator[Output]:
        schedules = self._plan.manifest.schedules
        longest = max(schedules)
        if not self._largest:
            for steps in sorted(schedules):
                made = self._denoise(session, steps, at_once=steps)
                yield Output(f"latents, {steps} at once", made, self._z_0[steps].numpy())
        made = self._made["z_0"] = self._denoise(session, longest, at_once=1)  # The image decoders take these.
        yield Output(f"latents, {longest} one by one", made, self._z_0[longest].numpy())

    def _denoise(self, session: GraphSession, steps: int, at_once: int) -> Array:
        """z_0 = w_0 z_T + the sum of the decoder's contributions, `at_once` steps in a run."""
        manifest = self._plan.manifest
        schedule = manifest.schedules[steps]
        features = {name: value for name, value in self._made.items() if name in session.inputs}
        index = np.array(manifest.step_rows(steps), np.int64)
        weight = np.array(schedule.step_weights, np.float32)
        z_0 = np.float32(schedule.noise_weight) * self._made[bundle.LATENTS]
        for i in range(0, steps, at_once):
            chosen = slice(i, i + at_once)
            feeds = {**features, bundle.STEP_INDEX: index[chosen], bundle.STEP_WEIGHT: weight[chosen]}
            z_0 = z_0 + self._run(session, feeds, steps=at_once)[bundle.CONTRIBUTION]
        return z_0

    def _score_outputs(self, session: GraphSession) -> Iterator[Output]:
        """Prepare PyTorch's picture as the runtime does for the graph, and with transformers' own processor."""
        checker, how = self._plan.safety_checker, self._plan.manifest.safety_checker
        assert checker is not None and how is not None
        pictures = to_pil(to_unit(self._images[bundle.VAE_DECODER].numpy()))
        rows = [session({bundle.IMAGE: prepare(picture, how)}, rows=1, latents=1) for picture in pictures]
        made = np.concatenate([row[bundle.SCORE] for row in rows])
        yield Output(bundle.SCORE, made, score(checker, pictures).numpy())

    def _enlarged_outputs(self, session: GraphSession) -> Iterator[Output]:
        """Enlarge a corner of PyTorch's picture. A whole one would take minutes."""
        upscaler = self._plan.options.upscaler
        assert upscaler is not None
        side = _LARGE_CORNER if self._largest else _CORNER
        corner = self._images[bundle.VAE_DECODER][:, :, :side, :side].contiguous()
        rows, pixels = len(corner), corner[0, 0].numel()
        made = session({bundle.IMAGE: corner.numpy()}, rows=rows, latents=pixels)[bundle.ENLARGED]
        yield Output(bundle.ENLARGED, made, upscaler.module(corner).numpy())

    def _image_outputs(self, session: GraphSession) -> Iterator[Output]:
        made = self._run(session, {bundle.LATENTS: self._made["z_0"]})[bundle.IMAGE]
        name = bundle.IMAGE if len(self._plan.vaes) == 1 else f"{bundle.IMAGE}, {session.graph}"
        yield Output(name, made, self._images[session.graph].numpy())
