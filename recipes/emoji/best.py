"""The best checkpoint of a stage, by how its pictures look and not by its loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from recipes.emoji.data import Drawings
from recipes.emoji.measure import load_judge
from recipes.emoji.presets import Preset
from recipes.emoji.report import asked, sample_pictures, sample_student
from recipes.emoji.stage import SCORES
from recipes.emoji.teacher import SCHEDULER, make_pipeline
from tiue.checkpoint import save_student
from tiue.distill import runs
from tiue.distill.vsd import Vsd
from tiue.files import write_text

_EVERY = 3  # of the captions of the report


class Best:
    """Chooses checkpoints by the Frechet distance of their pictures to the drawings.

    Args:
        preset: the settings of the recipe.
        drawings: the data set.
        out: directory of all results. The judge is trained there, if it is not yet.
    """

    def __init__(self, preset: Preset, drawings: Drawings, out: Path):
        self._preset, self._drawings, self._out = preset, drawings, out
        rows = asked(drawings)[::_EVERY]
        self._captions, self._concept = [drawings.caption(row, 0, True) for row in rows], drawings.concept[rows]

    def of_teacher(self, run: Path, unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
        """Give a teacher's UNet the weights of the best checkpoint of its run."""
        judge, pipeline = self._judge(), make_pipeline(unet, vae, SCHEDULER)

        def score() -> float:
            pictures = sample_pictures(pipeline, self._captions, self._preset.guidance)
            return judge.measure(pictures, self._concept)["frechet"]

        _record(run, load_best(run, unet, score))

    def of_student(self, run: Path, method: Vsd) -> None:
        """Write the student of the best checkpoint of a distillation in the place of the last one."""
        judge = self._judge()

        def score() -> float:
            student = method.finished(method.model.state_dict())
            return judge.measure(sample_student(student, self._captions), self._concept)["frechet"]

        scores = load_best(run, method.model, score)
        save_student(run / method.result, method.finished(method.model.state_dict()))
        _record(run, scores)

    def _judge(self):
        return load_judge(self._preset, self._drawings, self._out / "encoder")


def load_best(out: Path, network: nn.Module, score: Callable[[], float]) -> dict[str, float]:
    """Give a network the averaged weights of the best checkpoint of its finished run.

    Args:
        out: directory of the run.
        network: the model of the run's method.
        score: of the network as it is; the smallest is the best.

    Returns:
        The score of each checkpoint, by its name.

    Raises:
        ValueError: the run has no checkpoints any more.
    """
    scores = {}
    for path in runs.checkpoints(out):
        _fill(network, path)
        scores[path] = score()
    if not scores:
        raise ValueError(f"{out} has no checkpoints to choose from: delete the directory to train again")
    _fill(network, min(scores, key=scores.__getitem__))
    return {path.stem: value for path, value in scores.items()}


def _record(out: Path, scores: dict[str, float]) -> None:
    found = {"best": min(scores, key=scores.__getitem__), "scores": scores}
    write_text(out / SCORES, json.dumps(found, indent=2) + "\n")


@torch.no_grad()
def _fill(network: nn.Module, checkpoint: Path) -> None:
    for parameter, value in zip(network.parameters(), runs.averaged(checkpoint), strict=True):
        parameter.copy_(value)
