"""How a row is drawn, judged and timed. Every result is a file, and what is there is not made again."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tiue_runtime import Pipeline
from torch.utils.flop_counter import FlopCounterMode

from evaluation.cli import EvaluationConfig, Judge, evaluate, load_judges
from evaluation.features import KINDS
from evaluation.few_steps import sample_few_steps
from evaluation.painters import Painter, pipeline_painter, student_painter, torch_painter
from evaluation.reference import read_arrays
from export.onnx import main as export
from recipes.baselines.config import LcmConfig
from recipes.baselines.few_steps import WITHOUT_BOUNDARY, lcm_scheduler
from recipes.emoji.data import fetch
from recipes.emoji.stage import device
from recipes.quality.material import Material
from recipes.quality.rows import Row
from tiue.checkpoint import Student, load_student
from tiue.components import Components, load_components
from tiue.distill.scores import guided
from tiue.files import write_text, written_whole
from tiue.text_encoder import encode_text
from tiue.unet import Predictor, TiUE


class Judging:
    """The figures of results: of their pictures, and the latency of their graphs.

    Args:
        material: what all rows share.
    """

    def __init__(self, material: Material):
        self._material, self._preset = material, material.preset

    def judged(self, row: Row, result: Path, steps: int, out: Path) -> None:
        """Draw and judge a result with a number of steps, once. The file has the figures by network."""
        path = out / f"figures-{steps}.json"
        if not path.exists():
            painter, begun = self._painter(row, result, steps), time.perf_counter()
            shared, judges, pictures = self._material, self._judges, out / f"pictures-{steps}"
            made = evaluate(painter, shared.prompts, shared.reference, judges, self._evaluation, pictures)
            many = replace(self._evaluation, seeds=self._preset.styles)
            free = evaluate(painter, shared.plain_prompts, shared.reference, judges[:1], many, compared=False)
            figures = made["features"]
            figures["emoji"] |= {name: free["features"]["emoji"][name] for name in ("styles", "evenness")}
            figures["seconds"] = round(time.perf_counter() - begun)
            out.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(figures, indent=2) + "\n")

    def counted(self, row: Row, result: Path, steps: int, out: Path) -> None:
        """Count the floating point operations of a picture, once: of the text encoder, the UNet and the VAE decoder."""
        path = out / f"operations-{steps}.json"
        if not path.exists():
            painter = self._painter(row, result, steps)
            with FlopCounterMode(display=False) as counter:
                painter(self._material.prompts[:1], range(1, 2))
            write_text(path, json.dumps({"operations": counter.get_total_flops()}) + "\n")

    def frechet(self, row: Row, result: Path) -> float:
        """The Frechet distance of a result with its most steps, by the last judge alone, without an interval."""
        painter, few = self._painter(row, result, max(row.steps)), replace(self._evaluation, samples=2)
        judge = self._judges[-1]
        made = evaluate(painter, self._material.prompts, self._material.reference, [judge], few)
        return made["features"][judge.extractor.name]["frechet"]["value"]

    @cached_property
    def _evaluation(self) -> EvaluationConfig:
        features = [f"emoji={self._material.judge}"]
        if self._preset.inception:
            (self._material.out / "packages").mkdir(parents=True, exist_ok=True)
            features.append(f"inception={fetch('nsfwjs@4.4.0', self._material.out / 'packages')}")
        return EvaluationConfig(features=tuple(features), seeds=self._preset.pictures, samples=self._preset.samples)

    @cached_property
    def _judges(self) -> list[Judge]:
        """The judges. Their features of the reference are kept, which take longer than a student's pictures."""
        path = self._material.out / "reference.npz"
        known = read_arrays(path, list(KINDS)) if path.exists() else {}
        judges = load_judges(self._material.reference, self._evaluation.features, known)
        if any(judge.extractor.name not in known for judge in judges):
            with written_whole(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **{judge.extractor.name: judge.real for judge in judges})
        return judges

    def _painter(self, row: Row, result: Path, steps: int) -> Painter:
        guidance = self._preset.teacher_guidance
        if row.method == "resampled":
            return resampled_painter(load_components(result), steps, guidance)
        if result.is_dir():
            return pipeline_painter(result, device(), steps, guidance, None)
        if row.settings.get("share_encoder", True):
            return student_painter(result, device(), steps)
        return separate_painter(load_student(result), steps)

    def timed(self, row: Row, result: Path, out: Path) -> None:
        """Export a result and time its graphs with each number of steps, once, in seconds.

        TiUE runs its decoders at once. A student of several steps runs the graphs of one step in a loop.
        """
        paths = {steps: out / f"latency-{steps}.json" for steps in row.steps}
        if all(path.exists() for path in paths.values()):
            return
        at_once = row.method in ("tiue", "start")
        bundle = self._exported(row, result, row.steps if at_once else (1,), out)
        pipeline = Pipeline.load(bundle)
        for steps, path in paths.items():
            own, loops = (steps, 1) if at_once else (1, steps)
            _seconds(pipeline, own, loops, seed=0)  # to warm up
            seconds = [_seconds(pipeline, own, loops, seed) for seed in range(self._preset.runs)]
            found = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
            write_text(path, json.dumps(found, indent=2) + "\n")
        shutil.rmtree(bundle)

    def _exported(self, row: Row, result: Path, steps: Sequence[int], out: Path) -> Path:
        bundle = out / "bundle"
        flags = ["--steps", ",".join(map(str, steps)), "--weights", "fp16", "--out", str(bundle), "--overwrite"]
        if row.method == "lcm":
            flags += ["--guidance", str(self._preset.teacher_guidance)]
        out.mkdir(parents=True, exist_ok=True)
        if status := export(["--ckpt", str(result), *flags]):
            raise ValueError(f"the export of {result} ended with status {status}")
        return bundle


def resampled_painter(teacher: Components, steps: int, guidance: float) -> Painter:
    """Make a painter of a teacher that is sampled as LCM's students are, with classifier-free guidance."""
    unet = teacher.unet.to(device()).eval()
    scheduler = lcm_scheduler(teacher, LcmConfig().ddim_steps, WITHOUT_BOUNDARY)

    def sample(noise: torch.Tensor, text: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        null = encode_text(teacher, [""])

        def predict(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return guided(unet, z, t, text, null, guidance)

        return sample_few_steps(predict, scheduler, noise, steps, seeds)

    return torch_painter(teacher, device(), sample)


def separate_painter(student: Student, steps: int) -> Painter:
    """Make a painter of the control, which runs N full UNets and shares nothing."""
    schedule = student.schedule(steps)
    tiue = TiUE(student.components.unet, schedule, student.encoder_timestep).to(device()).eval()
    predictor = Predictor(tiue, share_encoder=False)

    def sample(noise: torch.Tensor, text: torch.Tensor, seeds: Iterable[int]) -> torch.Tensor:
        return tiue.sum(noise, predictor(noise, text, schedule), schedule)[0]

    return torch_painter(student.components, device(), sample)


def _seconds(pipeline: Pipeline, steps: int, repetitions: int, seed: int) -> float:
    """Time one picture: everything once, and the UNet's graphs as often as the student has steps."""
    results = [pipeline("a red heart", steps=steps, seed=seed + i) for i in range(repetitions)]
    first = results[0].timings
    return first["total"] + sum(r.timings["unet_encoder"] + r.timings["unet_decoder"] for r in results[1:])
