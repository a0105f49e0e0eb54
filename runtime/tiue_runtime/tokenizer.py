"""Prompts to token ids. tokenizer.json alone determines them, its padding and truncation included."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tiue_runtime.bundle.tokenizer_json import read_tokenizer
from tiue_runtime.errors import BundleError, RequestError, clip, shorten

# A long prompt is read in windows from its beginning, because tokens cost time and all but `length` of them are cut
# off. The first window has this many characters per token. Each later window is four times as long.
CHARACTERS_PER_TOKEN = 64
MOST_CHARACTERS = 1_000_000  # of a prompt; later ones are always cut off


@dataclass(frozen=True)
class Tokens:
    """Token ids of a list of prompts."""

    input_ids: NDArray[np.int64]  # (B, L)
    attention_mask: NDArray[np.int64]  # (B, L), 1 where a token is, 0 where padding is
    cut: tuple[str, ...]  # for each prompt, the part that did not fit into L tokens, or ""


class PromptTokenizer:
    """tokenizer.json, checked to pad and truncate to exactly `length` tokens.

    Raises:
        BundleError: the file is not one that the exporter writes.
    """

    def __init__(self, path: Path, length: int) -> None:
        text = read_tokenizer(path, length)
        self._path, self._length = path, length
        with self._errors():
            self._tokenizer: Any = cast(Any, Tokenizer).from_str(text)
            self._keeps_the_end = self._tokenizer.truncation["direction"] == "left"

    def __call__(self, prompts: list[str]) -> Tokens:
        """Encode prompts to rows of exactly `length` tokens. Raises BundleError, RequestError."""
        for prompt in prompts:
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise RequestError(
                    f"prompt: expected whole characters, got half of one in {shorten(prompt)}"
                ) from error
        with self._errors():
            encodings, cut = zip(*map(self._encode, prompts), strict=True)
        return Tokens(
            np.array([encoding.ids for encoding in encodings], dtype=np.int64),
            np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64),
            cut,
        )

    def _encode(self, prompt: str) -> tuple[Any, str]:
        """Encode the part of a prompt that decides its first tokens. Returns its encoding and the rest, cut off."""
        if self._keeps_the_end:
            read = prompt[-MOST_CHARACTERS:]
            encoding = self._tokenizer.encode(read)
            before = len(prompt) - len(read)
            first = min((start for start, _ in _places(encoding)), default=0) if encoding.overflowing else 0
            return encoding, prompt[: before + first].strip()
        window = CHARACTERS_PER_TOKEN * self._length
        while window < min(len(prompt), MOST_CHARACTERS):
            encoding = self._tokenizer.encode(prompt[:window])
            # A token depends on its word, but not on text far behind that word.
            if encoding.overflowing and 2 * max((end for _, end in _places(encoding)), default=0) <= window:
                return encoding, _cut_part(prompt, encoding)
            window *= 4
        encoding = self._tokenizer.encode(prompt[:MOST_CHARACTERS])
        return encoding, _cut_part(prompt, encoding) or prompt[MOST_CHARACTERS:].strip()

    @contextmanager
    def _errors(self) -> Generator[None]:
        """Turn exceptions of the tokenizers library into errors of this package."""
        try:
            yield
        except BaseException as error:  # A Rust panic is not an Exception. Others that are not, pass through.
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise BundleError(f"{self._path}: the tokenizer failed: {clip(str(error))}") from error
            raise


def _places(encoding: Any) -> list[tuple[int, int]]:
    """Return (start, end) in characters of every token that stands for a part of the prompt."""
    pairs = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    return [(start, end) for (start, end), special in pairs if end > start and not special]


def _cut_part(prompt: str, encoding: Any) -> str:
    """Return the part of a prompt that lies in the overflow of its encoding, and all that follows."""
    starts = [start for overflow in encoding.overflowing for start, _ in _places(overflow)]
    return prompt[min(starts) :].strip() if starts else ""
