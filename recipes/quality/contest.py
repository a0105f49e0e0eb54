"""How a row is trained. Every result is a file, and files that exist are not made again."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from evaluation.reference import read_json
from recipes.baselines import add, lcm, swiftbrush, swiftbrushv2
from recipes.baselines.config import AddConfig, LcmConfig, SwiftBrushV2Config
from recipes.baselines.few_steps import FewSteps, load_unet
from recipes.baselines.observers import EncoderAlignment, EncoderObserver
from recipes.baselines.pictures import CaptionedPictures
from recipes.directory import read_object
from recipes.emoji.stage import device, precision
from recipes.quality.cost import Cost, update_cost
from recipes.quality.judging import Judging
from recipes.quality.material import Material
from recipes.quality.rows import Row, Settings
from tiue.checkpoint import load_student, save_student
from tiue.components import Components, load_components
from tiue.distill import vsd
from tiue.distill.config import DistillConfig
from tiue.distill.loop import train
from tiue.distill.method import Method, Run
from tiue.distill.runs import check_same_run, read_log
from tiue.distill.vsd import Vsd
from tiue.files import write_text
from tiue.text_encoder import encode_text

_CONFIGS = {
    "tiue": DistillConfig,
    "lcm": LcmConfig,
    "add": AddConfig,
    "swiftbrush": DistillConfig,
    "swiftbrushv2": SwiftBrushV2Config,
}


class Contest:
    """A comparison in a directory.

    Args:
        material: what all rows share.
    """

    def __init__(self, material: Material):
        self.material, self.preset, self.out = material, material.preset, material.out
        self._judging = Judging(material)

    def run(self, row: Row) -> None:
        """Train, draw, judge and time a row with each of its seeds. Results that exist are not made again."""
        results, outs = self.results(row), self.outs(row)
        for steps in row.steps:
            for result, out in zip(results, outs, strict=True):
                self._judging.judged(row, result, steps, out)
            self._judging.counted(row, results[0], steps, outs[0])
        if row.timed:
            self._judging.timed(row, results[0], outs[0])

    def results(self, row: Row) -> list[Path]:
        """Train a row with each of its seeds, once.

        Returns:
            The student.safetensors or the pipeline directory of each seed.
        """
        if row.method in ("teacher", "resampled"):
            return [self.material.teacher]
        if row.method == "start":
            return [self.material.warm]
        outs = self.outs(row)
        if row.method == "merge":
            return [self._merged(row, out) for out in outs]
        settings = {**row.settings, **self.best(row)}
        cost = self._cost(row, settings, outs[0])
        return [self._trained(row, settings, out, seed, cost) for seed, out in enumerate(outs)]

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
                out, own = self.folder(row) / f"search-{number}", {**row.settings, **settings}
                cost = self._cost(row, own, out)
                result = self._trained(row, own, out, 0, cost, self.preset.search_share)
                tried.append({"settings": dict(settings), "frechet": self._judging.frechet(row, result)})
            write_text(path, json.dumps(tried, indent=2) + "\n")
        found = read_json(path)
        if not isinstance(found, list) or [one.get("settings") for one in found] != [dict(one) for one in row.search]:
            raise ValueError(f"{path} has results of another search: delete it, and the folders of that search")
        return min(found, key=lambda entry: entry["frechet"])["settings"]

    def outs(self, row: Row) -> list[Path]:
        """The directories of a row's seeds."""
        return [self.folder(row) / f"seed-{seed}" for seed in range(self.preset.seeds if row.main else 1)]

    def finished(self, row: Row) -> list[Path]:
        """The directories of the seeds that have all figures."""
        return [out for out in self.outs(row) if all((out / f"figures-{steps}.json").exists() for steps in row.steps)]

    def folder(self, row: Row) -> Path:
        """The directory of a row."""
        return self.out / "rows" / re.sub(r"\W+", "-", row.name).lower()

    def _trained(self, row: Row, settings: Settings, out: Path, seed: int, cost: Cost, share: float = 1.0) -> Path:
        result, finished = out / self._result(row), out / "training.json"
        iterations = max(1, round(share * self.preset.passes / cost.passes))
        settings = {**settings, "iterations": iterations, "seed": seed}
        if finished.exists():
            # An older version of this file had other settings. The margin is measured, which takes a while.
            check_same_run(out, self._config(row, settings), {}, free=("mixed_precision", "clip_margin"))
            self._check_starts(row, finished)
        else:
            run, method = self._prepared(row, settings, out)
            train(run, method)
            seconds = round(sum(read_log(out / "losses.csv")["seconds"]))
            found = asdict(cost) | {"iterations": iterations, "seconds": seconds}
            self._record(row, finished, found | {"sha256": _hash(result)})
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # A gigabyte, which served to resume.
        return result

    def _record(self, row: Row, finished: Path, found: Mapping[str, Any]) -> None:
        """Write training.json, the last file of a result: how it was made, its hash, and those of its starts."""
        write_text(finished, json.dumps(found | {"starts": self._starts(row)}, indent=2) + "\n")

    def _starts(self, row: Row) -> dict[str, str]:
        """The hashes of those results of other rows that a row starts from, of those that are there."""
        names = [name for name in row.start if name not in ("teacher", "warm")]
        files = {name: self.outs(self._row(name))[0] / "training.json" for name in names}
        return {name: read_object(file)["sha256"] for name, file in files.items() if file.exists()}

    def _check_starts(self, row: Row, finished: Path) -> None:
        """Raise ValueError if a row that this one starts from was trained again."""
        recorded = read_object(finished).get("starts", {})  # An older version of this file did not record them.
        for name, found in self._starts(row).items():
            if recorded.get(name, found) != found:
                raise ValueError(f"{name} was trained again: delete {finished.parent}, which starts from it")

    def _result(self, row: Row) -> str:
        return FewSteps.result if row.method in ("lcm", "add") else Vsd.result

    def _merged(self, row: Row, out: Path) -> Path:
        path, finished = out / "student.safetensors", out / "training.json"
        if finished.exists():
            self._check_starts(row, finished)
        else:
            out.mkdir(parents=True, exist_ok=True)
            full, lora = (load_student(self.results(self._row(name))[0]) for name in row.start)
            save_student(path, swiftbrushv2.merge(full, lora))
            self._record(row, finished, {"sha256": _hash(path)})
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
        return Cost(**read_object(path))

    def _counted(self, row: Row, settings: Settings, probe: Path) -> Cost:
        run, method = self._prepared(row, {**settings, "iterations": 1, "seed": 0}, probe)
        teacher = load_components(self.material.teacher)
        text = encode_text(teacher, [""]).detach().to(device())
        cost = update_cost(run, method, teacher.unet.to(device()), teacher.geometry.latent_shape, text)
        shutil.rmtree(probe, ignore_errors=True)
        return cost

    def _config(self, row: Row, settings: Settings) -> Any:
        common = {"batch_size": self.preset.batch, "mixed_precision": precision(), "checkpoint_every": 20, "keep": 1}
        return _CONFIGS[row.method](**common | {"sample_every": 1_000_000} | dict(settings))

    def _prepared(self, row: Row, settings: Settings, out: Path) -> tuple[Run, Method]:
        margin = {"clip_margin": self.material.clip_margin} if row.method == "swiftbrushv2" else {}
        config = self._config(row, {**settings, **margin})
        teacher, samples = load_components(self.material.teacher), self.material.prompts[:8]
        prompts = self.material.captions
        if row.method == "tiue":
            initial = load_student(self.material.warm) if row.start == ("warm",) else None
            return vsd.prepare(teacher, prompts, out, config, initial=initial, sample_prompts=samples)
        unet = self._start(row, teacher)
        if row.method in ("lcm", "add"):
            data = CaptionedPictures(
                self.material.pictures, teacher.geometry.height * teacher.geometry.pixels_per_latent
            )
            if row.method == "lcm":
                return lcm.prepare(teacher, data, out, config, initial=unet, sample_prompts=samples)
            seen = EncoderObserver(self.material.observer, device())
            return add.prepare(teacher, data, out, config, seen, initial=unet, sample_prompts=samples)
        if row.method == "swiftbrush":
            return swiftbrush.prepare(teacher, prompts, out, config, initial=unet, sample_prompts=samples)
        assert unet is not None, f"{row.name} needs a start"
        alignment = EncoderAlignment(self.material.observer, teacher, config.clip_margin)
        return swiftbrushv2.prepare(
            teacher, prompts, out, config, initial=unet, alignment=alignment, sample_prompts=samples
        )

    def _start(self, row: Row, teacher: Components) -> Any:
        """The UNet that a row starts from; None for the teacher's."""
        (start,) = row.start
        if start == "teacher":
            return None
        return load_unet(self.material.warm if start == "warm" else self.results(self._row(start))[0], teacher)

    def _row(self, name: str) -> Row:
        return next(row for row in self.preset.rows if row.name == name)


def _hash(result: Path) -> str:
    path = result / "unet/diffusion_pytorch_model.safetensors" if result.is_dir() else result
    return hashlib.sha256(path.read_bytes()).hexdigest()
