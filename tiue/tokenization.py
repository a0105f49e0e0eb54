"""Reading a pipeline's tokenizer, so that it gives the tokens of the class that the pipeline names."""

from pathlib import Path

from tokenizers import Regex, normalizers
from transformers import CLIPTokenizerFast, PreTrainedTokenizerFast

_CASED = r"[\p{Lu}\p{Ll}\p{Lt}]"
_IGNORED = r"[\p{Mn}\p{Me}\p{Cf}\p{Lm}\p{Sk}'.:·’]"  # noqa: RUF001 (a word goes on across these)
# The small letter of a sigma that ends a word is another one.
_FINAL_SIGMA = rf"(?<={_CASED}|{_CASED}{_IGNORED}|{_CASED}{_IGNORED}{_IGNORED})Σ(?!{_IGNORED}*{_CASED})"


def load_tokenizer(cls: type[PreTrainedTokenizerFast], directory: Path, *, like_slow: bool) -> PreTrainedTokenizerFast:
    """Read a tokenizer from a directory, in the files of its slow class or of its fast one.

    transformers' fast CLIPTokenizer treats invisible characters, Chinese characters and final sigmas otherwise than
    the slow one, with which Stable Diffusion was trained.

    Args:
        cls: the fast class.
        directory: holds vocab.json and merges.txt, vocab.txt, or tokenizer.json.
        like_slow: the pipeline names the slow class, so that the fast one must give its tokens.

    Raises:
        Exception: whatever the tokenizers library raises for files that it cannot read.
    """
    tokenizer = cls.from_pretrained(directory, local_files_only=True)
    if like_slow and isinstance(tokenizer, CLIPTokenizerFast):
        tokenizer.backend_tokenizer.normalizer = _slow_clip_normalizer()
    return tokenizer


def _slow_clip_normalizer() -> normalizers.Normalizer:
    """Return what the slow CLIPTokenizer does before it looks for words, in an environment without ftfy."""
    return normalizers.Sequence(
        [
            # Control characters and U+FFFD go, white space becomes a space, and Chinese characters stand alone.
            normalizers.BertNormalizer(
                clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
            ),
            normalizers.Replace(Regex(r"[\p{Cn}\p{Cf}]"), ""),  # those that are newer than BertNormalizer's tables
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Replace(Regex(_FINAL_SIGMA), "ς"),
            normalizers.Lowercase(),
        ]
    )
