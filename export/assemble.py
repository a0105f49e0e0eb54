"""Assembling a bundle, stage by stage: plan, trace, rewrite, write, check, publish."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch
from tiue_runtime import bundle
from tiue_runtime.bundle.tokenizer_json import read_tokenizer
from tokenizers import Tokenizer

from export.calibrate import Calibration
from export.card import model_card
from export.export_options import Options
from export.fit_preview import fit_preview
from export.parity import Row, compare_with_pytorch, judge
from export.plan import Plan, make_plan
from export.publish import building, check_target, publish
from export.storage import store_float16, store_int8
from export.trace import (
    GraphTarget,
    forget_graphs,
    safety_checker_graph,
    unet_graphs,
    upscaler_graph,
    vae_decoder_graph,
)
from export.trace_text import text_encoder_graph
from export.triton import write_models
from export.working_memory import fit_runs, give_back
from export.writer import WEB_FILE_LIMIT, GraphWriter
from tiue.checkpoint import Student
from tiue.components import Components

Progress = Callable[[str], None]
Graphs = dict[str, ir.Model]  # by name, as in bundle.GRAPHS


def export_bundle(
    student: Student, out: Path, options: Options, progress: Progress, report: Callable[[list[Row]], None]
) -> bundle.Bundle:
    """Export a student to the directory `out`.

    Whatever happens, KeyboardInterrupt included, `out` is complete or as it was, and nothing else is left.

    Args:
        student: the model.
        out: the directory to make. A link stands for its target.
        options: how to export.
        progress: receives the name of every stage.
        report: receives the comparison of the graphs with PyTorch, before it is judged.

    Returns:
        The bundle, loaded from `out`.

    Raises:
        ExportError: the options do not fit the student, or `out` may not be replaced.
        ParityError: the graphs do not compute what PyTorch computes.
        OSError: a file cannot be written.
    """
    plan = make_plan(student, options)
    check = partial(check_target, manifest=bundle.MANIFEST, overwrite=options.overwrite)
    out = check(out)
    with building(out, progress) as directory:
        check(out)  # The bundle that a killed export had moved aside may have come back.
        limit = WEB_FILE_LIMIT if bundle.WEB in plan.targets else None
        writer = GraphWriter(directory, deduplicate=len(plan.targets) > 1, file_limit=limit)
        calibration = Calibration(plan, progress) if options.precision == "int8" else None
        for target, graphs in _trace(plan, progress):
            _rewrite(graphs, plan.options, calibration)
            _write(graphs, plan.manifest.variants[target], writer)
        write_tokenizer(directory / bundle.TOKENIZER, student.components)
        preview = fit_preview(student, plan.manifest, plan.vaes[bundle.VAE_DECODER], progress)
        progress("checking the graphs against PyTorch")
        comparison = compare_with_pytorch(directory, plan)
        report(comparison.rows)
        judge(comparison.rows, plan.options.floor_db)
        if plan.options.triton:
            write_models(directory, plan.manifest)
        _describe(directory, plan, replace(plan.manifest, preview=preview, memory=fit_runs(comparison.runs)))
        check(out)  # Another process may have made it.
        publish(directory, out)
    return bundle.Bundle.load(out)


def _trace(plan: Plan, progress: Progress) -> Iterator[tuple[str, Graphs]]:
    """Yield the graphs part by part, with their target.

    The order is: the text encoder; of every target the UNet, then each VAE; the safety checker; the upscaler. The
    caller empties each dictionary before it takes the next, so that one part's weights are in memory at a time.
    """
    student, options, targets = plan.student, plan.options, plan.targets
    dtype = torch.float16 if options.precision == "fp16" else torch.float32
    progress("exporting the text encoder")
    # int8 weights are made of float32.
    text_dtype = torch.float32 if options.text_encoder == "int8" else dtype
    yield targets[0], {bundle.TEXT_ENCODER: text_encoder_graph(student.components, text_dtype)}
    for name in targets:
        # CPUs compute in float32, whatever the files store, and a browser may have nothing but the CPU.
        target = GraphTarget(name, torch.float32 if name in (bundle.CPU, bundle.WEB) else dtype)
        progress(f"exporting the UNet's encoder and decoder, {name}")
        yield name, _unet(plan, target)
        for vae_name, vae in plan.vaes.items():
            progress(f"exporting {vae_name}, {name}")
            yield name, {vae_name: vae_decoder_graph(vae, target)}
        forget_graphs()
        give_back()
    if plan.safety_checker is not None:
        progress("exporting the safety checker")
        yield targets[0], {bundle.SAFETY_CHECKER: safety_checker_graph(plan.safety_checker)}
    if options.upscaler is not None:
        progress("exporting the upscaler")
        yield targets[0], {bundle.UPSCALER: upscaler_graph(options.upscaler)}


def _unet(plan: Plan, target: GraphTarget) -> Graphs:
    manifest = plan.manifest
    encoder, decoder = unet_graphs(plan.student.tiue(), manifest.decoder_timesteps, manifest.text_length, target)
    # Where weights are shared, the file of the decoder holds them: it is the larger.
    return {bundle.UNET_DECODER: decoder, bundle.UNET_ENCODER: encoder}


def _rewrite(graphs: Graphs, options: Options, calibration: Calibration | None) -> None:
    """Reduce the precision of graphs, in place, as the options want."""
    if calibration is not None:
        calibration.quantize(graphs)
    for name, graph in graphs.items():
        if options.stored == "int8" or (name == bundle.TEXT_ENCODER and options.text_encoder == "int8"):
            store_int8(graph)
        if options.stored != "fp32":
            store_float16(graph)


def _write(graphs: Graphs, files: Mapping[str, str], writer: GraphWriter) -> None:
    """Write graphs, and empty the dictionary."""
    for name in list(graphs):
        writer.write(graphs.pop(name), files[name])


def write_tokenizer(path: Path, components: Components) -> None:
    """Write tokenizer.json with padding and truncation to the text length, as the runtime expects it.

    Raises:
        BundleError: the tokenizer has a part that the runtime does not accept.
    """
    fast = components.tokenizer
    tokenizer = Tokenizer.from_str(fast.backend_tokenizer.to_str())
    length = fast.model_max_length
    tokenizer.enable_truncation(length, direction=fast.truncation_side)
    tokenizer.enable_padding(
        length=length, pad_id=fast.pad_token_id, pad_token=fast.pad_token, direction=fast.padding_side
    )
    tokenizer.save(str(path))
    read_tokenizer(path, length)


def _describe(directory: Path, plan: Plan, manifest: bundle.Manifest) -> None:
    """Write README.md and bundle.json."""
    made_from = " + ".join((plan.student.base_model, *plan.student.loras))
    card = model_card(manifest, made_from, plan.options.stored_text_encoder)
    (directory / "README.md").write_text(card, encoding="utf-8")
    bundle.write_bundle(directory, manifest)
