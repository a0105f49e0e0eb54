"""Warnings about prompts of which a model with a closed vocabulary knows no word."""

import threading
import warnings
from dataclasses import replace

import pytest
from tiue_runtime import Cancelled, Pipeline, vocabulary
from tiue_runtime.bundle import Bundle, Prompts, write_bundle
from tiue_runtime.vocabulary import Vocabulary

KNOWN = Prompts(("a red heart",), ("red heart", "cat face", "bus", "cherries", "box", "wolf", "thermometer"))


@pytest.mark.parametrize(
    "prompt",
    [
        "a red heart",
        "Cats!",
        "a happy CAT",
        "hearts",
        "buses",
        "a cherry",
        "boxes",
        "wolves",
        "zeppelin in red",
        "",
        "the",
    ],
)
def test_a_prompt_with_a_known_word_is_taken_silently(prompt):
    assert Vocabulary(KNOWN).complaint(prompt) is None


@pytest.mark.parametrize(
    ("prompt", "suggestion"),
    [
        ("a zeppelin", "a red heart"),
        ("thermometre", "thermometer"),
        ("ein Herz", "a red heart"),
        ("a faec", "cat face"),
    ],
)
def test_a_prompt_without_a_known_word_gets_suggestions(prompt, suggestion):
    complaint = Vocabulary(KNOWN).complaint(prompt)
    assert complaint == f"the model knows no word of {prompt!r}; it knows for example {suggestion}"


@pytest.mark.parametrize("prompts", [None, Prompts(), Prompts(("a red heart",))])
def test_a_model_with_an_open_vocabulary_never_complains(prompts):
    assert Vocabulary(prompts).complaint("a zeppelin") is None


@pytest.fixture
def looked_up(monkeypatch):
    """The words that were compared with the known ones."""
    words, compare = [], vocabulary.difflib.get_close_matches
    monkeypatch.setattr(
        vocabulary.difflib, "get_close_matches", lambda word, *others: words.append(word) or compare(word, *others)
    )
    return words


def test_a_long_prompt_of_unknown_words_costs_little(looked_up):
    words = [f"zeppelin{i}" for i in range(100_000)]
    assert Vocabulary(KNOWN).complaint(" ".join(["zeppelin0", *words])).endswith("for example a red heart")
    assert looked_up == words[:32]


def test_three_suggestions_are_enough(looked_up):
    said = Vocabulary(KNOWN).complaint("thermometre zeppelin wollf boxx cherys")
    assert said.endswith("it knows for example thermometer, wolf, box")
    assert looked_up == ["thermometre", "zeppelin", "wollf", "boxx"]


def test_only_the_beginning_of_a_prompt_is_looked_up(pipe, monkeypatch):
    seen = []
    monkeypatch.setattr(Vocabulary, "complaint", lambda self, prompt: seen.append(prompt))
    pipe.encode(["a" * 600, "a red heart"])
    assert seen == ["a" * 64 * 8, "a red heart"]  # 64 characters for each of 8 tokens


def test_a_request_is_cancelled_between_the_words_of_two_prompts(pipe, monkeypatch):
    stop, asked = threading.Event(), []
    monkeypatch.setattr(Vocabulary, "complaint", lambda self, prompt: asked.append(prompt) or stop.set())
    with pytest.raises(Cancelled, match="before text_encoder"):
        pipe(["a zeppelin", "an airship"], cancel=stop)
    assert asked == ["a zeppelin"]


def test_the_pipeline_warns_where_it_was_called(copy):
    write_bundle(copy, replace(Bundle.load(copy).manifest, prompts=KNOWN))
    pipe = Pipeline.load(copy, device="cpu")
    for call in (lambda: pipe("a zeppelin"), lambda: pipe.encode(["a red heart", "a zeppelin"])):
        with pytest.warns(UserWarning, match="knows no word of 'a zeppelin'") as caught:
            call()
        assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.warmup()
        assert pipe("a red heart").images
