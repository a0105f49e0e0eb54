"""Prompts that name no style get one, which the seed chooses, if the bundle lists styles."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from gate import WAIT, Gate
from tiue_runtime import Pipeline
from tiue_runtime.bundle import Bundle, Prompts, write_bundle
from tiue_runtime.noise import gaussian

COLORS = ("red", "blue")


def styled(directory, *styles):
    """The manifest of a bundle with these styles."""
    prompts = Prompts(("a heart",), ("heart", "star", "sea"), styles)
    return replace(Bundle.load(directory).manifest, prompts=prompts)


@pytest.fixture
def painter(copy):
    """The tiny bundle with colors as styles."""
    write_bundle(copy, styled(copy, *COLORS))
    with Pipeline.load(copy, device="cpu") as pipe:
        yield pipe


def pixels(result):
    return [image.tobytes() for image in result.images]


@pytest.mark.parametrize(
    ("prompt", "drawn"),
    [
        ("a heart", "a heart, blue style"),
        ("a BLUE heart", "a BLUE heart"),
        ("bluebird", "bluebird, blue style"),
        ("a heart (red)", "a heart (red)"),
        ("my own Style", "my own Style"),
        ("a stylish heart", "a stylish heart, blue style"),
        ("", ""),
        ("!", "!"),
    ],
)
def test_a_style_is_added_to_prompts_that_name_none(tiny, prompt, drawn):
    manifest = styled(tiny, *COLORS)
    assert manifest.in_style(prompt, 3) == drawn
    assert manifest.in_style(drawn, 2) == drawn
    assert Bundle.load(tiny).manifest.in_style(prompt, 3) == prompt


def test_a_name_of_several_words_is_named_by_all_of_them(tiny):
    manifest = styled(tiny, "Art-Deco")
    assert manifest.in_style("art gallery", 0) == "art gallery, Art-Deco style"
    assert manifest.in_style("an art deco house", 0) == "an art deco house"


def test_each_picture_is_that_of_its_prompt_with_the_style_of_its_seed(painter):
    result = painter(["a heart", "a red star"], seed=2**64 - 6, num_images=3)
    drawn = ["a heart, red style", "a heart, blue style", "a heart, red style", *["a red star"] * 3]
    assert [record.prompt for record in result.records] == drawn
    assert [(record.prompts, record.num_images, record.index) for record in result.records] == [
        (2, 3, i) for i in range(6)
    ]
    alone = [painter(prompt, seed=2**64 - 6 + i) for i, prompt in enumerate(drawn)]
    assert pixels(result) == [pixels(one)[0] for one in alone]
    assert len(set(pixels(result))) == 6
    for image in result.images:
        assert painter.repeat(image.record).images[0].tobytes() == image.tobytes()


def test_the_style_changes_the_picture_and_not_only_the_record(painter):
    noise = np.stack([gaussian(1, (4, 4, 6))] * 3)
    red, blue, none = painter(["a heart, red style", "a heart, blue style", "a heart"], latents=noise).images
    assert len({red.tobytes(), blue.tobytes(), none.tobytes()}) == 3
    assert painter("a heart", seed=1).images[0].tobytes() == blue.tobytes()


def test_noise_and_embeddings_of_the_caller_choose_no_style(painter, pipe):
    noise = gaussian(1, (1, 4, 4, 6))
    assert pixels(painter("a heart", latents=noise, seed=1)) == pixels(pipe("a heart", latents=noise))
    text = painter.encode("a heart")
    np.testing.assert_array_equal(text, pipe.encode("a heart"))
    assert pixels(painter(prompt_embeds=text, seed=1)) == pixels(pipe(prompt_embeds=text, seed=1))


def test_equal_prompts_are_encoded_once(painter, monkeypatch):
    seen = []
    encode = type(painter._sampler._tokenizer).__call__
    monkeypatch.setattr(
        type(painter._sampler._tokenizer), "__call__", lambda self, given: seen.append(given) or encode(self, given)
    )
    painter(["a heart", "a red star"], seed=0, num_images=4)
    assert seen == [["a heart, red style", "a heart, blue style", "a red star"]]


def test_a_warning_quotes_the_prompt_of_the_caller(painter):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        painter("a zeppelin", seed=0, num_images=4)
    (said,) = caught
    assert str(said.message) == "the model knows no word of 'a zeppelin'; it knows for example a heart"


def test_a_batch_of_several_jobs_has_the_styles_of_their_seeds(painter):
    from tiue_runtime.serve.jobs import Drawing, JobQueue

    gate = Gate(painter)
    asked = [("a heart", 1, 2), ("a zeppelin", 3, 1), ("a red star", 5, 1)]
    with JobQueue(gate, batch=4) as queue:
        queue.submit(Drawing("a heart", seed=9))
        assert gate.entered.wait(WAIT)
        jobs = [queue.submit(Drawing(prompt, seed=seed, count=count)) for prompt, seed, count in asked]
        gate.open.set()
        drawn = [job.future.result(WAIT) for job in jobs]
    assert gate.requests[1][0] == ["a heart, blue style", "a heart, red style", "a zeppelin, blue style", "a red star"]
    assert [len(one.warnings) for one in drawn] == [0, 1, 0] and "'a zeppelin'" in drawn[1].warnings[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for (prompt, seed, count), one in zip(asked, drawn, strict=True):
            assert [image.tobytes() for image in one.pictures] == pixels(painter(prompt, seed=seed, num_images=count))
            for i, image in enumerate(one.pictures):
                assert image.record.prompt == painter.bundle.manifest.in_style(prompt, seed + i)


@pytest.mark.parametrize("stream", [False, True])
def test_the_server_says_which_prompt_was_drawn(painter, stream):
    pytest.importorskip("starlette")
    import json

    from starlette.testclient import TestClient
    from tiue_runtime.serve.app import create_app

    def said(prompt):
        fields = {"prompt": prompt, "seed": 1, "stream": stream}
        answer = client.post("/v1/images/generations", json=fields)
        assert answer.status_code == 200, answer.text
        if not stream:
            (item,) = answer.json()["data"]
            return item.get("revised_prompt")
        *_, last = answer.text.strip().split("data: ")
        return json.loads(last)["tiue"].get("revised_prompt")

    with TestClient(create_app({"tiny": painter}), base_url="http://127.0.0.1:8080") as client:
        assert said("a heart") == "a heart, blue style"
        assert said("a red heart") is None
