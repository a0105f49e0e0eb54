"""Progress, previews, cancelling by a callback, and the public halves of a pipeline: `encode` and `decode`."""

from dataclasses import replace

import numpy as np
import pytest
from tiue_runtime import Cancelled, OutOfMemoryError, Pipeline, RequestError
from tiue_runtime.bundle import Bundle, Preview, write_bundle
from tiue_runtime.noise import gaussian

HEART, STAR = "a red heart", "a blue star"
STAGES = ["text_encoder", "unet_encoder", *["unet_decoder"] * 4, "vae_decoder"]
MATRIX = Preview(((0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5), (0.0, 0.0, 0.0)), (0.5, 0.5, 0.5))
LEVEL = 1  # of 256; OpenVINO and the CPU provider round alike up to this


@pytest.fixture
def load(copy):
    """Return a function that loads the tiny bundle with a preview matrix, or without (None)."""

    def load(preview: Preview | None) -> Pipeline:
        write_bundle(copy, replace(Bundle.load(copy).manifest, preview=preview))
        return Pipeline.load(copy, device="cpu")

    return load


def watch(pipe, *args, **options):
    seen = []
    result = pipe(*args, callback=seen.append, **options)
    return result, seen


def test_every_stage_reports_and_the_fraction_rises_to_one(pipe):
    result, seen = watch(pipe, HEART, seed=1)
    assert [progress.stage for progress in seen] == STAGES
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions) and len(set(fractions)) == len(fractions)
    assert fractions[0] > 0 and fractions[-1] == pytest.approx(1)
    seconds = [progress.seconds for progress in seen]
    assert seconds == sorted(seconds) and 0 < seconds[-1] <= result.timings["total"]


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({"prompt": HEART, "output_type": "latent"}, STAGES[:-1]),
        ({"prompt_embeds": gaussian(1, (1, 8, 3))}, STAGES[1:]),
        ({"prompt": HEART, "memory": "parallel"}, [*STAGES[:3], STAGES[-1]]),
        ({"prompt": HEART, "memory": "low"}, STAGES),
    ],
)
def test_a_request_reports_the_stages_that_it_goes_through(pipe, options, stages):
    _, seen = watch(pipe, **options)
    assert [progress.stage for progress in seen] == stages
    assert seen[-1].fraction == pytest.approx(1)


def test_tiles_are_parts_of_the_last_stage(pipe):
    _, seen = watch(pipe, HEART, height=64, width=96, vae_tiling=True, memory="parallel")
    tiles = [(progress.step, progress.steps) for progress in seen if progress.stage == "vae_decoder"]
    assert len(tiles) > 2 and tiles == [(i + 1, len(tiles)) for i in range(len(tiles))]
    assert seen[-1].fraction == pytest.approx(1)


def test_previews_are_pictures_of_full_size(load):
    result, seen = watch(load(MATRIX), HEART, seed=1, height=16, width=24)
    assert [progress.preview() is None for progress in seen] == [True] * 2 + [False] * 5
    assert all(progress.preview().size == result.images[0].size == (24, 16) for progress in seen[2:])


def test_a_preview_has_the_colors_of_the_matrix(load):
    pipe = load(MATRIX)
    _, seen = watch(pipe, HEART, seed=1, output_type="latent")
    z_0 = seen[-1].latents[0, :3].transpose(1, 2, 0)
    colors = np.clip(z_0 * 0.5 + 0.5, 0, 1) * 255
    shown = np.asarray(seen[-1].preview(), dtype=float)
    assert abs(shown.mean(axis=(0, 1)) - colors.mean(axis=(0, 1))).max() < 2 * LEVEL
    assert (shown.min(axis=(0, 1)) >= colors.min(axis=(0, 1)) - LEVEL).all()
    assert (shown.max(axis=(0, 1)) <= colors.max(axis=(0, 1)) + LEVEL).all()


@pytest.mark.parametrize("memory", ["sequential", "parallel", "low"])
def test_the_last_exact_preview_is_the_picture(pipe, memory):
    previews = []

    def callback(progress):
        if progress.latents is not None and progress.stage == "unet_decoder":
            previews.append([np.asarray(progress.preview(index, exact=True)) for index in (0, 1)])

    images = pipe([HEART, STAR], seed=3, callback=callback, memory=memory).images
    assert len(previews) == (1 if memory == "parallel" else 4)
    for preview, image in zip(previews[-1], images, strict=True):
        np.testing.assert_allclose(preview, np.asarray(image), atol=LEVEL)


def test_a_bundle_without_a_matrix_says_how_to_get_previews(load):
    result, seen = watch(load(None), HEART)
    with pytest.raises(RequestError, match="no matrix for quick previews; ask for exact ones"):
        seen[-1].preview()
    with pytest.raises(RequestError, match="index: expected 0 to 0, got 1"):
        seen[-1].preview(1, exact=True)
    assert seen[-1].preview(exact=True).size == result.images[0].size


@pytest.mark.parametrize("stop", [True, np.True_])
@pytest.mark.parametrize("stage", sorted(set(STAGES)))
def test_a_callback_that_returns_true_cancels(pipe, stop, stage):
    seen = []

    def callback(progress):
        seen.append(progress.stage)
        return stop if progress.stage == stage else np.False_

    with pytest.raises(Cancelled, match=f"cancelled by the callback after {stage}"):
        pipe(HEART, callback=callback)
    assert seen == STAGES[: STAGES.index(stage) + 1]


@pytest.mark.parametrize("answer", [None, False, 1, "yes", [0]])
def test_other_answers_of_a_callback_do_not_cancel(pipe, answer):
    assert pipe(HEART, callback=lambda progress: answer).images


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), MemoryError("out of memory"), OutOfMemoryError("mine")])
@pytest.mark.parametrize("stage", sorted(set(STAGES)))
def test_an_error_of_a_callback_passes_unchanged(pipe, error, stage):
    def callback(progress):
        if progress.stage == stage:
            raise error

    with pytest.raises(type(error)) as caught:
        pipe(HEART, callback=callback)
    assert caught.value is error
    assert pipe(HEART, seed=1).images


def test_embeddings_can_be_kept_and_mixed(pipe, close, closed_form):
    heart, star = pipe.encode(HEART), pipe.encode([STAR])
    assert heart.shape == star.shape == (1, 8, 3) and heart.dtype == np.float32
    same = pipe(prompt_embeds=heart, seed=7, output_type="latent").images
    np.testing.assert_array_equal(same, pipe(HEART, seed=7, output_type="latent").images)
    mixed = pipe(prompt_embeds=0.5 * heart + 0.5 * star, seed=7, output_type="latent").images
    close(mixed[0], closed_form(gaussian(7, (4, 4, 6)), (0.5 * heart + 0.5 * star)[0]))
    assert pipe.encode([HEART, STAR]).shape == (2, 8, 3)


def test_latents_can_be_decoded_later(pipe):
    z_0 = pipe([HEART, STAR], seed=7, output_type="latent").images
    pictures = pipe([HEART, STAR], seed=7, output_type="np").images
    np.testing.assert_array_equal(pipe.decode(z_0, output_type="np"), pictures)
    for decoded, image in zip(pipe.decode(z_0), pipe([HEART, STAR], seed=7).images, strict=True):
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.encode(5), "prompt: expected a string"),
        (lambda pipe: pipe.encode([]), "prompt: expected at least one"),
        (lambda pipe: pipe.encode(HEART, timeout=-1), "timeout: expected seconds"),
        (lambda pipe: pipe.encode(HEART, memory="none"), "memory: expected one of"),
        (lambda pipe: pipe.decode([1.0]), "latents: expected shape"),
        (lambda pipe: pipe.decode(np.full((1, 4, 4, 6), np.nan)), "latents: expected values that are finite"),
        (lambda pipe: pipe.decode(np.zeros((1, 4, 4, 6)), output_type="latent"), "output_type: expected one of"),
        (lambda pipe: pipe.decode(np.zeros((1, 4, 4, 6)), vae_tiling=1), "vae_tiling: expected True or False"),
        (lambda pipe: pipe.decode(np.zeros((1, 4, 4, 6)), callback=5), "callback: expected a function"),
    ],
)
def test_wrong_arguments_of_the_halves_are_refused(pipe, call, message):
    with pytest.raises(RequestError, match=message):
        call(pipe)


def test_the_halves_can_be_cancelled(pipe):
    with pytest.raises(Cancelled, match="cancelled before text_encoder"):
        pipe.encode(HEART, cancel=lambda: True)
    with pytest.raises(Cancelled, match="cancelled before vae_decoder"):
        pipe.decode(np.zeros((1, 4, 4, 6)), cancel=lambda: True)
    seen = []
    pipe.decode(np.zeros((2, 4, 4, 6)), callback=seen.append)
    assert [progress.fraction for progress in seen] == [1]
