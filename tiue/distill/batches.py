"""Captions to text embeddings: the captions of a batch's samples, and their embeddings for the networks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tiue.components import Components
from tiue.distill.draws import Batch, Part
from tiue.distill.embeddings import EncodedTexts, TextEmbeddings, cache_texts, cut_prompts
from tiue.distill.method import Run
from tiue.distill.prompt_store import PromptOrder, Prompts, store_prompts
from tiue.files import shortened
from tiue.text_encoder import encode_text

_log = logging.getLogger(__name__)


class Captions(Sequence[str]):
    """The captions of a run, each once. They are stored in a file of the run and read in a seeded order.

    Args:
        run: the run.
        components: the model with the text encoder and the tokenizer.
        prompts: captions. Repetitions are dropped.
    """

    def __init__(self, run: Run, components: Components, prompts: Iterable[str]):
        self._run, self._components = run, components
        directory = run.out / "prompts"
        if run.accelerator.is_main_process:
            repeated = store_prompts(prompts, directory)
            self._report(Prompts(directory), repeated)
        run.accelerator.wait_for_everyone()
        self._prompts = Prompts(directory)
        self._order = PromptOrder(len(self._prompts), run.config.seed)
        self._texts: TextEmbeddings = EncodedTexts(components, self._prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index):
        return self._prompts[index]

    @property
    def digest(self) -> str:
        """The captions' fingerprint."""
        return self._prompts.digest

    def cache(self) -> None:
        """Compute the embeddings of all captions once and store them. Then move the text encoder off the device."""
        components, run = self._components, self._run
        self._texts = cache_texts(components, self._prompts, self.digest, run.out / "text", run.accelerator)
        components.text_encoder.cpu()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode other prompts on the device of the run, float32 (B, L, D)."""
        self._components.text_encoder.to(self._run.accelerator.device).requires_grad_(False)
        return encode_text(self._components, prompts).float()

    def embeddings(self, part: Part) -> Tensor:
        """Return the text embeddings of a part's samples, float32 (B, L, D)."""
        return self._texts.rows(self._indices(part))

    def of(self, part: Part) -> list[str]:
        """Return the captions of a part's samples."""
        return [self._prompts[i] for i in self._indices(part)]

    def describe(self, batch: Batch) -> str:
        """List the captions of a batch, shortened."""
        return "prompts: " + ", ".join(repr(shortened(prompt)) for part in batch.parts for prompt in self.of(part))

    def _indices(self, part: Part) -> list[int]:
        return [self._order[position] for position in part.positions]

    def _report(self, prompts: Prompts, repeated: int) -> None:
        if repeated:
            _log.info("%d prompts, without %d repetitions", len(prompts), repeated)
        if cut := cut_prompts(self._components, prompts):
            limit = self._components.tokenizer.model_max_length
            _log.warning("%d of %d prompts are longer than %d tokens and are cut", cut, len(prompts), limit)
