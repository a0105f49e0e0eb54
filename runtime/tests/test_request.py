import re

import numpy as np
import pytest
from tiue_runtime.errors import RequestError

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
    "latents NaN": ({"latents": Z * np.nan}, "latents: expected finite values, got NaN or infinity"),
    "latents text": ({"latents": "x"}, "latents: expected shape (1,4,h,w), got ()"),
    "latents and height": (
        {"latents": Z, "height": 12},
        "height: latents of shape (1, 4, 4, 6) make 8, got 12",
    ),
    "prompt surrogate": (
        {"prompt": "caf\udce9"},
        "prompt[0]: expected text, got bytes that are not UTF-8: 'caf\\udce9'",
    ),
    "num_images": ({"num_images": 0}, "num_images: expected an integer of at least 1, got 0"),
    "num_images float": ({"num_images": 1.5}, "num_images: expected an integer of at least 1, got 1.5"),
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


def test_the_last_seed_of_all_works(pipe):
    assert pipe("a", seed=2**64 - 2, num_images=2).seeds == (2**64 - 2, 2**64 - 1)


def test_a_tuple_of_prompts_and_an_empty_prompt_are_prompts(pipe):
    assert len(pipe(("a red heart", ""), seed=1).images) == 2
