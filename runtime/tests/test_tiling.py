"""Tiled decoding, with decoders whose tiled result is known."""

from itertools import pairwise

import numpy as np
import pytest
from tiue_runtime.bundle import Bundle
from tiue_runtime.noise import gaussian
from tiue_runtime.tiling import Plan, decode_parts, plans, windows

SCALE = 2
FLOAT32 = 1e-6  # relative error of a few sums in float32


@pytest.fixture
def manifest(tiny):
    return Bundle.load(tiny).manifest


def nearest(latents):
    """Decode each latent alone. A part of a picture then does not depend on its tile."""
    return np.tanh(latents[:, :3]).repeat(SCALE, axis=2).repeat(SCALE, axis=3)


@pytest.mark.parametrize("height, width", [(16, 16), (17, 40), (23, 16), (64, 33), (5, 90), (100, 100)])
@pytest.mark.parametrize("tile", [1, 3, 16])
def test_tiles_of_a_local_decoder_make_the_whole_picture(close, height, width, tile):
    latents = gaussian(1, (2, 4, height, width))
    plan = Plan(1, min(tile, height), min(tile, width), tiled=True)
    seen = []
    image = decode_parts(lambda part: seen.append(part.shape) or nearest(part), latents, plan, SCALE)
    close(image, nearest(latents))
    assert image.dtype == np.float32
    assert set(seen) == {(1, 4, plan.height, plan.width)}  # one tile of one size at a time


@pytest.mark.parametrize("size, tile", [(17, 16), (30, 16), (31, 16), (100, 16), (65, 64), (7, 3)])
def test_windows_cover_the_axis_and_add_up(size, tile):
    found = windows(size, tile, SCALE)
    starts = [start for start, _ in found]
    assert starts[0] == 0 and starts[-1] == size - tile
    assert all(0 < after - before <= tile - tile // 4 for before, after in pairwise(starts))
    total = np.zeros(size * SCALE)
    for start, weight in found:
        total[start * SCALE : (start + tile) * SCALE] += weight
    np.testing.assert_allclose(total, 1, rtol=FLOAT32)


def test_a_blend_is_linear_between_two_tiles_and_exact_away_from_it():
    tiles = iter((0.0, 1.0))
    image = decode_parts(lambda part: np.full((1, 3, 32, 32), next(tiles), np.float32), gaussian(1, (1, 4, 16, 28)),
                   Plan(1, 16, 16, tiled=True), SCALE)  # fmt: skip
    row = image[0, 0, 0]  # Two tiles of 16 in 28 latents share 4 latents: 8 pixels, from pixel 24 on.
    np.testing.assert_array_equal(row[:24], 0)
    np.testing.assert_array_equal(row[32:], 1)
    np.testing.assert_allclose(row[24:32], (np.arange(8) + 0.5) / 8, rtol=FLOAT32)


def test_one_picture_at_a_time_is_exact():
    latents = gaussian(1, (3, 4, 8, 8))
    seen = []
    image = decode_parts(lambda part: seen.append(len(part)) or nearest(part), latents, Plan(1, 8, 8), SCALE)
    np.testing.assert_array_equal(image, nearest(latents))
    assert seen == [1, 1, 1]


def test_plans_go_from_the_batch_to_tiles(manifest):
    # The default of 8 x 12 pixels is 4 x 6 latents, so tiles have the side MIN_TILE.
    whole = [Plan(3, 40, 6), Plan(1, 40, 6)]
    tile = Plan(1, 16, 6, tiled=True)
    assert plans(manifest, (3, 4, 40, 6), None) == [*whole, tile]
    assert plans(manifest, (3, 4, 40, 6), False) == whole
    assert plans(manifest, (3, 4, 40, 6), True) == [tile]
    assert plans(manifest, (3, 4, 16, 6), True) == [Plan(1, 16, 6)]  # not larger than a tile
    assert plans(manifest, (1, 4, 4, 16), None) == [Plan(1, 4, 16)]


def test_tiles_are_halved_down_to_the_least(manifest):
    manifest = type(manifest)(**{**vars(manifest), "default_height": 128, "default_width": 136})
    sides = [(plan.height, plan.width) for plan in plans(manifest, (1, 4, 100, 50), True)]
    assert sides == [(64, 50), (32, 34), (16, 16)]
    found = plans(manifest, (1, 4, 64, 20), True)
    assert found == [Plan(1, 64, 20), Plan(1, 32, 20, tiled=True), Plan(1, 16, 16, tiled=True)]
