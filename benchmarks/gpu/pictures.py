"""Pictures by contenders of benchmarks.latency on a GPU: batch 1 and 4, CUDA graphs on and off, memory."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from tiue_runtime.bundle import Bundle
from tiue_runtime.host.machine import thread_count

from benchmarks.agreement import BenchmarkError
from benchmarks.comparing import Comparison, Conditions, compare
from benchmarks.gpu.conditions import check_provider
from benchmarks.gpu.parts import Keep, Measure, Setting
from benchmarks.gpu.timing import check_torch
from benchmarks.kinds import Spec, Workplace
from benchmarks.latency import ON_CUDA, prepare, progress, surroundings
from benchmarks.pipelines import EMOJI, write_pipeline
from benchmarks.report import table

_PEERS = "torch diffusers"
_ON_TENSORRT = "torch tiue:device=tensorrt,bundle=fp16"
_DRY = "tiue:bundle=shipped"  # the default model's bundle, which starts without torch


def on_cuda(setting: Setting) -> dict[str, Measure]:
    """Return the cases of the part cuda: PyTorch alone, which needs no export, then ONNX Runtime beside it."""
    check_torch(setting.device)
    return {
        "PyTorch": partial(_measure, setting, _PEERS, ""),
        "ONNX Runtime": partial(_measure, setting, ON_CUDA, "CUDAExecutionProvider"),
    }


def on_tensorrt(setting: Setting) -> dict[str, Measure]:
    """Return the only case of the part tensorrt."""
    check_torch(setting.device)
    return {"ONNX Runtime": partial(_measure, setting, _ON_TENSORRT, "TensorrtExecutionProvider")}


def _measure(setting: Setting, contenders: str, provider: str, keep: Keep) -> dict[str, Any]:
    if provider and not setting.dry_run:
        check_provider(provider)
    model = "emoji" if setting.dry_run else "sd21-base"
    if not (setting.work / model).exists():
        write_pipeline(model, setting.work / model)
    place = Workplace(model, setting.work, {"shipped": EMOJI.with_name("tiue_emoji")}, {}, setting.device, progress)
    shape, pixels = _shipped_geometry() if setting.dry_run else place.geometry(512)
    batches, runs = ((1,), 1) if setting.dry_run else ((1, 4), 3)
    conditions = Conditions(thread_count(), shape, pixels, 4, batches, runs)
    specs = [Spec.parse(text) for text in (_DRY if setting.dry_run else contenders).split()]
    entries, left_out = prepare(place, specs, conditions)

    def values(done: Comparison) -> dict[str, Any]:
        reasons = left_out | done.skipped | {name: f"WRONG: {why}" for name, why in done.wrong.items()}
        return {
            "model": model,
            "about": surroundings(conditions, done.measured),
            "contenders": {name: asdict(measured) for name, measured in done.measured.items()},
            "left_out": reasons,
            "table": table(done.measured, reasons),
        }

    def keep_so_far(done: Comparison) -> None:
        if done.measured:
            keep(values(done))

    done = compare(entries, conditions, apart=False, progress=progress, after_round=keep_so_far)
    if done.wrong or not done.measured:
        raise BenchmarkError(_reasons([*done.wrong.values(), *(left_out | done.skipped).values()]))
    return values(done)


def _shipped_geometry() -> tuple[tuple[int, int, int], int]:
    """Return the shape (C, h, w) of the default model's latents, and its pixels per latent."""
    manifest = Bundle.load(EMOJI.with_name("tiue_emoji")).manifest
    pixels = manifest.pixels_per_latent
    return (manifest.latent_channels, manifest.default_height // pixels, manifest.default_width // pixels), pixels


def _reasons(reasons: Sequence[str]) -> str:
    return "; ".join(reasons) or "no contender could be measured"
