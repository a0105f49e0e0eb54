import functools
import re
import threading
import time

import numpy as np
import pytest
from tiue_runtime import Cancelled, Pipeline, RequestError, TiueError, budget, generate
from tiue_runtime.options import LoadOptions, RequestOptions, complete, described

Z = np.zeros((1, 4, 4, 6), dtype=np.float32)
TEXT = np.zeros((1, 8, 3), dtype=np.float32)

WRONG = {
    "steps": ({"steps": 3}, "steps: this bundle was trained for 2, 4, got 3"),
    "steps float": ({"steps": 4.0}, "steps: expected an integer or None, got 4.0"),
    "steps list": ({"steps": [4]}, "steps: expected an integer or None, got [4]"),
    "steps true": ({"steps": True}, "steps: expected an integer or None, got True"),
    "height": ({"height": 10}, "height: expected a multiple of 4 in pixels, for example 8 or 12, got 10"),
    "width": ({"width": 3}, "width: expected a multiple of 4 in pixels, for example 4, got 3"),
    "zero": ({"width": 0}, "width: expected a multiple of 4 in pixels, for example 4, got 0"),
    "negative": ({"height": -4}, "height: expected a multiple of 4 in pixels, for example 4, got -4"),
    "float size": ({"height": 8.0}, "height: expected an integer or None, got 8.0"),
    "no prompts": ({"prompt": []}, "prompt: expected at least one prompt, got an empty list"),
    "prompt type": ({"prompt": 5}, "prompt: expected a string or a list of strings, got int"),
    "item type": ({"prompt": ["a", None]}, "prompt[1]: expected a string, got NoneType"),
    "neither": ({"prompt": None}, "prompt: expected either prompt or prompt_embeds, got neither"),
    "both": ({"prompt_embeds": TEXT}, "prompt: expected either prompt or prompt_embeds, got both"),
    "embeds rank": (
        {"prompt": None, "prompt_embeds": TEXT[0]},
        "prompt_embeds: expected shape (B, 8, 3), got (8, 3)",
    ),
    "embeds length": (
        {"prompt": None, "prompt_embeds": TEXT[:, :5]},
        "prompt_embeds: expected shape (B, 8, 3), got (1, 5, 3)",
    ),
    "embeds width": (
        {"prompt": None, "prompt_embeds": TEXT[..., :2]},
        "prompt_embeds: expected shape (B, 8, 3), got (1, 8, 2)",
    ),
    "no embeds": (
        {"prompt": None, "prompt_embeds": TEXT[:0]},
        "prompt_embeds: expected shape (B, 8, 3), got (0, 8, 3)",
    ),
    "embeds dtype": (
        {"prompt": None, "prompt_embeds": TEXT.astype(np.int64)},
        "prompt_embeds: expected floating-point values, got int64",
    ),
    "latents channels": ({"latents": Z[:, :3]}, "latents: expected shape (1, 4, h, w), got (1, 3, 4, 6)"),
    "latents batch": (
        {"latents": Z, "num_images": 2},
        "latents: expected shape (2, 4, h, w), got (1, 4, 4, 6)",
    ),
    "latents multiple": (
        {"latents": Z[:, :, :3]},
        "latents: height of the image: expected a multiple of 4 in pixels, for example 4 or 8, got 6",
    ),
    "latents NaN": ({"latents": Z * np.nan}, "latents: expected values that are finite in float32, got NaN"),
    "latents text": ({"latents": "x"}, "latents: expected shape (1, 4, h, w), got ()"),
    "latents and height": (
        {"latents": Z, "height": 12},
        "height: latents of shape (1, 4, 4, 6) make 8, got 12",
    ),
    "prompt surrogate": (
        {"prompt": "caf\udce9"},
        "prompt[0]: expected text, got bytes that are not UTF-8: 'caf\\udce9'",
    ),
    "num_images": ({"num_images": 0}, "num_images: expected an integer from 1 to 1048576, got 0"),
    "num_images float": ({"num_images": 1.5}, "num_images: expected an integer, got 1.5"),
    "seed": ({"seed": -1}, "seed: expected an integer in [0, 2**64), got -1"),
    "seed text": ({"seed": "1"}, "seed: expected an integer or None, got '1'"),
    "last seed": (
        {"seed": 2**64 - 1, "num_images": 2},
        "seed: expected an integer in [0, 2**64), with seed + 1 the seed of the last image",
    ),
    "output_type": ({"output_type": "jpeg"}, "output_type: expected one of pil, np, latent, got 'jpeg'"),
    "memory": ({"memory": "none"}, "memory: expected one of auto, low, parallel, partial, sequential, got 'none'"),
    "vae_tiling": ({"vae_tiling": "no"}, "vae_tiling: expected True or False or None, got 'no'"),
    "cancel": ({"cancel": 1}, "cancel: expected a threading.Event, a function without arguments, or None, got 1"),
}


@pytest.mark.parametrize("arguments, message", WRONG.values(), ids=WRONG)
def test_refuses(pipe, arguments, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        pipe(**{"prompt": "a red heart", **arguments})


class Tensor:
    """A tensor that numpy cannot read, for example torch's in bfloat16, with gradient, or on a GPU."""

    def __init__(self, error: Exception):
        self._error = error

    def __array__(self, *_: object, **__: object):
        raise self._error


class Unshowable:
    def __repr__(self):
        raise RuntimeError

    def __index__(self):
        raise RuntimeError

    __hash__ = None


class Text(str):
    pass


async def asynchronous(*_):
    pass


AT_ONCE = 5.0  # seconds, on a busy machine; drawing the noise of these requests would take more than a minute
HUGE = 10**5000  # Python refuses to print integers of so many digits.
NESTED: list[object] = []
for _ in range(10**5):
    NESTED = [NESTED]
TENSORS = [
    TypeError("Got unsupported ScalarType BFloat16"),
    RuntimeError("Can't call numpy() on Tensor that requires grad"),
    TypeError("can't convert cuda:0 device type tensor to numpy"),
]
ANYTHING: list[object] = [
    "x" * 10**6,
    b"4",
    [4],
    {},
    {"a": 1},
    np.nan,
    1j,
    np.complex64(1),
    np.array([1, 2]),
    np.array(["auto", "low"]),
    np.zeros(0),
    np.broadcast_to(np.float32(0), (10**9, 4, 4, 6)),
    np.timedelta64(1),
    Unshowable(),
    NESTED,
    object(),
    str,
    ...,
]
STRANGE: dict[str, list[object]] = {
    "num_images": [2**63, HUGE, -HUGE, 2**20 + 1, True, np.bool_(True), None, 0, -1, np.int8(-1), *ANYTHING],
    "height": [2**63, HUGE, -HUGE, 2**20 + 4, True, np.bool_(True), 8.0, np.float32(8), np.int8(3), "8", *ANYTHING],
    "width": [2**63, HUGE, -HUGE, 2**20 + 4, True, np.bool_(True), 8.5, np.float32(8), np.int8(3), "8", *ANYTHING],
    "steps": [2**63, HUGE, -HUGE, 0, 3, True, np.bool_(True), 4.0, "4", *ANYTHING],
    "seed": [2**64, HUGE, -HUGE, -1, np.int8(-1), True, np.bool_(True), 0.5, np.float64(1), "1", *ANYTHING],
    "latents": [
        Z.astype(np.float64) + 1e300,
        np.full(Z.shape, np.inf, np.longdouble),
        -np.inf * np.ones_like(Z),
        [[1.0], [1.0, 2.0]],
        Z.astype(object),
        Z.astype(complex),
        Z.astype(int),
        Z > 0,
        np.array(1.0),
        np.ma.masked_array(Z, Z == 0),
        Z.astype([("a", "f4")]),
        *map(Tensor, TENSORS),
        *ANYTHING,
    ],
    "prompt_embeds": [TEXT.astype(np.float64) + 1e300, TEXT.astype(int), *map(Tensor, TENSORS), *ANYTHING],
    "prompt": [[b"a"], ["a", None], [["a"]], {"a"}, 5, iter("a"), np.array(["a"]), ["\ud800"], [], (), *ANYTHING[1:]],
    "output_type": [None, 5, *ANYTHING],
    "memory": ["none", 5, *ANYTHING],
    "vae_tiling": [1, 0, "yes", *ANYTHING],
    "callback": [5, "print", [print], pow, lambda: None, lambda step, steps: None, asynchronous, *ANYTHING],
    "cancel": [5, "stop", [print], len, lambda step: None, asynchronous, threading.Event, *ANYTHING],
    "timeout": [0, -1, -HUGE, HUGE, True, np.bool_(True), "1", np.float16(0), *ANYTHING],
}


@pytest.mark.parametrize("given", [{}, {"latents": Z}, {"prompt": None, "prompt_embeds": TEXT}], ids=" ".join)
@pytest.mark.parametrize("name", STRANGE)
def test_strange_values_are_refused_in_a_short_line(pipe, name, given):
    if name == "prompt" and "prompt_embeds" in given:
        given = {}
    if name == "prompt_embeds":
        given = {**given, "prompt": None}
    ran = []
    for value in STRANGE[name]:
        options = {"prompt": "a red heart", "callback": lambda *_: ran.append(1), **given, name: value}
        with pytest.raises(RequestError) as caught:
            pipe(**options)
        said = str(caught.value)
        assert name in said.partition(":")[0] and len(said) < 400 and "\n" not in said
    assert not ran


LOAD = ("device", "vae", "variant", "cuda_graphs", "provider_options", "precision", "threads", "memory", "bundle")
ALLOWED = {"cuda_graphs": [True], "provider_options": [{}]}


@pytest.mark.parametrize("name", LOAD)
def test_strange_values_are_refused_when_a_pipeline_is_loaded(tiny, name):
    allowed = [repr(value) for value in ALLOWED.get(name, [])]
    for value in [HUGE, -1, 5000, True, *ANYTHING]:
        if isinstance(value, bool | dict) and repr(value) in allowed:
            continue
        with pytest.raises(TiueError) as caught:
            Pipeline.load(**{"bundle": tiny, "device": "cpu", name: value})
        assert str(caught.value).startswith(name) and len(str(caught.value)) < 400
        if name in ("bundle", "device", "vae"):
            with pytest.raises(TiueError, match=f"^{name}"):
                generate("a", **{"bundle": tiny, "device": "cpu", name: value})


@pytest.mark.parametrize("error", TENSORS)
def test_tensors_that_numpy_cannot_read_name_the_remedy(pipe, error):
    with pytest.raises(RequestError, match=r"latents: .*\.detach\(\)\.float\(\)\.cpu\(\)\.numpy\(\)"):
        pipe("a", latents=Tensor(error))


def test_numbers_and_arrays_of_other_libraries_are_taken(pipe):
    plain = {"num_images": 2, "seed": 2**63, "steps": 4, "height": 8, "width": 12, "vae_tiling": True, "timeout": 60}
    of_numpy = {
        "num_images": np.uint8(2),
        "seed": np.uint64(2**63),
        "steps": np.int8(4),
        "height": np.array(8),
        "width": np.int64(12),
        "vae_tiling": np.bool_(True),
        "timeout": np.float16(60),
        "prompt": Text("a red heart"),
    }
    expected, result = (pipe(**{"prompt": "a red heart", **options}) for options in (plain, of_numpy))
    assert result.seeds == expected.seeds and type(result.steps) is int
    np.testing.assert_array_equal(result.images, expected.images)
    swapped = Z.astype(">f8").transpose(0, 1, 3, 2).copy().transpose(0, 1, 3, 2)
    for latents in (Z.astype(np.float16), Z.tolist(), swapped):
        np.testing.assert_array_equal(pipe("a", latents=latents).images, pipe("a", latents=Z).images)


def test_functions_in_many_forms_are_taken(pipe):
    seen = []

    class Watcher:
        def __call__(self, progress, more=None):
            seen.append(progress.step)

        def is_set(self):
            return False

    for callback in (Watcher(), lambda *call: seen.append(call[0].step), functools.partial(Watcher().__call__, more=1)):
        pipe("a", callback=callback, cancel=Watcher(), timeout=60)
    assert seen == [1, 1, 1, 2, 3, 4, 1] * 3
    pipe("a", cancel=threading.Event().is_set, callback=print, memory="parallel")


@pytest.mark.parametrize(
    "options",
    [
        {"num_images": 10**6},
        {"height": 100_000, "width": 100_000},
        {"num_images": 2**20, "width": 2**20},
        {"prompt": ["a"] * 1000, "num_images": 2**20},
    ],
)
def test_more_than_memory_holds_is_refused_at_once(heavy_pipe, options):
    begun = time.monotonic()
    with pytest.raises(RequestError, match=r"num_images, height, width: .* GiB, and .* GiB are free"):
        heavy_pipe(**{"prompt": "a", **options})
    assert time.monotonic() - begun < AT_ONCE


def test_arrays_that_are_larger_than_memory_are_refused_before_they_are_copied(heavy_pipe):
    latents = np.broadcast_to(np.float32(0), (2**14, 4, 2**10, 2**10))  # 256 GiB, in 4 bytes
    begun = time.monotonic()
    with pytest.raises(RequestError, match=r"latents: 16384 pictures of 2048x2048 pixels need .* GiB are free"):
        heavy_pipe("a", num_images=2**14, latents=latents)
    assert time.monotonic() - begun < AT_ONCE


def test_the_estimate_of_the_work_counts_and_may_err(heavy, monkeypatch):
    """If the pictures fit, a request is refused only if its smallest run exceeds the free memory by far."""
    pipe = Pipeline.load(heavy, device="cpu")
    shape = {"height": 512, "width": 512, "memory": "sequential", "output_type": "latent"}
    need = pipe.bundle.manifest.memory["portable"]["unet_decoder"].bytes(1, 256 * 256)
    arrays = 512 * 512 * 2 * 4
    for share, fits in ((0.9, False), (1.1, True)):
        monkeypatch.setattr(budget, "free_memory", lambda gpu, share=share: (arrays + need) * share / budget.HOPELESS)
        if fits:
            pipe("a", **shape)
        else:
            with pytest.raises(RequestError, match="num_images, height, width: 1 picture of 512x512 pixels need"):
                pipe("a", **shape)
    monkeypatch.setattr(budget, "free_memory", lambda gpu: None)
    pipe("a", **shape)


def test_a_request_for_latents_needs_no_memory_for_pictures(heavy, monkeypatch):
    pipe = Pipeline.load(heavy, device="cpu")
    work = pipe.bundle.manifest.memory["portable"]["unet_decoder"].bytes(1, 256 * 256)
    latents, pictures = 512 * 512 * 2 * 4, 512 * 512 * 3 * 9
    monkeypatch.setattr(budget, "free_memory", lambda gpu: (latents + work + pictures / 2) / budget.HOPELESS)
    with pytest.raises(RequestError, match="1 picture of 512x512 pixels need"):
        pipe("a", height=512, width=512)
    assert pipe("a", height=512, width=512, memory="sequential", output_type="latent").images.shape[-1] == 256


def test_latents_are_decoded_although_the_unet_could_not_draw_them_at_once(heavy, monkeypatch):
    pipe = Pipeline.load(heavy, device="cpu")
    latents = np.zeros((16, 4, 64, 64), np.float32)  # The UNet would need 68 MB, the image decoder 13 MB a picture.
    monkeypatch.setattr(budget, "free_memory", lambda gpu: 30_000_000)
    assert len(pipe.decode(latents)) == 16


def test_the_smallest_run_of_decoding_is_a_tile_if_tiles_are_allowed(heavy, monkeypatch):
    pipe = Pipeline.load(heavy, device="cpu")
    latents = np.zeros((1, 4, 256, 256), np.float32)  # A whole picture needs 204 MB, the largest tile 13 MB.
    monkeypatch.setattr(budget, "free_memory", lambda gpu: 60_000_000)
    with pytest.raises(RequestError, match=r"latents: 1 picture of 512x512 pixels need 0\.2 GiB, and 0\.1 GiB are"):
        pipe.decode(latents, vae_tiling=False)
    with pytest.warns(UserWarning, match="decoding in tiles"):
        assert len(pipe.decode(latents)) == 1


def test_a_timeout_ends_a_request_that_draws_much_noise(pipe):
    begun = time.monotonic()
    with pytest.raises(Cancelled, match=r"timeout: 0\.2 seconds were over before the noise was drawn"):
        pipe("a", num_images=2**20, timeout=0.2)
    assert time.monotonic() - begun < AT_ONCE


def test_the_last_seed_of_all_works(pipe):
    assert pipe("a", seed=2**64 - 2, num_images=2).seeds == (2**64 - 2, 2**64 - 1)


def test_a_tuple_of_prompts_and_an_empty_prompt_are_prompts(pipe):
    assert len(pipe(("a red heart", ""), seed=1).images) == 2


def test_options_of_a_request_are_written_once(pipe):
    with pytest.raises(TypeError, match="hight"):
        pipe("a", hight=8)
    options = described(RequestOptions)
    assert all(option.help for _, option, _ in options.values())
    assert complete(RequestOptions, {"steps": 2})["steps"] == 2
    assert complete(RequestOptions, {})["num_images"] == 1


@pytest.mark.parametrize("function, options", [(Pipeline.__call__, RequestOptions), (Pipeline.load, LoadOptions)])
def test_the_docstring_of_a_function_lists_every_option(function, options):
    for name, (_, option, _) in described(options).items():
        assert f"{name}: {option.help}." in function.__doc__


@pytest.mark.parametrize("name", ["num_inference_steps", "guidance_scale", "negative_prompt", "generator", "image"])
def test_arguments_of_diffusers_are_refused_with_a_lesson(pipe, name):
    with pytest.raises(RequestError, match=f"^{name}: "):
        pipe("a", **{name: 1})
