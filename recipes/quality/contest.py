"""How a row is trained, drawn, judged and timed. Every result is a file, and what is there is not made again."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, astuple, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiue_runtime import Pipeline

from evaluation.cli import EvaluationConfig, Judge, evaluate, load_judges
from evaluation.encoder.retrieval import train_encoder
from evaluation.painters import Painter, pipeline_painter, student_painter, torch_painter
from evaluation.reference import Reference
from export.onnx import main as export
from recipes.baselines import add, lcm, swiftbrush, swiftbrushv2
from recipes.baselines.config import AddConfig, LcmConfig, SwiftBrushV2Config
from recipes.baselines.few_steps import FewSteps, load_unet
from recipes.baselines.observers import EncoderAlignment, EncoderObserver
from recipes.baselines.pictures import METADATA, CaptionedPictures
from recipes.emoji.data import STYLES, Drawings, fetch
from recipes.emoji.stage import device, precision
from recipes.emoji.student import all_captions
from recipes.quality.cost import Cost, update_cost
from recipes.quality.rows import Preset, Row, Settings
from tiue.checkpoint import Student, load_student, save_student
from tiue.components import load_components
from tiue.distill import vsd
from tiue.distill.config import DistillConfig
from tiue.distill.loop import train
from tiue.distill.method import Method, Run
from tiue.distill.vsd import Vsd
from tiue.files import write_text, written_whole
from tiue.text_encoder import encode_text
from tiue.unet import Predictor

_CONFIGS = {
    "tiue": DistillConfig,
    "lcm": LcmConfig,
    "add": AddConfig,
    "swiftbrush": DistillConfig,
    "swiftbrushv2": SwiftBrushV2Config,
}
_REFERENCE_EVERY = 5  # drawings


class Contest:
    """A comparison in a directory.

    Args:
        preset: its sizes.
        source: what `python -m recipes.emoji` made: polished/ (the teacher), warm.safetensors.
        drawings: the data set.
        out: directory of all results.
    """

    def __init__(self, preset: Preset, source: Path, drawings: Drawings, out: Path):
        self.preset, self.out, self._drawings = preset, out, drawings
        self.teacher, self.warm = source / "polished", source / "warm.safetensors"

    # The data.

    @cached_property
    def pictures(self) -> Path:
        """The training drawings as a folder of pictures with captions."""
        folder = self.out / "pictures"
        if not (folder / METADATA).exists():
            folder.mkdir(parents=True, exist_ok=True)
            lines = []
            for row in np.flatnonzero(~self._drawings.held_out):
                Image.fromarray(self._drawings.images[row]).save(folder / f"{row}.png")
                variants = range(len(self._drawings.captions[self._drawings.concept[row]]))
                texts = [self._drawings.caption(row, i, styled) for i in variants for styled in (True, False)]
                lines.append(json.dumps({"file_name": f"{row}.png", "text": texts}))
            write_text(folder / METADATA, "\n".join(lines) + "\n")
        return folder

    @cached_property
    def reference(self) -> Reference:
        """Every fifth drawing."""
        some = slice(None, None, _REFERENCE_EVERY)
        made = self._drawings
        return Reference(made.images[some], made.concept[some], made.style[some], made.captions, list(STYLES))

    @cached_property
    def prompts(self) -> list[str]:
        """Captions of training drawings, evenly from all, each with its style."""
        rows = np.flatnonzero(~self._drawings.held_out)
        chosen = np.unique(np.linspace(0, len(rows) - 1, self.preset.prompts).round().astype(int))
        return [self._drawings.caption(row, 0, True) for row in rows[chosen]]

    @cached_property
    def plain_prompts(self) -> list[str]:
        """Labels of concepts, evenly from all, without a style."""
        labels = [captions[0] for captions in self._drawings.captions]
        return [labels[i] for i in np.linspace(0, len(labels) - 1, self.preset.plain).round().astype(int)]

    @cached_property
    def judge(self) -> Path:
        """The evaluation's encoder, which no method sees."""
        return self._encoder("judge")

    @cached_property
    def observer(self) -> Path:
        """A smaller encoder from another seed, for the methods that need one."""
        return self._encoder("observer")

    def _encoder(self, name: str) -> Path:
        made = self._drawings
        whole = Reference(made.images, made.concept, made.style, made.captions, list(STYLES))
        train_encoder(whole, self.out / name, replace(getattr(self.preset, name), mixed_precision=precision()))
        return self.out / name / "encoder.safetensors"

    # A row.

    def run(self, row: Row) -> None:
        """Train, draw, judge and time a row with each of its seeds. What is there is not made again."""
        results, outs = self.results(row), self.outs(row)
        for steps in row.steps:
            for result, out in zip(results, outs, strict=True):
                self.judged(row, result, steps, out)
            if row.timed:
                self.timed(row, results[0], steps, outs[0])

    def results(self, row: Row) -> list[Path]:
        """Train a row with each of its seeds, once.

        Returns:
            The student.safetensors or the pipeline directory of each seed.
        """
        if row.method == "teacher":
            return [self.teacher]
        if row.method == "start":
            return [self.warm]
        settings = {**row.settings, **self.best(row)}
        return [self._trained(row, settings, out, seed) for seed, out in enumerate(self.outs(row))]

    def best(self, row: Row) -> Settings:
        """Search the settings of a row: train each with a part of the budget, and keep the best Frechet distance."""
        if row.like:
            return self.best(self._row(row.like))
        if not row.search:
            return {}
        path = self.folder(row) / "search.json"
        if not path.exists():
            tried = []
            for number, settings in enumerate(row.search):
                out = self.folder(row) / f"search-{number}"
                result = self._trained(row, {**row.settings, **settings}, out, 0, self.preset.search_share)
                tried.append({"settings": dict(settings), "frechet": self._frechet(row, result)})
            write_text(path, json.dumps(tried, indent=2) + "\n")
        return min(json.loads(path.read_text(encoding="utf-8")), key=lambda entry: entry["frechet"])["settings"]

    def outs(self, row: Row) -> list[Path]:
        """The directories of a row's seeds."""
        return [self.folder(row) / f"seed-{seed}" for seed in range(self.preset.seeds if row.main else 1)]

    def finished(self, row: Row) -> list[Path]:
        """The directories of the seeds that have all figures."""
        return [out for out in self.outs(row) if all((out / f"figures-{steps}.json").exists() for steps in row.steps)]

    def folder(self, row: Row) -> Path:
        """The directory of a row."""
        return self.out / "rows" / re.sub(r"\W+", "-", row.name).lower()

    def _trained(self, row: Row, settings: Settings, out: Path, seed: int, share: float = 1.0) -> Path:
        if row.method == "merge":
            return self._merged(row, out)
        result, finished = out / self._result(row), out / "training.json"
        if not finished.exists():
            cost = self._cost(row, settings, out)
            iterations = max(1, round(share * self.preset.passes / cost.passes))
            run, method = self._prepared(row, {**settings, "iterations": iterations, "seed": seed}, out)
            begun = time.perf_counter()
            train(run, method)
            found = asdict(cost) | {"iterations": iterations, "seconds": round(time.perf_counter() - begun)}
            write_text(finished, json.dumps(found | {"sha256": _hash(result)}, indent=2) + "\n")
        return result

    def _result(self, row: Row) -> str:
        return FewSteps.result if row.method in ("lcm", "add") else Vsd.result

    def _merged(self, row: Row, out: Path) -> Path:
        path = out / "student.safetensors"
        if not path.exists():
            out.mkdir(parents=True, exist_ok=True)
            full, lora = (load_student(self.results(self._row(name))[0]) for name in row.start)
            save_student(path, swiftbrushv2.merge(full, lora))
            write_text(out / "training.json", json.dumps({"sha256": _hash(path)}, indent=2) + "\n")
        return path

    def _cost(self, row: Row, settings: Settings, out: Path) -> Cost:
        """Count the cost of an update, once. Numbers of steps that take turns are all counted."""
        path = out / "cost.json"
        if not path.exists():
            counts = [{"steps": (steps,)} for steps in settings.get("steps", ())] or [{}]
            found = [self._counted(row, {**settings, **count}, out / "cost") for count in counts]
            mean = Cost(*(statistics.mean(values) for values in zip(*map(astuple, found), strict=True)))
            out.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(asdict(mean), indent=2) + "\n")
        return Cost(**json.loads(path.read_text(encoding="utf-8")))

    def _counted(self, row: Row, settings: Settings, probe: Path) -> Cost:
        run, method = self._prepared(row, {**settings, "iterations": 1, "seed": 0}, probe)
        teacher = load_components(self.teacher)
        text = encode_text(teacher, [""]).detach().to(device())
        cost = update_cost(run, method, teacher.unet.to(device()), text)
        shutil.rmtree(probe, ignore_errors=True)
        return cost

    def _prepared(self, row: Row, settings: Settings, out: Path) -> tuple[Run, Method]:
        common = {"batch_size": self.preset.batch, "mixed_precision": precision(), "checkpoint_every": 20, "keep": 1}
        config: Any = _CONFIGS[row.method](**common | {"sample_every": 1_000_000} | dict(settings))
        teacher, samples = load_components(self.teacher), self.prompts[:8]
        prompts = all_captions(self._drawings)
        if row.method == "tiue":
            initial = load_student(self.warm) if row.start == ("warm",) else None
            return vsd.prepare(teacher, prompts, out, config, initial=initial, sample_prompts=samples)
        unet = self._start(row)
        if row.method in ("lcm", "add"):
            data = CaptionedPictures(self.pictures, teacher.geometry.height * teacher.geometry.pixels_per_latent)
            if row.method == "lcm":
                return lcm.prepare(teacher, data, out, config, initial=unet, sample_prompts=samples)
            seen = EncoderObserver(self.observer, device())
            return add.prepare(teacher, data, out, config, seen, initial=unet, sample_prompts=samples)
        if row.method == "swiftbrush":
            return swiftbrush.prepare(teacher, prompts, out, config, initial=unet, sample_prompts=samples)
        assert unet is not None, f"{row.name} needs a start"
        alignment = EncoderAlignment(self.observer, teacher)
        return swiftbrushv2.prepare(
            teacher, prompts, out, config, initial=unet, alignment=alignment, sample_prompts=samples
        )

    def _start(self, row: Row) -> Any:
        """The UNet that a row starts from; None for the teacher's."""
        (start,) = row.start
        if start == "teacher":
            return None
        return load_unet(self.warm if start == "warm" else self.results(self._row(start))[0])

    def _row(self, name: str) -> Row:
        return next(row for row in self.preset.rows if row.name == name)

    # Its figures.

    def judged(self, row: Row, result: Path, steps: int, out: Path) -> None:
        """Draw and judge a result with a number of steps, once. The file has the figures by network."""
        path = out / f"figures-{steps}.json"
        if not path.exists():
            painter, judges, begun = self._painter(row, result, steps), self._judges, time.perf_counter()
            pictures = out / f"pictures-{steps}"
            figures = evaluate(painter, self.prompts, self.reference, judges, self._evaluation, pictures)["features"]
            many = replace(self._evaluation, seeds=self.preset.styles)
            free = evaluate(painter, self.plain_prompts, self.reference, judges[:1], many, compared=False)
            figures["emoji"] |= {name: free["features"]["emoji"][name] for name in ("styles", "evenness")}
            figures["seconds"] = round(time.perf_counter() - begun)
            out.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(figures, indent=2) + "\n")

    def _frechet(self, row: Row, result: Path) -> float:
        """The Frechet distance of a result with its most steps, by the first judge alone, without an interval."""
        painter, few = self._painter(row, result, max(row.steps)), replace(self._evaluation, samples=2)
        made = evaluate(painter, self.prompts, self.reference, self._judges[:1], few)
        return made["features"]["emoji"]["frechet"]["value"]

    @cached_property
    def _evaluation(self) -> EvaluationConfig:
        features = [f"emoji={self.judge}"]
        if self.preset.inception:
            (self.out / "packages").mkdir(parents=True, exist_ok=True)
            features.append(f"inception={fetch('nsfwjs@4.4.0', self.out / 'packages')}")
        return EvaluationConfig(features=tuple(features), seeds=self.preset.pictures, samples=self.preset.samples)

    @cached_property
    def _judges(self) -> list[Judge]:
        """The judges. What they see in the reference is kept, because it takes longer than a student's pictures."""
        path, known = self.out / "reference.npz", None
        if path.exists():
            with np.load(path, allow_pickle=False) as arrays:
                known = dict(arrays)
        judges = load_judges(self.reference, self._evaluation.features, known)
        if known is None:
            with written_whole(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **{judge.extractor.name: judge.real for judge in judges})
        return judges

    def _painter(self, row: Row, result: Path, steps: int) -> Painter:
        if result.is_dir():
            guidance = self.preset.teacher_guidance
            return pipeline_painter(result, device(), steps, guidance, None)
        if row.settings.get("share_encoder", True):
            return student_painter(result, device(), steps)
        return separate_painter(load_student(result), steps)

    def timed(self, row: Row, result: Path, steps: int, out: Path) -> None:
        """Export a result and time its graphs, once, in seconds.

        TiUE runs its decoders at once. A student of several steps runs the graphs of one step in a loop.
        """
        path = out / f"latency-{steps}.json"
        if not path.exists():
            at_once = row.method in ("tiue", "start")
            bundle = self._exported(row, result, steps if at_once else 1, out)
            pipeline = Pipeline.load(bundle)
            pipeline("warm up", seed=0)
            seconds = [_seconds(pipeline, seed, 1 if at_once else steps) for seed in range(self.preset.runs)]
            shutil.rmtree(bundle)
            found = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
            write_text(path, json.dumps(found, indent=2) + "\n")

    def _exported(self, row: Row, result: Path, steps: int, out: Path) -> Path:
        bundle = out / f"bundle-{steps}"
        flags = ["--steps", str(steps), "--weights", "fp16", "--out", str(bundle)]
        if row.method == "lcm":
            flags += ["--guidance", str(self.preset.teacher_guidance)]
        out.mkdir(parents=True, exist_ok=True)
        if status := export(["--ckpt", str(result), *flags]):
            raise RuntimeError(f"the export of {result} ended with status {status}")
        return bundle


def separate_painter(student: Student, steps: int) -> Painter:
    """Make a painter of the control, which runs N full UNets and shares nothing."""
    tiue = student.tiue(steps).to(device()).eval()
    predictor, schedule = Predictor(tiue, share_encoder=False), student.schedule(steps)

    def sample(noise: torch.Tensor, text: torch.Tensor, seeds: Iterable[int]) -> torch.Tensor:
        return tiue.sum(noise, predictor(noise, text, schedule), schedule)[0]

    return torch_painter(student.components, device(), sample)


def _seconds(pipeline: Pipeline, seed: int, repetitions: int) -> float:
    """Time one picture: everything once, and the UNet's graphs as often as the student has steps."""
    results = [pipeline("a red heart", seed=seed + i) for i in range(repetitions)]
    first = results[0].timings
    return first["total"] + sum(r.timings["unet_encoder"] + r.timings["unet_decoder"] for r in results[1:])


def _hash(result: Path) -> str:
    path = result / "unet/diffusion_pytorch_model.safetensors" if result.is_dir() else result
    return hashlib.sha256(path.read_bytes()).hexdigest()
