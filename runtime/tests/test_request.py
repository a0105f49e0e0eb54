import re
import time

import numpy as np
import pytest
from tiue_runtime.errors import RequestError
from tiue_runtime.options import RequestOptions, complete, described

Z = np.zeros((1, 4, 4, 6), dtype=np.float32)
TEXT = np.zeros((1, 8, 3), dtype=np.float32)

WRONG = {
    "steps": ({"steps": 3}, "steps: this bundle was trained for 2, 4, got 3"),
    "steps float": ({"steps": 4.0}, "steps: this bundle was trained for 2, 4, got 4.0"),
    "steps list": ({"steps": [4]}, "steps: this bundle was trained for 2, 4, got [4]"),
    "steps true": ({"steps": True}, "steps: this bundle was trained for 2, 4, got True"),
    "height": ({"height": 10}, "height: expected a multiple of 4 in pixels, such as 8 or 12, got 10"),
    "width": ({"width": 3}, "width: expected a multiple of 4 in pixels, such as 4, got 3"),
    "zero": ({"width": 0}, "width: expected a multiple of 4 in pixels, such as 4, got 0"),
    "negative": ({"height": -4}, "height: expected a multiple of 4 in pixels, such as 4, got -4"),
    "float size": ({"height": 8.0}, "height: expected a multiple of 4 in pixels, got 8.0"),
    "no prompts": ({"prompt": []}, "prompt: expected at least one prompt, got an empty list"),
    "prompt type": ({"prompt": 5}, "prompt: expected a string or a list of strings, got int"),
    "item type": ({"prompt": ["a", None]}, "prompt[1]: expected a string, got NoneType"),
    "neither": ({"prompt": None}, "prompt: expected either prompt or prompt_embeds, got neither"),
    "both": ({"prompt_embeds": TEXT}, "prompt: expected either prompt or prompt_embeds, got both"),
    "embeds rank": (
        {"prompt": None, "prompt_embeds": TEXT[0]},
        "prompt_embeds: expected shape (B,8,3), got (8, 3)",
    ),
    "embeds length": (
        {"prompt": None, "prompt_embeds": TEXT[:, :5]},
        "prompt_embeds: expected shape (B,8,3), got (1, 5, 3)",
    ),
    "embeds width": (
        {"prompt": None, "prompt_embeds": TEXT[..., :2]},
        "prompt_embeds: expected shape (B,8,3), got (1, 8, 2)",
    ),
    "no embeds": (
        {"prompt": None, "prompt_embeds": TEXT[:0]},
        "prompt_embeds: expected shape (B,8,3), got (0, 8, 3)",
    ),
    "embeds dtype": (
        {"prompt": None, "prompt_embeds": TEXT.astype(np.int64)},
        "prompt_embeds: expected floating-point values, got int64",
    ),
    "latents channels": ({"latents": Z[:, :3]}, "latents: expected shape (1,4,h,w), got (1, 3, 4, 6)"),
    "latents batch": (
        {"latents": Z, "num_images": 2},
        "latents: expected shape (2,4,h,w), got (1, 4, 4, 6)",
    ),
    "latents multiple": (
        {"latents": Z[:, :, :3]},
        "latents: height of the image: expected a multiple of 4 in pixels, such as 4 or 8, got 6",
    ),
    "latents NaN": ({"latents": Z * np.nan}, "latents: expected values that are finite in float32, got NaN"),
    "latents text": ({"latents": "x"}, "latents: expected shape (1,4,h,w), got ()"),
    "latents and height": (
        {"latents": Z, "height": 12},
        "height: latents of shape (1, 4, 4, 6) make 8, got 12",
    ),
    "prompt surrogate": (
        {"prompt": "caf\udce9"},
        "prompt[0]: expected text, got bytes that are not UTF-8: 'caf\\udce9'",
    ),
    "num_images": ({"num_images": 0}, "num_images: expected an integer from 1 to 1048576, got 0"),
    "num_images float": ({"num_images": 1.5}, "num_images: expected an integer from 1 to 1048576, got 1.5"),
    "seed": ({"seed": -1}, "seed: expected an integer in [0, 2**64), got -1"),
    "seed text": ({"seed": "1"}, "seed: expected an integer in [0, 2**64), got '1' (str)"),
    "last seed": (
        {"seed": 2**64 - 1, "num_images": 2},
        "seed: expected an integer in [0, 2**64), with seed + 1 the seed of the last image",
    ),
    "output_type": ({"output_type": "jpeg"}, "output_type: expected one of pil, np, latent, got 'jpeg'"),
    "memory": ({"memory": "none"}, "memory: expected one of auto, low, parallel, partial, sequential, got 'none'"),
    "vae_tiling": ({"vae_tiling": "no"}, "vae_tiling: expected True, False or None, got 'no'"),
    "cancel": ({"cancel": 1}, "cancel: expected a threading.Event or a function, got 1"),
}


@pytest.mark.parametrize("arguments, message", WRONG.values(), ids=WRONG)
def test_refuses(pipe, arguments, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        pipe(**{"prompt": "a red heart", **arguments})


class Tensor:
    """A tensor of another library, as numpy sees it: torch's of bfloat16, with gradient, or on a GPU."""

    def __init__(self, error: Exception):
        self._error = error

    def __array__(self, *_: object, **__: object):
        raise self._error


HUGE = 10**5000  # Python refuses to print integers of so many digits.
TENSORS = [TypeError("Got unsupported ScalarType BFloat16"), RuntimeError("requires grad")]
STRANGE: dict[str, list[object]] = {
    "num_images": [2**63, HUGE, True, np.bool_(True), "2", None, np.nan, np.inf, [1], np.array([1, 2]), -(2**70)],
    "height": [HUGE, 2**63, "8", np.nan, [8], True, np.array([8, 8]), b"8"],
    "width": [-HUGE, 8.5, {"a": 1}],
    "steps": [HUGE, "4", [4], np.array([4, 2]), np.nan, {}],
    "seed": [HUGE, -HUGE, 0.5, np.float64(1), "1", [1], np.array([1, 2]), True, b"1"],
    "latents": [
        Z.astype(np.float64) + 1e300,
        np.full(Z.shape, np.inf, np.longdouble),
        [[1.0], [1.0, 2.0]],
        Z.astype(object),
        Z.astype(complex),
        Z > 0,
        np.array(1.0),
        *map(Tensor, TENSORS),
    ],
    "prompt": [b"a", [b"a"], ["a", None], [["a"]], {"a": 1}, {"a"}, 5, iter("a"), np.array(["a"]), ["\ud800"], []],
    "output_type": ["x" * 10**6, None, [], np.array(["pil", "np"])],
    "memory": ["x" * 10**6, [], 5, np.array(["auto", "low"])],
    "vae_tiling": [1, "yes", np.array([True, False]), []],
    "callback": [5, "print", [print]],
    "cancel": [5, "stop", [print]],
    "timeout": [0, -1, np.nan, True, "1", [1]],
}


@pytest.mark.parametrize(
    "name, value",
    [pytest.param(name, value, id=f"{name}-{i}") for name, values in STRANGE.items() for i, value in enumerate(values)],
)
def test_strange_values_are_refused_in_a_short_line(pipe, name, value):
    ran = []
    given = {"prompt": "a red heart", "output_type": "latent", "callback": lambda *_: ran.append(1), name: value}
    with pytest.raises(RequestError) as caught:
        pipe(**given)
    said = str(caught.value)
    assert said.startswith(name) and len(said) < 400 and "\n" not in said
    assert not ran


@pytest.mark.parametrize("error", TENSORS)
def test_tensors_that_numpy_cannot_read_name_the_remedy(pipe, error):
    with pytest.raises(RequestError, match=r"latents: .*\.detach\(\)\.float\(\)\.cpu\(\)\.numpy\(\)"):
        pipe("a", latents=Tensor(error))


@pytest.mark.parametrize(
    "options", [{"num_images": 10**6}, {"height": 100_000, "width": 100_000}, {"num_images": 2**20, "width": 2**20}]
)
def test_more_than_memory_holds_is_refused_at_once(heavy_pipe, options):
    begun = time.monotonic()
    with pytest.raises(RequestError, match=r"num_images, height, width: .* GiB, and .* GiB are free"):
        heavy_pipe("a", **options)
    assert time.monotonic() - begun < 0.5


def test_the_last_seed_of_all_works(pipe):
    assert pipe("a", seed=2**64 - 2, num_images=2).seeds == (2**64 - 2, 2**64 - 1)


def test_a_tuple_of_prompts_and_an_empty_prompt_are_prompts(pipe):
    assert len(pipe(("a red heart", ""), seed=1).images) == 2


def test_options_of_a_request_are_written_once(pipe):
    with pytest.raises(TypeError, match="hight"):
        pipe("a", hight=8)
    options = described(RequestOptions)
    assert all(option.help for _, option in options.values())
    assert complete(RequestOptions, {"steps": 2})["steps"] == 2
    assert complete(RequestOptions, {})["num_images"] == 1
