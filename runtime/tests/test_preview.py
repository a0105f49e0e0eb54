import numpy as np
from tiue_runtime.bundle import Bundle, Preview
from tiue_runtime.preview import latents_to_rgb

FLOAT32_ROUNDING = 1e-6  # sums of a few products in float32 against float64


def test_a_preview_is_the_matrix_product():
    random = np.random.default_rng(0)
    matrix, bias = random.normal(size=(5, 3)) / 10, random.normal(size=3) / 10 + 0.5
    latents = random.normal(size=(2, 5, 3, 4)).astype(np.float32)
    preview = Preview(tuple(map(tuple, matrix)), tuple(bias))
    expected = np.einsum("bchw,cr->bhwr", latents.astype(np.float64), matrix) + bias
    made = latents_to_rgb(preview, latents)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, expected.clip(0, 1), atol=FLOAT32_ROUNDING)


def test_a_preview_of_full_size_repeats_pixels():
    latents = np.random.default_rng(0).normal(size=(1, 4, 2, 3)).astype(np.float32)
    preview = Preview(((0.1, 0, 0), (0, 0.1, 0), (0, 0, 0.1), (0, 0, 0)), (0.5, 0.5, 0.5))
    small, large = latents_to_rgb(preview, latents), latents_to_rgb(preview, latents, pixels_per_latent=8)
    assert large.shape == (1, 16, 24, 3)
    for i, j in ((0, 0), (1, 2)):
        assert (large[0, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8] == small[0, i, j]).all()


def test_the_preview_of_the_tiny_bundle_is_its_picture(pipe, tiny):
    """The tiny bundle's image decoder is linear."""
    preview = Bundle.load(tiny).manifest.preview
    assert preview is not None
    latents, picture = (pipe("a red heart", seed=1, output_type=kind).images for kind in ("latent", "np"))
    np.testing.assert_allclose(latents_to_rgb(preview, latents, 2), picture, atol=FLOAT32_ROUNDING)
