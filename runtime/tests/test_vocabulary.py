"""Warnings about prompts of which a model with a closed vocabulary knows no word."""

import warnings
from dataclasses import replace

import pytest
from tiue_runtime import Pipeline
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
