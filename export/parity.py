"""The gate: a bundle is published only if its graphs compute what PyTorch computes.

The graphs run in a chain, as at run time, so the difference in every row includes those of all graphs before it. Only
the safety checker and the upscaler take PyTorch's picture: they are models of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tiue_runtime import bundle
from tokenizers import Tokenizer

from export.errors import ParityError
from export.execution import Array, GraphSession, cuda_starts
from export.export_options import INT8_FLOOR_DB, PSNR_FLOOR_DB
from export.parity_case import PARITY_PROMPTS, ParityCase
from export.plan import Plan, latent_sizes
from export.translate import TO_CHANNELS_FIRST
from export.working_memory import GraphRun
from tiue.text_encoder import tokenize

# max |diff| over the standard deviation of the output. ONNX Runtime and PyTorch add float32 numbers in different
# orders, through hundreds of layers. 1e-5 is usual, a wrong weight or constant gives 1e-1, and no eye sees 1e-3.
FLOAT32_TOLERANCE = 1e-3
# Stands for the standard deviation and the range of scores, of which a batch has too few. Most lie that near to 0.
SCORES = 0.1
_PEAKS = {bundle.SAFETY_CHECKER: SCORES, bundle.UPSCALER: 2.0}


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
    gated: bool  # Whether the row must pass. Other rows are only reported.

    @property
    def relative(self) -> float:
        """The greatest difference, in standard deviations."""
        return self.max_diff / self.std if self.std else float("inf")

    def passes(self, floor_db: float | None) -> bool:
        """Return whether the row reaches a PSNR, or, with None, is within the float32 tolerance. NaN never passes."""
        return self.max_diff <= FLOAT32_TOLERANCE * self.std if floor_db is None else self.psnr_db >= floor_db


@dataclass
class Comparison:
    """The rows of all outputs, and the runs that made them."""

    rows: list[Row] = field(default_factory=list[Row])
    runs: list[GraphRun] = field(default_factory=list[GraphRun])


def compare_with_pytorch(directory: Path, plan: Plan) -> Comparison:
    """Compare the graphs of a bundle that is being built with the student that they were made from.

    Args:
        directory: holds the graphs and tokenizer.json.
        plan: of the export. Where everything is float32, every output is gated, else latents and images are.

    Returns:
        The comparison, which `judge` judges.

    Raises:
        ParityError: the tokenizer or a shape differs.
        ExportError: a graph cannot run.
    """
    manifest = plan.manifest
    _check_tokenizer(directory / bundle.TOKENIZER, plan)
    cases = _cases(plan)
    comparison = Comparison()
    compared: set[str] = set()  # files, which variants share
    for variant, files in manifest.variants.items():
        for graph in manifest.graphs:
            if files[graph] not in compared:
                _compare_graph(directory / files[graph], variant, graph, cases, plan, comparison)
            compared.add(files[graph])
    return comparison


def _compare_graph(
    path: Path, variant: str, graph: str, cases: Sequence[ParityCase], plan: Plan, comparison: Comparison
) -> None:
    """Run a graph on every case, and add to the comparison."""
    session = GraphSession(path, variant, graph)
    gated = plan.options.floor_db is None or graph in (
        bundle.UNET_DECODER,
        *plan.vaes,
        bundle.SAFETY_CHECKER,
        bundle.UPSCALER,
    )
    channels_last = variant == bundle.CUDA and graph == bundle.UNET_ENCODER
    for case in cases:
        for name, made, expected in case.outputs(session):
            if channels_last and made.ndim == 4:
                made = made.transpose(TO_CHANNELS_FIRST)
            peak = _PEAKS.get(graph, 2.0 if graph in plan.vaes else None)
            most, std, psnr = _difference(f"{name} ({case.name})", made, expected, peak)
            std = SCORES if graph == bundle.SAFETY_CHECKER else std
            comparison.rows.append(Row(variant, graph, name, case.name, most, std, psnr, gated))
    comparison.runs += session.runs


def judge(rows: list[Row], floor_db: float | None) -> None:
    """Raise ParityError, which names the first row that fails, unless every gated row passes.

    Args:
        rows: of a comparison.
        floor_db: the least PSNR; None asks for the float32 tolerance.
    """
    failed = [row for row in rows if row.gated and not row.passes(floor_db)]
    if failed:
        first = failed[0]
        exact = f"{FLOAT32_TOLERANCE} of its std {first.std:.3g}"
        limit = exact if floor_db is None else f"{floor_db} dB"
        raise ParityError(
            f"parity failed for {len(failed)} of {len(rows)} outputs, first {first.output} "
            f"({first.variant}; {first.case}): "
            f"max |diff| {first.max_diff:.3g}, PSNR {first.psnr_db:.1f} dB; the limit is {limit}"
        )


def table(rows: list[Row], precision: str) -> str:
    """Write rows as text, one a line. A star marks those that must pass.

    Args:
        rows: of a comparison. Of the features of a case, only the one that is furthest off is shown.
        precision: of the graphs.
    """
    lines = [f"{'variant':<9} {'output':<30} {'batch, latents':<15} {'max |diff|':>10} {'of std':>9} {'PSNR dB':>8}"]
    worst: dict[tuple[str, str], Row] = {}  # features, by variant and case
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


def _cases(plan: Plan) -> list[ParityCase]:
    """Make a case of the default size, one of half of it, and a batch of three that is not square.

    No shape is that of the trace. The last has a side of one pixel at the UNet's coarsest level.
    """
    default, half = latent_sizes(plan.manifest)
    multiple = plan.manifest.size_multiple // plan.manifest.pixels_per_latent
    return [
        ParityCase(plan, 1, *default, largest=True),
        ParityCase(plan, 1, *half),
        ParityCase(plan, 3, 3 * multiple, multiple),
    ]


def _check_tokenizer(path: Path, plan: Plan) -> None:
    components = plan.student.components
    ids, mask = tokenize(components, PARITY_PROMPTS)
    encodings = Tokenizer.from_file(str(path)).encode_batch(list(PARITY_PROMPTS))
    same = [e.ids for e in encodings] == ids.tolist() and len(encodings[0].ids) == plan.manifest.text_length
    if mask is not None:
        same = same and [e.attention_mask for e in encodings] == mask.tolist()
    if not same:
        raise ParityError(f"parity failed: {path.name} does not tokenize like the model's tokenizer")


def _difference(name: str, made: Array, expected: Array, peak: float | None) -> tuple[float, float, float]:
    """Return (max |diff|, standard deviation of `expected`, PSNR in dB).

    The peak of an image in [-1, 1] is 2. With None, an output has no fixed range, so the peak is the range it spans.
    """
    if made.shape != expected.shape:
        raise ParityError(f"parity failed for {name}: shape {made.shape}, expected {expected.shape}")
    difference = made.astype(np.float64) - expected
    rmse = float(np.sqrt(np.mean(difference**2)))
    peak = float(np.ptp(expected)) if peak is None else peak
    psnr = float(20 * np.log10(peak / rmse)) if rmse > 0 and peak > 0 else float("inf" if rmse == 0 else "-inf")
    return float(np.abs(difference).max()), float(expected.std()), psnr
