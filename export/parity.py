"""The gate: a bundle is published only if its graphs compute what PyTorch computes.

The graphs run in a chain, as the runtime runs them: every row includes the error of all before it.
"""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from tiue_runtime import bundle
from tiue_runtime.ort.devices import Device
from tiue_runtime.ort.placement import probe
from tiue_runtime.ort.sessions import available_providers, first_line
from tokenizers import Tokenizer

from export.cuda_definitions import lower
from export.errors import ExportError, ParityError
from export.options import INT8_FLOOR_DB, PSNR_FLOOR_DB
from export.translate import TO_CHANNELS_FIRST
from export.working_memory import fit, measured
from tiue.checkpoint import Student
from tiue.components import decode_latents
from tiue.hoist import hoist
from tiue.text_encoder import encode_text, tokenize, uses_attention_mask

# max |diff| over the standard deviation of the output. The two add float32 numbers in different orders,
# through hundreds of layers: 1e-5 is usual, a wrong weight or constant gives 1e-1, and no eye sees 1e-3.
FLOAT32_TOLERANCE = 1e-3

PROMPTS = ("a red heart", "", "Zwölf Boxkämpfer, a very long prompt " * 20)
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Row:
    """One output at one batch size and resolution, ONNX Runtime against PyTorch."""

    variant: str
    graph: str
    output: str
    case: str
    max_diff: float
    std: float  # of PyTorch's output
    psnr_db: float
    gated: bool  # whether it must pass, or is only reported

    @property
    def relative(self) -> float:
        """The greatest difference, in standard deviations."""
        return self.max_diff / self.std if self.std else float("inf")

    def passes(self, floor_db: float | None) -> bool:
        """Whether the row reaches a PSNR, or with None is within the float32 tolerance. NaN is neither."""
        return self.max_diff <= FLOAT32_TOLERANCE * self.std if floor_db is None else self.psnr_db >= floor_db


class Checker:
    """Compares the graphs of a bundle that is being built with the student they were made from.

    `memory` holds, after `check`, what the runs were measured to take: of the graphs whose batch the runtime can
    divide, in the variants that run on the CPU, where the system tells.
    """

    def __init__(
        self,
        directory: Path,
        manifest: bundle.Manifest,
        student: Student,
        vaes: Mapping[str, Any],
        exact: bool,
    ):
        """vaes: the VAE of each graph; exact: float32 tolerance, else PSNR of latents and images."""
        self.directory = directory
        self.manifest = manifest
        self.student = student
        self.vaes = vaes
        self.exact = exact
        self.memory: dict[str, dict[str, bundle.MemoryUse]] = {}

    def check(self) -> list[Row]:
        """Returns all rows, for the caller to judge. Raises ParityError if the tokenizer or a shape differs."""
        manifest = self.manifest
        _check_tokenizer(self.directory, manifest, self.student)
        multiple = manifest.size_multiple // manifest.pixels_per_latent
        height = manifest.default_height // manifest.pixels_per_latent
        width = manifest.default_width // manifest.pixels_per_latent
        half_height, half_width = (max(size // multiple // 2, 1) * multiple for size in (height, width))
        # No shape is that of the trace; the last has a side of one at the UNet's coarsest level.
        sizes = [(1, height, width), (1, half_height, half_width), (3, 3 * multiple, multiple)]
        cases = [_Case(self.student, self.vaes, *size, largest=size == sizes[0]) for size in sizes]
        rows: list[Row] = []
        checked: set[str] = set()  # files, which variants share
        for variant in manifest.variants:
            for graph in manifest.graphs:
                if manifest.variants[variant][graph] not in checked:
                    rows += self._compare(variant, graph, cases)
                checked.add(manifest.variants[variant][graph])
        return rows

    def _compare(self, variant: str, graph: str, cases: "list[_Case]") -> Iterator[Row]:
        with _one_line(graph):
            session = self._session(variant, graph)
        gated = self.exact or graph in (bundle.UNET_DECODER, *self.vaes)
        uses: list[tuple[int, int, int]] = []
        for case in cases:
            for output, made, expected in case.run(graph, session, self.manifest, uses):
                channels_last = variant == bundle.CUDA and graph == bundle.UNET_ENCODER and made.ndim == 4
                made = made.transpose(TO_CHANNELS_FIRST) if channels_last else made
                yield _row((variant, graph, output), case.name, made, expected, gated)
        if variant != bundle.CUDA and graph in (bundle.UNET_DECODER, *self.vaes) and uses:
            self.memory.setdefault(variant, {})[graph] = fit(uses)

    def _session(self, variant: str, graph: str) -> Any:
        """A session of the graph; without CUDA, of what its CUDA operators mean."""
        path = self.directory / self.manifest.variants[variant][graph]
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Memory that a run no longer needs is free again, so that the next one's can be measured.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        if variant != bundle.CUDA:
            return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        if cuda_starts():
            providers = [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
            return ort.InferenceSession(path, options, providers=providers)
        lowered = path.with_name(f".{path.name}.definitions")
        model = ir.load(path)
        lower(model)
        try:
            ir.save(model, lowered)  # beside the weights, to which it refers
            return ort.InferenceSession(lowered, options, providers=["CPUExecutionProvider"])
        finally:
            lowered.unlink(missing_ok=True)


def judge(rows: list[Row], floor_db: float | None) -> None:
    """Raise ParityError, naming the worst offender, unless every gated row passes."""
    failed = [row for row in rows if row.gated and not row.passes(floor_db)]
    if failed:
        worst = failed[0]
        exact = f"{FLOAT32_TOLERANCE} of its std {worst.std:.3g}"
        limit = exact if floor_db is None else f"{floor_db} dB"
        raise ParityError(
            f"parity failed for {len(failed)} of {len(rows)} outputs, first {worst.output} "
            f"({worst.variant}; {worst.case}): "
            f"max |diff| {worst.max_diff:.3g}, PSNR {worst.psnr_db:.1f} dB; the limit is {limit}"
        )


def table(rows: list[Row], precision: str) -> str:
    """The rows as text, one a line; a star marks those that the gate judges. precision: what the graphs compute in."""
    lines = [f"{'variant':<9} {'output':<30} {'batch, latents':<15} {'max |diff|':>10} {'of std':>9} {'PSNR dB':>8}"]
    worst: dict[tuple[str, str], Row] = {}  # of the many features of a case, the one that is furthest off
    for r in (row for row in rows if row.graph == bundle.UNET_ENCODER):
        key = r.variant, r.case
        worst[key] = max(worst.get(key, r), r, key=lambda row: row.relative)
    for r in rows:
        output = r.output
        if r.graph == bundle.UNET_ENCODER:
            if worst[r.variant, r.case] is not r:
                continue
            output = f"features, worst: {output}"
        figures = f"{r.max_diff:>10.2e} {r.relative:>9.1e} {r.psnr_db:>8.1f}"
        lines.append(f"{r.variant:<9} {output:<30} {r.case:<15} {figures}{' *' if r.gated else ''}")
    lines.append(
        f"* must pass: {FLOAT32_TOLERANCE} of std in float32, {PSNR_FLOOR_DB} dB in reduced precision, "
        f"{INT8_FLOOR_DB} dB in int8"
    )
    if any(r.variant == bundle.CUDA for r in rows) and not cuda_starts():
        lines.append("cuda: no GPU here, so its operators were replaced by their definitions and run on the CPU")
    if precision == "fp16" and not cuda_starts():
        lines.append(
            f"ONNX Runtime computes {precision} graphs in fp32 on the CPU: this is not how they round on a GPU"
        )
    return "\n".join(lines)


@cache
def cuda_starts() -> bool:
    """Whether a session really starts on a GPU: a wheel that was built for CUDA does not need one to be there."""
    return Device("cuda").provider in available_providers() and not probe(Device("cuda"))


@contextmanager
def _one_line(graph: str) -> Generator[None]:
    """Turn what ONNX Runtime raises into an ExportError."""
    try:
        yield
    except Exception as error:  # its own exceptions share no other base
        raise ExportError(f"{graph} cannot be checked: {first_line(error)}") from error


class _Case:
    """One batch size and resolution: inputs, what PyTorch makes of them, and what the graphs do, in a chain."""

    def __init__(self, student: Student, vaes: Mapping[str, Any], batch: int, height: int, width: int, largest: bool):
        self.largest = largest
        self.student = student
        self.vaes = vaes
        self.name = f"{batch}, {height}x{width}"
        self.prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
        channels = student.components.unet.config["in_channels"]
        self.noise = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(batch))
        self.made: dict[str, Array] = {bundle.LATENTS: self.noise.numpy()}

    def run(
        self, graph: str, session: Any, manifest: bundle.Manifest, uses: list[tuple[int, int, int]]
    ) -> Iterator[tuple[str, Array, Array]]:
        """Run a graph: (name, made by ONNX Runtime, expected) for each of its outputs. Adds the memory it took."""

        def run(feeds: Mapping[str, Array], rows: int = 1) -> dict[str, Array]:
            names = [output.name for output in session.get_outputs()]
            with _one_line(graph):
                values, taken = measured(lambda: session.run(names, dict(feeds)))
            if taken:
                uses.append((rows * len(self.noise), self.noise[0, 0].numel(), taken))
            return dict(zip(names, values, strict=True))

        inputs = {i.name for i in session.get_inputs()}
        with torch.no_grad():
            if graph == bundle.TEXT_ENCODER:
                yield from self._text_rows(run)
            elif graph == bundle.UNET_ENCODER:
                yield from self._feature_rows(run)
            elif graph == bundle.UNET_DECODER:
                yield from self._latent_rows(run, manifest, inputs)
            else:
                yield from self._image_rows(run, graph)

    @cached_property
    def text(self) -> Any:
        """Text embeddings, by PyTorch, as all that follows."""
        return encode_text(self.student.components, self.prompts)

    @cached_property
    def features(self) -> tuple[Any, ...]:
        encoder, _ = hoist(self.student.tiue(), [])
        return encoder(self.noise, self.text)

    @cached_property
    def z_0(self) -> dict[int, Any]:
        """Latents, by step count; of the largest case for the most steps only."""
        counts = [max(self.student.schedules)] if self.largest else list(self.student.schedules)
        return {n: self.student.tiue(n)(self.noise, self.text) for n in counts}

    @cached_property
    def images(self) -> dict[str, Any]:
        """Pictures of the longest schedule's latents, by the graph that stands for the VAE."""
        z_0 = self.z_0[max(self.z_0)]
        return {graph: decode_latents(vae, z_0) for graph, vae in self.vaes.items()}

    def _text_rows(self, run: Any) -> Any:
        ids, mask = tokenize(self.student.components, self.prompts)
        feeds = {bundle.INPUT_IDS: ids.numpy()}
        if mask is not None:
            feeds[bundle.ATTENTION_MASK] = mask.numpy()
        self.made |= run(feeds)
        yield bundle.TEXT, self.made[bundle.TEXT], self.text.numpy()

    def _feature_rows(self, run: Any) -> Any:
        outputs = run({name: self.made[name] for name in (bundle.LATENTS, bundle.TEXT)})
        self.made |= outputs
        for (name, made), expected in zip(outputs.items(), self.features, strict=True):
            yield name, made, expected.numpy()

    def _latent_rows(self, run: Any, manifest: bundle.Manifest, inputs: set[str]) -> Any:
        fixed = {name: value for name, value in self.made.items() if name in inputs}
        longest = max(manifest.schedules)
        if not self.largest:  # there, all steps at once would take more memory than all the rest of an export
            for steps in sorted(manifest.schedules):
                made = self._sum(run, manifest, fixed, steps, at_once=steps)
                yield f"latents, {steps} at once", made, self.z_0[steps].numpy()
        self.made["z_0"] = self._sum(run, manifest, fixed, longest, at_once=1)  # becomes the picture
        yield f"latents, {longest} one by one", self.made["z_0"], self.z_0[longest].numpy()

    def _sum(self, run: Any, manifest: bundle.Manifest, fixed: Mapping[str, Array], steps: int, at_once: int) -> Array:
        """z_0 = w_0 z_T + the decoder's contributions, `at_once` steps a run."""
        schedule = manifest.schedules[steps]
        index = np.array(manifest.step_rows(steps), np.int64)
        weight = np.array(schedule.step_weights, np.float32)
        z_0 = np.float32(schedule.noise_weight) * self.made[bundle.LATENTS]
        for i in range(0, steps, at_once):
            chosen = slice(i, i + at_once)
            feeds = {**fixed, bundle.STEP_INDEX: index[chosen], bundle.STEP_WEIGHT: weight[chosen]}
            z_0 = z_0 + run(feeds, rows=at_once)[bundle.CONTRIBUTION]
        return z_0

    def _image_rows(self, run: Any, graph: str) -> Any:
        made = run({bundle.LATENTS: self.made["z_0"]})[bundle.IMAGE]
        name = bundle.IMAGE if len(self.vaes) == 1 else f"{bundle.IMAGE}, {graph}"
        yield name, made, self.images[graph].numpy()


def _check_tokenizer(directory: Path, manifest: bundle.Manifest, student: Student) -> None:
    ids, mask = tokenize(student.components, PROMPTS)
    encodings = Tokenizer.from_file(str(directory / bundle.TOKENIZER)).encode_batch(list(PROMPTS))
    same = [e.ids for e in encodings] == ids.tolist() and len(encodings[0].ids) == manifest.text_length
    if uses_attention_mask(student.components.text_encoder) and mask is not None:
        same = same and [e.attention_mask for e in encodings] == mask.tolist()
    if not same:
        raise ParityError(f"parity failed: {bundle.TOKENIZER} does not tokenise like the model's tokenizer")


def _row(names: tuple[str, str, str], case: str, made: Array, expected: Array, gated: bool) -> Row:
    """names: variant, graph, output."""
    output = names[-1]
    if made.shape != expected.shape:
        raise ParityError(f"parity failed for {output} ({case}): shape {made.shape}, expected {expected.shape}")
    difference = made.astype(np.float64) - expected
    rmse = float(np.sqrt(np.mean(difference**2)))
    # The peak of an image in [-1,1] is 2; other outputs have no fixed range, so theirs is what they span.
    peak = 2.0 if output.startswith(bundle.IMAGE) else float(np.ptp(expected))
    psnr = float(20 * np.log10(peak / rmse)) if rmse > 0 and peak > 0 else float("inf" if rmse == 0 else "-inf")
    return Row(*names, case, float(np.abs(difference).max()), float(expected.std()), psnr, gated)
