"""Prompts to token ids, with tokenizer.json alone: its padding and truncation settings are the bundle's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tiue_runtime.errors import BundleError


@dataclass(frozen=True)
class Tokens:
    """Token ids of a list of prompts."""

    input_ids: NDArray[np.int64]  # (B,L)
    attention_mask: NDArray[np.int64]  # (B,L), 1 where a token is, 0 where padding is
    cut: tuple[str, ...]  # per prompt, the part that did not fit into L tokens; "" where all did


class PromptTokenizer:
    """tokenizer.json, checked to pad and truncate to exactly `length` tokens. Raises BundleError."""

    def __init__(self, path: Path, length: int) -> None:
        try:
            tokenizer: Any = cast(Any, Tokenizer).from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise BundleError(f"{path}: not a tokenizer: {error}") from error
        padding = tokenizer.padding["length"] if tokenizer.padding else None
        truncation = tokenizer.truncation["max_length"] if tokenizer.truncation else None
        self._tokenizer = tokenizer
        if (padding, truncation) != (length, length):
            raise BundleError(
                f"{path}: expected padding and truncation to text_length {length}, "
                f"got padding to {padding} and truncation to {truncation}. Export the bundle again."
            )

    def __call__(self, prompts: list[str]) -> Tokens:
        """Encode prompts to rows of exactly `length` tokens."""
        encodings: list[Any] = [self._tokenizer.encode(prompt) for prompt in prompts]
        return Tokens(
            np.array([encoding.ids for encoding in encodings], dtype=np.int64),
            np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64),
            tuple(map(_cut_part, prompts, encodings)),
        )


def _cut_part(prompt: str, encoding: Any) -> str:
    """What of a prompt lies in the overflow of its encoding."""
    starts = [
        start
        for overflow in encoding.overflowing
        for (start, end), special in zip(overflow.offsets, overflow.special_tokens_mask, strict=True)
        if end > start and not special
    ]
    return prompt[min(starts) :].strip() if starts else ""
