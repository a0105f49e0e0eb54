"""Assembling a bundle: built in a temporary directory, checked, and only then moved into place."""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from diffusers import AutoencoderTiny  # pyright: ignore[reportPrivateImportUsage]
from tiue_runtime import bundle
from tiue_runtime.bundle.tokenizer_json import read_tokenizer
from tokenizers import Tokenizer

from export.calibrate import PROMPTS, Calibration
from export.card import model_card
from export.errors import ExportError
from export.fit_preview import fit_preview
from export.graphs import Form, forget_graphs, unet_graphs, vae_decoder_graph
from export.options import Options
from export.parity import Checker, Row, judge
from export.publish import building, check_target, publish
from export.source import check_tiny_vae
from export.storage import store_float16, store_int8
from export.text_encoder import text_encoder_graph
from export.working_memory import give_back
from export.writer import EXTERNAL_ABOVE, GraphWriter
from tiue.checkpoint import Student
from tiue.components import Components


def export_bundle(
    student: Student,
    out: Path,
    options: Options,
    progress: Callable[[str], None],
    report: Callable[[list[Row]], None],
) -> bundle.Bundle:
    """Export `student` to the directory `out`.

    Args:
        progress: told each stage.
        report: given the parity table's rows before they are judged.

    Raises ExportError (ParityError if the graphs do not compute the same), OSError. Whatever happens,
    KeyboardInterrupt included, `out` is complete or as it was, and nothing else is left.
    """
    check_target(out, bundle.MANIFEST, overwrite=options.overwrite)
    options = replace(options, target=options.target or _default_targets(student))
    if options.tiny_vae is not None:
        check_tiny_vae(options.tiny_vae, student.components)
    out = out.resolve()  # The target of a link is replaced, not the link.
    with building(out, progress) as directory:
        check_target(out, bundle.MANIFEST, overwrite=options.overwrite)  # A killed export may have left one aside.
        manifest = _manifest(student, options)
        _write_graphs(directory, student, manifest, options, progress)
        write_tokenizer(directory / bundle.TOKENIZER, student.components)
        vaes = dict(_image_decoders(student, options, manifest))
        manifest = replace(manifest, preview=fit_preview(student, manifest, vaes[bundle.VAE_DECODER], progress))
        progress("checking the graphs against PyTorch")
        checker = Checker(directory, manifest, student, vaes, exact=options.floor_db is None)
        rows = checker.check()
        report(rows)
        judge(rows, options.floor_db)
        manifest = replace(manifest, memory=checker.memory)
        card = model_card(manifest, student.base_model, options.stored_text_encoder)
        (directory / "README.md").write_text(card, encoding="utf-8")
        bundle.write_bundle(directory, manifest)
        publish(directory, out)
    return bundle.Bundle.load(out)


def _write_graphs(
    directory: Path,
    student: Student,
    manifest: bundle.Manifest,
    options: Options,
    progress: Callable[[str], None],
) -> None:
    writer = GraphWriter(directory, share=len(options.target) > 1)
    dtype = torch.float16 if options.precision == "fp16" else torch.float32

    def write(variant: str, name: str, graph: ir.Model) -> None:
        if options.stored == "fp16":
            store_float16(graph)
        writer.write(graph, manifest.variants[variant][name])

    progress("exporting the text encoder")
    int8 = options.text_encoder == "int8"
    text_encoder = text_encoder_graph(student.components, torch.float32 if int8 else dtype)  # int8 is of float32
    if int8:
        store_int8(text_encoder)
    write(options.target[0], bundle.TEXT_ENCODER, text_encoder)
    del text_encoder
    for target in options.target:
        # What is stored in fp16 the CPU computes in fp32 in any case.
        form = Form(target, torch.float32 if target == bundle.CPU else dtype)
        progress(f"exporting the UNet's encoder and decoder, {target}")
        graphs = list(unet_graphs(student.tiue(), manifest.decoder_timesteps, manifest.text_length, form))
        calibration = None
        if options.precision == "int8":
            calibration = Calibration(student, manifest, options.calibration_prompts or PROMPTS, progress)
            calibration.unet(*graphs)
        write(target, bundle.UNET_DECODER, graphs.pop())
        write(target, bundle.UNET_ENCODER, graphs.pop())
        for name, vae in _image_decoders(student, options, manifest):
            progress(f"exporting {name}, {target}")
            graph = vae_decoder_graph(vae, form)
            if calibration:
                calibration.vae(graph)
            write(target, name, graph)
        forget_graphs()
        give_back()


def _default_targets(student: Student) -> tuple[str, ...]:
    size = sum(p.numel() * p.element_size() for p in student.components.unet.parameters())
    return (bundle.PORTABLE, bundle.CPU) if size > EXTERNAL_ABOVE else (bundle.PORTABLE,)


def _image_decoders(student: Student, options: Options, manifest: bundle.Manifest) -> Iterator[tuple[str, Any]]:
    """Yield the graph's name and the module of each VAE, the default first."""
    for kind, name in manifest.vae_graphs.items():
        tiny = kind == bundle.TINY and options.tiny_vae is not None
        yield name, options.tiny_vae if tiny else student.components.vae


def _variants(options: Options, vaes: Iterable[str]) -> dict[str, dict[str, str]]:
    """The file of each graph, for each target. Special operators would gain nothing in the text encoder."""
    variants: dict[str, dict[str, str]] = {}
    for target in options.target:
        suffix = "" if target == bundle.PORTABLE else f".{target}"
        names = (bundle.UNET_ENCODER, bundle.UNET_DECODER, *bundle.vae_graphs(vaes).values())
        variants[target] = {name: f"{name}{suffix}.onnx" for name in names}
        variants[target][bundle.TEXT_ENCODER] = bundle.GRAPH_FILES[bundle.TEXT_ENCODER]
    return variants


def _vaes(student: Student, options: Options) -> tuple[str, ...]:
    """Return the kinds of VAEs, the default first."""
    own = bundle.TINY if isinstance(student.components.vae, AutoencoderTiny) else bundle.KL
    if own == bundle.TINY and options.vae:
        raise ExportError("`vae`: the model's own VAE is tiny already")
    return options.vae or (own,)


def _manifest(student: Student, options: Options) -> bundle.Manifest:
    components = student.components
    geometry = components.geometry
    schedules: dict[int, bundle.Schedule] = {}
    for steps, timesteps in sorted(student.schedules.items()):
        s = components.noise_schedule.closed_form(timesteps)
        schedules[steps] = bundle.Schedule(s.timesteps, s.noise_weight, s.step_weights)
    vaes = _vaes(student, options)
    decoder_timesteps = {t for s in schedules.values() for t in s.timesteps}
    return bundle.Manifest(
        name=options.name or components.name,
        license=components.license,
        created_from={
            "base_model": student.base_model,
            "tiue": version("tiue"),
            "text_encoder": options.stored_text_encoder,
        },
        precision=options.precision,
        weights="int8" if options.precision == "int8" else options.stored,
        latent_channels=geometry.channels,
        pixels_per_latent=geometry.pixels_per_latent,
        default_height=geometry.height * geometry.pixels_per_latent,
        default_width=geometry.width * geometry.pixels_per_latent,
        size_multiple=geometry.multiple,
        text_length=components.tokenizer.model_max_length,
        encoder_timestep=student.encoder_timestep,
        decoder_timesteps=tuple(sorted(decoder_timesteps, reverse=True)),
        schedules=schedules,
        default_steps=max(schedules),
        variants=_variants(options, vaes),
        vaes=vaes,
    )


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
