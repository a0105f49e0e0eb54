"""The installed default model, from the view of an application."""

from importlib.util import find_spec

import numpy as np
import pytest
from tiue_runtime import Pipeline, generate

pytestmark = pytest.mark.skipif(find_spec("tiue_emoji") is None, reason="tiue-emoji is not installed")


@pytest.fixture(scope="module")
def emoji():
    return Pipeline.load("emoji", device="cpu")


def test_files_are_as_exported_and_few(emoji):
    emoji.bundle.verify()
    assert sum(file.size for file in emoji.bundle.manifest.files.values()) < 100e6  # one file on PyPI


@pytest.mark.parametrize(
    ("prompt", "channel"), [("a red heart", 0), ("green heart, twemoji style", 1), ("blue heart, noto style", 2)]
)
def test_hearts_have_the_color_of_the_prompt(emoji, prompt, channel):
    """In most of four hearts, the middle has the color and the lower corners are white."""
    pictures = emoji(prompt, num_images=4, seed=1, output_type="np").images
    middle = pictures[:, 48:80, 48:80].mean(axis=(1, 2))
    corners = pictures[:, -8:, [*range(8), *range(-8, 0)]].mean(axis=(1, 2, 3))
    assert np.sum(middle.argmax(axis=1) == channel) >= 3, middle
    assert np.sum(corners > 0.9) >= 3, corners


def test_a_picture_does_not_depend_on_its_batch(emoji):
    batch = emoji("a cat", num_images=3, seed=5).images
    for j, image in enumerate(batch):
        alone = emoji("a cat", seed=5 + j).images[0]
        difference = np.abs(np.asarray(image, np.int16) - np.asarray(alone, np.int16))
        assert difference.max() <= 1


def test_sequential_is_parallel(emoji):
    parallel, sequential = (
        emoji("a rocket", seed=2, memory=memory, output_type="latent").images for memory in ("parallel", "sequential")
    )
    np.testing.assert_allclose(sequential, parallel, atol=1e-4)


def test_generate_uses_it(emoji):
    assert generate("a red heart", seed=1)[0].tobytes() == emoji("a red heart", seed=1).images[0].tobytes()
