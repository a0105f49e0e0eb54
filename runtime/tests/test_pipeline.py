import json
import os
import shutil
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import tiue_runtime
from tiue_runtime import Pipeline
from tiue_runtime import kept_pipelines as generating
from tiue_runtime.bundle import GRAPHS, Bundle, write_bundle
from tiue_runtime.errors import BundleError, Cancelled, InferenceError, OutOfMemoryError, RequestError
from tiue_runtime.noise import gaussian
from tiue_runtime.ort import graph as graph_module

HEART, STAR = "a red heart", "a blue star"
NEAREST_LEVEL = 0.5 + 1e-3  # of 256 levels; the second term is for float32


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("memory", ["parallel", "sequential"])
def test_latents_equal_the_closed_form(pipe, closed_form, close, steps, memory):
    result = pipe([HEART, STAR], seed=7, steps=steps, memory=memory, output_type="latent")
    z_t = [gaussian(7, (4, 4, 6)), gaussian(8, (4, 4, 6))]
    close(result.images, [closed_form(z_t[0], HEART, steps), closed_form(z_t[1], STAR, steps)])
    assert result.images.dtype == np.float32
    assert (result.steps, result.memory) == (steps, memory)


def test_pixels_equal_the_closed_form(pipe, closed_form, close):
    z_0 = closed_form(gaussian(7, (4, 4, 6)), HEART)
    image = (z_0 / 0.5 + 0.25)[:3].repeat(2, axis=1).repeat(2, axis=2).transpose(1, 2, 0)  # (H, W, 3) in about [-1, 1]
    unit = np.clip(image / 2 + 0.5, 0, 1)
    assert unit.min() == 0 and unit.max() == 1  # Clipping is tested as well.
    result = pipe(HEART, seed=7, output_type="np")
    assert result.images.shape == (1, 8, 12, 3) and result.images.dtype == np.float32
    close(result.images[0], unit)
    picture = pipe(HEART, seed=7).images[0]
    assert (picture.mode, picture.size) == ("RGB", (12, 8))
    assert np.abs(np.asarray(picture) - 255 * unit).max() <= NEAREST_LEVEL


def test_order_is_prompt_major(pipe, closed_form, close):
    result = pipe([HEART, STAR], num_images=2, seed=10, output_type="latent")
    assert result.seeds == (10, 11, 12, 13)
    prompts = [HEART, HEART, STAR, STAR]
    expected = [closed_form(gaussian(10 + j, (4, 4, 6)), prompt) for j, prompt in enumerate(prompts)]
    close(result.images, expected)


def test_an_image_does_not_depend_on_its_batch(pipe):
    batch = pipe(HEART, num_images=3, seed=20, output_type="np").images
    for j in range(3):
        alone = pipe(HEART, seed=20 + j, output_type="np").images
        np.testing.assert_array_equal(alone[0], batch[j])


def test_a_drawn_seed_is_reported(pipe):
    first, second = (pipe(HEART, output_type="latent") for _ in range(2))
    assert first.seeds != second.seeds
    again = pipe(HEART, seed=first.seeds[0], output_type="latent")
    np.testing.assert_array_equal(again.images, first.images)


def test_size_of_the_image(pipe):
    assert pipe(HEART, seed=1, height=16, width=4).images[0].size == (4, 16)
    assert pipe(HEART, seed=1, width=16).images[0].size == (16, 8)


def test_latents_stand_for_seed_and_size(pipe, closed_form, close):
    z_t = np.stack([gaussian(1, (4, 6, 2)), gaussian(2, (4, 6, 2))])
    result = pipe(HEART, num_images=2, latents=z_t.astype(np.float64), output_type="latent")
    close(result.images, [closed_form(z, HEART) for z in z_t])
    assert result.seeds == ()
    seeded = pipe(HEART, num_images=2, latents=z_t, seed=9, output_type="latent")
    np.testing.assert_array_equal(seeded.images, result.images)
    assert seeded.seeds == ()
    assert pipe(HEART, latents=z_t[:1], height=12, width=4).images[0].size == (4, 12)


def test_prompt_embeds_stand_for_the_prompt(pipe, closed_form, close):
    text = gaussian(5, (2, 8, 3))
    result = pipe(prompt_embeds=text, num_images=2, seed=3, output_type="latent")
    expected = [closed_form(gaussian(3 + j, (4, 4, 6)), text[j // 2]) for j in range(4)]
    close(result.images, expected)
    assert "text_encoder" not in result.timings


def test_previews_assume_the_last_noise_for_the_rest(pipe, closed_form_eps, close):
    seen = []
    result = pipe(HEART, seed=7, output_type="latent", callback=seen.append)
    calls = [progress for progress in seen if progress.stage == "unet_decoder"]
    assert [(progress.step, progress.steps) for progress in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert result.memory == "sequential"
    z_t = gaussian(7, (4, 4, 6))
    first, second = closed_form_eps(z_t, HEART, 751), closed_form_eps(z_t, HEART, 501)
    close(calls[0].latents[0], 0.2 * z_t + (0.5 - 0.25 + 1.5 + 0.125) * first)
    close(calls[1].latents[0], 0.2 * z_t + 0.5 * first + (-0.25 + 1.5 + 0.125) * second)
    close(calls[3].latents, result.images)


def test_callback_in_parallel_mode_gets_the_final_latents_and_owns_them(pipe):
    calls = []

    def callback(progress):
        if progress.latents is not None:
            calls.append((progress.step, progress.steps))
            progress.latents[:] = 0

    result = pipe(HEART, seed=7, output_type="latent", memory="parallel", callback=callback)
    assert calls == [(4, 4)] and result.memory == "parallel"
    np.testing.assert_array_equal(result.images, pipe(HEART, seed=7, output_type="latent").images)


def test_cancel_stops_between_graphs_and_steps(pipe):
    event = threading.Event()
    steps = []

    def callback(progress):
        if progress.stage == "unet_decoder":
            steps.append(progress.step)
        if progress.step == 2:
            event.set()

    with pytest.raises(Cancelled, match="cancelled before unet_decoder"):
        pipe(HEART, callback=callback, cancel=event)
    assert steps == [1, 2]
    answers = iter([False] * 5 + [True])  # asked before the noise, before the words and before each graph
    with pytest.raises(Cancelled, match="cancelled before vae_decoder"):
        pipe(HEART, cancel=lambda: next(answers))
    assert pipe(HEART, cancel=threading.Event()).images


def test_timings(pipe):
    timings = pipe(HEART).timings
    assert set(timings) == {*GRAPHS, "total"}
    assert all(seconds > 0 for seconds in timings.values())
    assert sum(timings[graph] for graph in GRAPHS) <= timings["total"]


def test_the_part_cut_off_is_named(pipe):
    with pytest.warns(UserWarning, match=r"longer than 8 tokens; this part was cut off: 'THE sea, a star'") as caught:
        pipe(["a red heart", "a red heart a blue star THE sea, a star"], seed=1)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("a red heart a blue star", seed=1)  # exactly 8 tokens


def test_concurrent_calls_do_not_mix(pipe):
    expected = [pipe(HEART, seed=seed, output_type="np").images for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: pipe(HEART, seed=seed, output_type="np").images, range(16)))
    np.testing.assert_array_equal(found, expected)


def test_generate_keeps_its_pipeline(tiny, pipe, monkeypatch):
    loads = []
    load = Pipeline.load
    monkeypatch.setattr(Pipeline, "load", lambda *args, **options: loads.append(args) or load(*args, **options))
    monkeypatch.setenv("TIUE_BUNDLE", str(tiny))
    for seed in (1, 2):
        images = tiue_runtime.generate([HEART, STAR], seed=seed, device="cpu")
        expected = pipe([HEART, STAR], seed=seed).images
        assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    assert len(loads) <= 1


@pytest.fixture
def kept(monkeypatch):
    """The pipelines that `generate` keeps, none at first."""
    monkeypatch.setattr(generating, "kept_pipelines", generating.KeptPipelines())
    return generating.kept_pipelines.all


@pytest.mark.parametrize(
    ("wrong", "error"), [({"output_type": "np"}, TypeError), ({"steps": "4"}, RequestError), ({"typo": 1}, TypeError)]
)
def test_generate_refuses_options_before_it_loads_a_bundle(kept, tiny, wrong, error):
    with pytest.raises(error, match=next(iter(wrong))):
        tiue_runtime.generate(HEART, bundle=tiny, device="cpu", **wrong)
    assert not kept()


def test_generate_has_one_pipeline_for_all_memory_modes(kept, tiny):
    for memory, graphs in (("low", 0), (None, 4), ("low", 0), ("sequential", 4)):
        tiue_runtime.generate(HEART, bundle=tiny, device="cpu", memory=memory)
        [pipe] = kept()
        assert sum(graph.loaded for graph in pipe.graphs) == graphs


def test_generate_reloads_a_bundle_that_was_written_again(kept, copy):
    def shade():
        return np.asarray(tiue_runtime.generate(HEART, seed=1, bundle=copy, device="cpu")[0])

    first, old = shade(), weakref.ref(*kept())
    bundle = Bundle.load(copy)
    schedule = replace(bundle.manifest.schedules[4], noise_weight=0.9)  # The file keeps its size.
    write_bundle(copy, replace(bundle.manifest, schedules={**bundle.manifest.schedules, 4: schedule}))
    assert not np.array_equal(shade(), first)
    assert old() is None
    assert len(kept()) == 1


def test_generate_reloads_a_bundle_that_was_installed_again_unchanged(kept, copy):
    def shade():
        return tiue_runtime.generate(HEART, seed=1, bundle=copy, device="cpu", memory="low")[0].tobytes()

    first = shade()
    for path in copy.iterdir():
        os.utime(path, (0, 0))
    assert shade() == first


def test_generate_keeps_the_two_used_last(kept, tiny, copy):
    heavy = tiny.parent / "heavy"
    for bundle in (tiny, copy, tiny, heavy):
        tiue_runtime.generate(HEART, bundle=bundle, device="cpu", height=8, width=8)
    assert [pipe.bundle.directory for pipe in kept()] == [tiny.resolve(), heavy.resolve()]


def test_result_says_where_it_ran(pipe):
    assert pipe.device == pipe(HEART).device == "cpu"


def rewrite(copy, graph, source):
    """Replace the file of `graph` by another graph's."""
    manifest = Bundle.load(copy).manifest
    (copy / f"{graph}.onnx").write_bytes((copy / f"{source}.onnx").read_bytes())
    write_bundle(copy, manifest)


def test_the_cpu_loads_two_graphs_at_a_time(tiny, monkeypatch):
    together, create = threading.Barrier(2), graph_module.create_session

    def create_session(*arguments):
        together.wait(timeout=30)  # BrokenBarrierError if the other thread does not come
        return create(*arguments)

    monkeypatch.setattr(graph_module, "create_session", create_session)
    pipe = Pipeline.load(tiny, device="cpu")
    assert all(loaded.loaded for loaded in pipe.graphs)


@pytest.mark.parametrize(
    "graph, source, message",
    [
        (
            "vae_decoder",
            "unet_decoder",
            r"vae_decoder: expected inputs among latents, got mid, skip\.0, step_index",
        ),
        (
            "unet_encoder",
            "text_encoder",
            "unet_encoder: expected inputs among latents, text, got attention_mask",
        ),
        (
            "unet_decoder",
            "unet_encoder",
            "unet_decoder: expected contribution, step_index, step_weight, got only",
        ),
        ("unet_encoder", "vae_decoder", r"unet_decoder: expected inputs among .*, got mid, skip\.0"),
    ],
)
def test_graphs_that_do_not_fit_are_refused_at_load(copy, graph, source, message):
    rewrite(copy, graph, source)
    with pytest.raises(BundleError, match=message):
        Pipeline.load(copy, device="cpu")


def test_an_image_of_the_wrong_size_is_refused(edit):
    directory = edit(lambda content: content.update(pixels_per_latent=1))
    with pytest.raises(
        BundleError, match=r"vae_decoder: expected image of shape \(1, 3, 8, 12\), got \(1, 3, 16, 24\)"
    ):
        Pipeline.load(directory, device="cpu")(HEART)


class Overflowing:
    """A graph whose output has one value that is not finite."""

    def __init__(self, graph, name, value):
        self._graph, self._name, self._value = graph, name, value

    def __call__(self, feed, **options):
        outputs = self._graph(feed, **options)
        value = outputs[self._name]
        array = np.array(value if isinstance(value, np.ndarray) else value.numpy())
        array.flat[-1] = self._value
        return {**outputs, self._name: array}

    def __getattr__(self, name):
        return getattr(self._graph, name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("graph, output", [("text_encoder", "text"), ("unet_decoder", "contribution")])
def test_overflow_names_the_stage_and_the_remedy(pipe, monkeypatch, graph, output, value):
    monkeypatch.setattr(pipe.graphs, graph, Overflowing(getattr(pipe.graphs, graph), output, value))
    message = rf"{graph}: {output} has NaN or infinity on cpu\. Look for damaged weights with `tiue-runtime verify`"
    with pytest.raises(InferenceError, match=message):
        pipe(HEART, seed=1)


def test_features_that_are_not_finite_are_errors_of_the_encoder(pipe, monkeypatch):
    name = next(iter(pipe.graphs.unet_encoder.outputs))
    monkeypatch.setattr(pipe.graphs, "unet_encoder", Overflowing(pipe.graphs.unet_encoder, name, np.nan))
    monkeypatch.setattr(pipe.graphs, "unet_decoder", Overflowing(pipe.graphs.unet_decoder, "contribution", np.nan))
    with pytest.raises(InferenceError, match=rf"unet_encoder: {name} has NaN or infinity on cpu"):
        pipe(HEART, seed=1)


@pytest.mark.parametrize("output_type", ["pil", "np"])
@pytest.mark.parametrize("bundle, remedy", [
    ("tiny", r"fp16 overflowed: export the bundle again in fp32"),
    ("heavy", r'fp16 overflowed: export the bundle again in fp32, or load with vae="tiny"'),
])  # fmt: skip
def test_overflow_is_not_turned_into_a_black_image(tiny, tmp_path, bundle, remedy, output_type):
    directory = shutil.copytree(tiny.parent / bundle, tmp_path / bundle)
    manifest = Bundle.load(directory).manifest
    write_bundle(directory, replace(manifest, precision="fp16"))
    pipe = Pipeline.load(directory, device="cpu")
    pipe.graphs.vae_decoder = Overflowing(pipe.graphs.vae_decoder, "image", np.nan)
    with pytest.raises(InferenceError, match=rf"vae_decoder: image has NaN or infinity on cpu\. {remedy}$"):
        pipe(HEART, seed=1, height=8, width=8, output_type=output_type)


@pytest.mark.parametrize(
    "variant, remedy",
    [
        ("cuda", 'Its cuda graphs overflowed: load with variant="portable"'),
        ("cpu", "Look for damaged weights"),
        ("portable", "fp16 overflowed: export the bundle again"),
    ],
)
def test_the_remedy_of_overflow_is_that_of_the_variant(edit, monkeypatch, variant, remedy):
    def add(content):
        content["variants"] = {name: content["variants"]["portable"] for name in ("portable", "cpu", "cuda")}
        content["precision"] = "fp16"

    pipe = Pipeline.load(edit(add), device="cpu")
    assert pipe.variant == "cpu"
    monkeypatch.setattr(pipe.graphs, "variant", variant)  # No GPU is here.
    monkeypatch.setattr(pipe.graphs, "unet_encoder", Overflowing(pipe.graphs.unet_encoder, "mid", np.nan))
    with pytest.raises(InferenceError, match=rf"mid has NaN or infinity on cpu\. {remedy}"):
        pipe(HEART, seed=1)


@pytest.mark.parametrize("setting", ["padding", "truncation"])
def test_tokenizer_must_agree_with_the_bundle(copy, setting):
    manifest = Bundle.load(copy).manifest
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content[setting] = None
    path.write_text(json.dumps(content), encoding="utf-8")
    write_bundle(copy, manifest)
    with pytest.raises(BundleError, match=r"expected padding and truncation to text_length 8, got .*None"):
        Pipeline.load(copy, device="cpu")


def test_a_file_that_is_not_a_tokenizer(copy):
    manifest = Bundle.load(copy).manifest
    (copy / "tokenizer.json").write_text("{}", encoding="utf-8")
    write_bundle(copy, manifest)
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a tokenizer that can be used"):
        Pipeline.load(copy, device="cpu")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_memory_that_ends_while_a_bundle_is_read_is_an_out_of_memory_error(tiny, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("tiue_runtime.sampler.PromptTokenizer", fail)
    with pytest.raises(OutOfMemoryError, match='load with memory="low"'):
        Pipeline.load(tiny, device="cpu")


def test_warmup_takes_embeddings_in_place_of_a_prompt(pipe):
    seen = []
    pipe.warmup(prompt_embeds=pipe.encode([HEART, STAR]), callback=lambda progress: seen.append(progress.stage))
    assert seen[-1] == "vae_decoder" and "text_encoder" not in seen
    pipe.warmup(prompt_embeds=None)
