"""Assembling a bundle: built in a temporary directory, checked, and only then moved into place."""

# torch, diffusers, transformers, optimum and onnxruntime are partly or not typed; ours is checked in full.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from tiue_runtime import bundle
from tokenizers import Tokenizer

from tiue.checkpoint import Student
from tiue.components import Components
from tiue.schedule import closed_form

from .card import model_card
from .errors import ExportError
from .files import write_graph
from .graphs import unet_graphs
from .optimum_parts import text_encoder_graph, vae_decoder_graph
from .parity import Row, check, judge
from .precision import store_float16, store_int8


@dataclass(frozen=True)
class Options:
    """What a bundle may differ in."""

    name: str
    weights: str = "fp32"  # how the files store them: fp32 or fp16
    text_encoder: str = "fp32"  # or int8
    overwrite: bool = False

    @property
    def exact(self) -> bool:
        """Whether the bundle must match PyTorch to float32 rounding."""
        return (self.weights, self.text_encoder) == ("fp32", "fp32")


def check_target(out: Path, overwrite: bool) -> None:
    """Raise ExportError unless `out` is free, an empty directory, or a bundle that may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ExportError(f"--out {out} exists; choose another, or replace it with --overwrite")
    if not (out / bundle.MANIFEST).is_file():
        raise ExportError(f"--out {out} exists and is not a bundle, so --overwrite does not replace it")


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
    check_target(out, options.overwrite)
    out = out.absolute()
    building = out.with_name(f".{out.name}.{os.getpid()}.tmp")  # the same file system, so that moving is renaming
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        building.mkdir(parents=True)
        manifest = _manifest(student, options)
        _write_graphs(building, student, manifest, options, progress)
        _write_tokenizer(building / bundle.TOKENIZER, student.components)
        progress("checking the graphs against PyTorch")
        rows = check(building, manifest, student, options.exact)
        report(rows)
        judge(rows, options.exact)
        (building / "README.md").write_text(model_card(manifest), encoding="utf-8")
        bundle.write_bundle(building, manifest)
        _move_into_place(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if not out.exists():
            for parent in missing:
                with suppress(OSError):  # never made, or no longer only ours
                    parent.rmdir()
    return bundle.Bundle.load(out)


def _write_graphs(
    directory: Path,
    student: Student,
    manifest: bundle.Manifest,
    options: Options,
    progress: Callable[[str], None],
) -> None:
    def write(name: str, graph: ir.Model) -> None:
        if options.weights == "fp16":
            store_float16(graph)
        write_graph(graph, directory / bundle.GRAPH_FILES[name])

    progress("exporting the text encoder")
    text_encoder = text_encoder_graph(student.components)
    if options.text_encoder == "int8":
        store_int8(text_encoder)
    write(bundle.TEXT_ENCODER, text_encoder)
    progress("exporting the UNet's encoder and decoder")
    encoder, decoder = unet_graphs(student.tiue(), manifest.decoder_timesteps, manifest.text_length)
    write(bundle.UNET_ENCODER, encoder)
    write(bundle.UNET_DECODER, decoder)
    progress("exporting the VAE's decoder")
    write(bundle.VAE_DECODER, vae_decoder_graph(student.components))


def _manifest(student: Student, options: Options) -> bundle.Manifest:
    components = student.components
    vae, unet = components.vae.config, components.unet
    pixels_per_latent = 2 ** (len(vae["block_out_channels"]) - 1)
    sample = unet.config["sample_size"]
    height, width = (sample, sample) if isinstance(sample, int) else sample
    schedules: dict[int, bundle.Schedule] = {}
    for steps, timesteps in sorted(student.schedules.items()):
        s = closed_form(components.scheduler_config, timesteps)
        schedules[steps] = bundle.Schedule(s.timesteps, s.noise_weight, s.step_weights)
    decoder_timesteps = {t for s in schedules.values() for t in s.timesteps}
    return bundle.Manifest(
        name=options.name,
        licence=components.licence,
        created_from={
            "base_model": student.base_model,
            "tiue": version("tiue"),
            "weights": options.weights,
            "text_encoder": options.text_encoder,
        },
        latent_channels=unet.config["in_channels"],
        pixels_per_latent=pixels_per_latent,
        default_height=height * pixels_per_latent,
        default_width=width * pixels_per_latent,
        size_multiple=pixels_per_latent * 2**unet.num_upsamplers,
        vae_scaling_factor=vae["scaling_factor"],
        vae_shift_factor=vae.get("shift_factor") or 0.0,
        text_length=components.tokenizer.model_max_length,
        encoder_timestep=student.encoder_timestep,
        decoder_timesteps=tuple(sorted(decoder_timesteps, reverse=True)),
        schedules=schedules,
        default_steps=max(schedules),
        precision=options.weights,
        variants={bundle.PORTABLE: dict(bundle.GRAPH_FILES)},
    )


def _write_tokenizer(path: Path, components: Components) -> None:
    """tokenizer.json with padding and truncation to the text length set, as the runtime expects it."""
    fast = components.tokenizer
    tokenizer = Tokenizer.from_str(fast.backend_tokenizer.to_str())
    length = fast.model_max_length
    tokenizer.enable_truncation(length, direction=fast.truncation_side)
    tokenizer.enable_padding(
        length=length, pad_id=fast.pad_token_id, pad_token=fast.pad_token, direction=fast.padding_side
    )
    tokenizer.save(str(path))


def _move_into_place(building: Path, out: Path) -> None:
    """Rename; a bundle that is there steps aside first, and comes back if that fails."""
    if not out.exists():
        building.rename(out)
        return
    aside = out.with_name(f".{out.name}.{os.getpid()}.old")
    out.rename(aside)
    try:
        building.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    shutil.rmtree(aside)
