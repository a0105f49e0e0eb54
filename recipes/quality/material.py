"""What all rows of the comparison share: drawings, captions, a reference, and two encoders."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluation.encoder.network import load_encoder
from evaluation.encoder.retrieval import train_encoder
from evaluation.encoder.sentences import Sentences
from evaluation.reference import Reference
from recipes.baselines.pictures import METADATA
from recipes.emoji.data import STYLES, Drawings
from recipes.emoji.stage import precision
from recipes.emoji.student import all_captions
from recipes.quality.rows import Preset
from tiue.checkpoint import load_student, save_student
from tiue.components import load_components
from tiue.files import write_text

_REFERENCE_EVERY = 5  # drawings


class Material:
    """What all rows share. It is made when it is first asked for, and kept.

    Args:
        preset: the sizes.
        source: what `python -m recipes.emoji` made: polished/ (the teacher), warm.safetensors.
        drawings: the data set.
        out: directory of all results.
    """

    def __init__(self, preset: Preset, source: Path, drawings: Drawings, out: Path):
        self.preset, self.out, self._drawings = preset, out, drawings
        self.teacher, self._warm = source / "polished", source / "warm.safetensors"

    @cached_property
    def warm(self) -> Path:
        """The warm start, with the image decoder of all rows. In the recipe, that is trained after the warm start."""
        path = self.out / "warm.safetensors"
        if not path.exists():
            student, vae = load_student(self._warm), load_components(self.teacher).vae
            save_student(path, replace(student, components=replace(student.components, vae=vae)))
        return path

    @cached_property
    def captions(self) -> list[str]:
        """All captions of training drawings."""
        return all_captions(self._drawings)

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

    @cached_property
    def clip_margin(self) -> float:
        """The mean cosine of training drawings and their captions, by the observer."""
        encoder, made = load_encoder(self.observer), self._drawings
        rows = np.flatnonzero(~made.held_out)[::_REFERENCE_EVERY]
        images = encoder.embed_pictures(made.images[rows])
        texts = encoder.embed_texts([made.caption(row, 0, True) for row in rows], Sentences(torch.device("cpu")))
        return round(float((images * texts).sum(1).mean()), 3)

    def _encoder(self, name: str) -> Path:
        made = self._drawings
        whole = Reference(made.images, made.concept, made.style, made.captions, list(STYLES))
        train_encoder(whole, self.out / name, replace(getattr(self.preset, name), mixed_precision=precision()))
        return self.out / name / "encoder.safetensors"
