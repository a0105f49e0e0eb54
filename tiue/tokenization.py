"""Reading a pipeline's tokenizer. It gives the same tokens as the class that the pipeline names."""

from pathlib import Path

from tokenizers import Regex, normalizers
from transformers import CLIPTokenizerFast, PreTrainedTokenizerFast

_CASED = r"[\p{Lu}\p{Ll}\p{Lt}]"
_IGNORED = r"[\p{Mn}\p{Me}\p{Cf}\p{Lm}\p{Sk}'.:·’]"  # noqa: RUF001 (a word goes on across these)
# At the end of a word, the small letter of a sigma has another form.
_FINAL_SIGMA = rf"(?<={_CASED}|{_CASED}{_IGNORED}|{_CASED}{_IGNORED}{_IGNORED})Σ(?!{_IGNORED}*{_CASED})"

# In the slow class, U+0345 ends a word: it is a letter only where case does not count.
_SPACES = "[\\s\u0345]+"


def load_tokenizer(cls: type[PreTrainedTokenizerFast], directory: Path, *, like_slow: bool) -> PreTrainedTokenizerFast:
    """Read a tokenizer from a directory, from the files of its slow or its fast class.

    Stable Diffusion was trained with transformers' slow CLIPTokenizer. The fast one treats invisible characters,
    Chinese characters and final sigmas differently.

    Args:
        cls: the fast class.
        directory: holds vocab.json and merges.txt, vocab.txt, or tokenizer.json.
        like_slow: the pipeline names the slow class, so the fast one must give the slow one's tokens.

    Returns:
        The tokenizer.

    Raises:
        Exception: the tokenizers library cannot read the files.
    """
    tokenizer = cls.from_pretrained(directory, local_files_only=True)
    if like_slow and isinstance(tokenizer, CLIPTokenizerFast):
        tokenizer.backend_tokenizer.normalizer = _slow_clip_normalizer()
    return tokenizer


def _slow_clip_normalizer() -> normalizers.Normalizer:
    """Return the normalization of the slow CLIPTokenizer in an environment without ftfy.

    Of all assigned characters, 257 still differ. U+2B820 to U+2B91F, rare Chinese characters, are not separated, and
    U+017F after an apostrophe is no s. The version of Unicode decides which characters are assigned.
    """
    return normalizers.Sequence(
        [
            # It removes control characters and U+FFFD, turns white space into spaces, and separates Chinese characters.
            normalizers.BertNormalizer(
                clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
            ),
            normalizers.Replace(Regex(r"[\p{Cn}\p{Cf}]"), ""),  # characters newer than BertNormalizer's tables
            normalizers.NFC(),
            normalizers.Replace(Regex(_SPACES), " "),
            normalizers.Replace(Regex(_FINAL_SIGMA), "ς"),
            normalizers.Lowercase(),
        ]
    )
