"""The gate: a bundle is published only if its graphs compute what PyTorch computes.

The graphs run in a chain, as the runtime runs them: every row includes the error of all before it.
"""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from tiue_runtime import bundle
from tokenizers import Tokenizer

from tiue.checkpoint import Student
from tiue.components import tokenize, uses_attention_mask

from .errors import ParityError

# max |diff| over the standard deviation of the output. The two add float32 numbers in different orders,
# through hundreds of layers: 1e-5 is usual, a wrong weight or constant gives 1e-1, and no eye sees 1e-3.
FLOAT32_TOLERANCE = 1e-3
# Reduced precision: the floor that Core ML's Stable Diffusion converter uses, too.
PSNR_FLOOR_DB = 35.0

PROMPTS = ("a red heart", "", "Zwölf Boxkämpfer, a very long prompt " * 20)
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Row:
    """One output at one batch size and resolution, ONNX Runtime against PyTorch."""

    output: str
    case: str
    max_diff: float
    std: float  # of PyTorch's output
    psnr_db: float
    gated: bool  # whether it must pass, or is only reported

    def passes(self, exact: bool) -> bool:
        """Whether the row is within the float32 tolerance, or else above the PSNR floor. NaN is neither."""
        return self.max_diff <= FLOAT32_TOLERANCE * self.std if exact else self.psnr_db >= PSNR_FLOOR_DB


def check(directory: Path, manifest: bundle.Manifest, student: Student, exact: bool) -> list[Row]:
    """Compare every graph of the bundle being built in `directory` with `student`.

    Args:
        exact: float32 tolerance; otherwise (reduced precision) the PSNR floor, on latents and images only.

    Returns all rows. Raises ParityError if the tokenizer differs; the rows are for the caller to judge.
    """
    _check_tokenizer(directory, manifest, student)
    multiple = manifest.size_multiple // manifest.pixels_per_latent
    default_height = manifest.default_height // manifest.pixels_per_latent
    default_width = manifest.default_width // manifest.pixels_per_latent
    # Not the shapes of the trace; the second has a side of one at the UNet's coarsest level.
    cases = [_Case(student, 1, default_height, default_width), _Case(student, 3, 3 * multiple, multiple)]
    rows: list[Row] = []
    for graph in bundle.GRAPHS:
        path = directory / manifest.variants[bundle.PORTABLE][graph]
        session = ort.InferenceSession(path, _session_options(), providers=["CPUExecutionProvider"])
        for case in cases:
            gated = exact or graph in (bundle.UNET_DECODER, bundle.VAE_DECODER)
            rows += [_row(n, case.name, *pair, gated) for n, pair in case.run(graph, session, manifest)]
    return rows


def judge(rows: list[Row], exact: bool) -> None:
    """Raise ParityError, naming the worst offender, unless every gated row passes."""
    failed = [row for row in rows if row.gated and not row.passes(exact)]
    if failed:
        worst = failed[0]
        limit = f"{FLOAT32_TOLERANCE} of its std {worst.std:.3g}" if exact else f"{PSNR_FLOOR_DB} dB"
        raise ParityError(
            f"parity failed for {len(failed)} of {len(rows)} outputs, first {worst.output} ({worst.case}): "
            f"max |diff| {worst.max_diff:.3g}, PSNR {worst.psnr_db:.1f} dB; the limit is {limit}"
        )


def table(rows: list[Row]) -> str:
    """The rows as text, one a line; a star marks those that the gate judges."""
    lines = [f"{'output':<26} {'batch, latents':<16} {'max |diff|':>10} {'of std':>9} {'PSNR dB':>8}"]
    for r in rows:
        relative = r.max_diff / r.std if r.std else float("inf")
        figures = f"{r.max_diff:>10.2e} {relative:>9.1e} {r.psnr_db:>8.1f}"
        lines.append(f"{r.output:<26} {r.case:<16} {figures}{' *' if r.gated else ''}")
    lines.append(f"* must pass: {FLOAT32_TOLERANCE} of std in float32, {PSNR_FLOOR_DB} dB with smaller weights")
    return "\n".join(lines)


class _Case:
    """One batch size and resolution: inputs, and what the graphs have made of them so far."""

    def __init__(self, student: Student, batch: int, height: int, width: int):
        self.student = student
        self.name = f"{batch}, {height}x{width}"
        self.prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
        channels = student.components.unet.config["in_channels"]
        self.noise = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(batch))
        self.made: dict[str, Array] = {bundle.LATENTS: self.noise.numpy()}

    def run(self, graph: str, session: Any, manifest: bundle.Manifest) -> Iterator[tuple[str, tuple[Array, Array]]]:
        """Run a graph: (name, (made by ONNX Runtime, expected)) for each of its outputs."""
        step = {
            bundle.TEXT_ENCODER: self._text,
            bundle.UNET_ENCODER: self._features,
            bundle.UNET_DECODER: self._latents,
            bundle.VAE_DECODER: self._image,
        }[graph]
        with torch.no_grad():
            yield from step(session, manifest)

    def _text(self, session: Any, manifest: bundle.Manifest) -> Any:
        components = self.student.components
        ids, mask = tokenize(components, self.prompts)
        self.text = components.text_encoder(input_ids=ids, attention_mask=mask)[0]
        feeds = {bundle.INPUT_IDS: ids.numpy()}
        if mask is not None:
            feeds[bundle.ATTENTION_MASK] = mask.numpy()
        self.made |= _run(session, feeds)
        yield bundle.TEXT, (self.made[bundle.TEXT], self.text.numpy())

    def _features(self, session: Any, manifest: bundle.Manifest) -> Any:
        features = self.student.tiue().encode(self.noise, self.text)
        outputs = _run(session, {name: self.made[name] for name in (bundle.LATENTS, bundle.TEXT)})
        self.made |= outputs
        for (name, made), expected in zip(outputs.items(), (features.mid, *features.skips), strict=True):
            yield name, (made, expected.numpy())

    def _latents(self, session: Any, manifest: bundle.Manifest) -> Any:
        for steps in sorted(manifest.schedules):  # the longest last: its latents become the picture
            self.z_0 = self.student.tiue(steps)(self.noise, self.text)
            self.made["z_0"] = self._sum(session, manifest, steps, at_once=steps)
            yield f"latents, {steps} at once", (self.made["z_0"], self.z_0.numpy())
        longest = max(manifest.schedules)
        if longest > 1:
            one_by_one = self._sum(session, manifest, longest, at_once=1)
            yield f"latents, {longest} one by one", (one_by_one, self.z_0.numpy())

    def _sum(self, session: Any, manifest: bundle.Manifest, steps: int, at_once: int) -> Array:
        """z_0 = w_0 z_T + the decoder's contributions, `at_once` steps a run."""
        schedule = manifest.schedules[steps]
        index = np.array(manifest.step_rows(steps), np.int64)
        weight = np.array(schedule.step_weights, np.float32)
        feeds = {i.name: self.made[i.name] for i in session.get_inputs() if i.name in self.made}
        z_0 = np.float32(schedule.noise_weight) * self.made[bundle.LATENTS]
        for i in range(0, steps, at_once):
            rows = slice(i, i + at_once)
            chosen = {bundle.STEP_INDEX: index[rows], bundle.STEP_WEIGHT: weight[rows]}
            z_0 = z_0 + _run(session, feeds | chosen)[bundle.CONTRIBUTION]
        return z_0

    def _image(self, session: Any, manifest: bundle.Manifest) -> Any:
        scale, shift = manifest.vae_scaling_factor, manifest.vae_shift_factor
        expected = self.student.components.vae.decode(self.z_0 / scale + shift, return_dict=False)[0]
        made = _run(session, {bundle.LATENTS: self.made["z_0"] / np.float32(scale) + np.float32(shift)})
        yield bundle.IMAGE, (made[bundle.IMAGE], expected.numpy())


def _check_tokenizer(directory: Path, manifest: bundle.Manifest, student: Student) -> None:
    ids, mask = tokenize(student.components, PROMPTS)
    encodings = Tokenizer.from_file(str(directory / bundle.TOKENIZER)).encode_batch(list(PROMPTS))
    same = [e.ids for e in encodings] == ids.tolist() and len(encodings[0].ids) == manifest.text_length
    if uses_attention_mask(student.components.text_encoder) and mask is not None:
        same = same and [e.attention_mask for e in encodings] == mask.tolist()
    if not same:
        raise ParityError(f"parity failed: {bundle.TOKENIZER} does not tokenise like the model's tokenizer")


def _run(session: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _session_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return options


def _row(output: str, case: str, made: Array, expected: Array, gated: bool) -> Row:
    if made.shape != expected.shape:
        raise ParityError(f"parity failed for {output} ({case}): shape {made.shape}, expected {expected.shape}")
    difference = made.astype(np.float64) - expected
    rmse = float(np.sqrt(np.mean(difference**2)))
    # The peak of an image in [-1,1] is 2; other outputs have no fixed range, so theirs is what they span.
    peak = 2.0 if output == bundle.IMAGE else float(np.ptp(expected))
    psnr = float(20 * np.log10(peak / rmse)) if rmse > 0 and peak > 0 else float("inf" if rmse == 0 else "-inf")
    return Row(output, case, float(np.abs(difference).max()), float(expected.std()), psnr, gated)
