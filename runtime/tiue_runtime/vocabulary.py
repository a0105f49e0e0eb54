"""Words that a model knows, if it was trained on a closed list of them: a warning instead of a strange picture."""

import difflib
import re
from itertools import islice

from tiue_runtime.bundle import Prompts
from tiue_runtime.errors import clip

# Words that say nothing about a picture's content.
_SMALL = {
    *("a", "an", "and", "at", "by", "for", "from", "in", "into", "is", "it", "its", "my", "of", "on", "or", "over"),
    *("style", "that", "the", "this", "to", "under", "with"),
}
_CLOSE = 0.7  # the similarity of a word that was probably meant, as difflib measures it
_LOOKED_UP = 32  # unknown words at most; each takes 2 ms with the default model
_SHOWN = 3  # suggestions


class PromptWarning(UserWarning):
    """A warning that quotes a prompt. Other requests of a batch must not hear it."""

    def __init__(self, message: str, prompt: str = "") -> None:  # pickle passes the message alone
        super().__init__(message)
        self.prompt = prompt


class Vocabulary:
    """The words of a bundle's `prompts`. Without a vocabulary, every word counts as known."""

    def __init__(self, prompts: Prompts | None) -> None:
        self._examples = prompts.examples if prompts else ()
        self._styles = [f", {name} style" for name in prompts.styles] if prompts else []
        self._phrases: dict[str, str] = {}  # word => the first phrase that has it
        for phrase in prompts.vocabulary if prompts else ():
            for word in _words(phrase):
                self._phrases.setdefault(word, phrase)
        self._forms = {form for word in self._phrases for form in _forms(word)}

    def complaint(self, prompt: str) -> str | None:
        """Return a warning about a prompt of which no word is known, else None.

        Plural and singular are the same word. A prompt without words of content has none that could be unknown.
        """
        for style in self._styles:
            prompt = prompt.removesuffix(style)
        words = list(dict.fromkeys(_words(prompt)))
        if not self._phrases or not words or any(_forms(word) & self._forms for word in words):
            return None
        looked_up = (difflib.get_close_matches(word, self._phrases, 1, _CLOSE) for word in words[:_LOOKED_UP])
        meant = islice((self._phrases[close] for found in looked_up for close in found), _SHOWN)
        suggestions = list(meant) or list(self._examples) or list(self._phrases.values())
        return f"the model knows no word of {clip(prompt)!r}; it knows for example {', '.join(suggestions[:_SHOWN])}"


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in _SMALL]


def _forms(word: str) -> set[str]:
    """Return a word and its possible singulars."""
    forms = {word}
    for ending, singular in (("s", ""), ("es", ""), ("ies", "y"), ("ves", "f")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            forms.add(word.removesuffix(ending) + singular)
    return forms
