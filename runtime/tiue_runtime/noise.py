"""Latent noise from a seed: Philox 4x32-10, as in PyTorch's CUDA generator.

On every device, a seed gives the noise that `torch.randn` gives on a GPU for a tensor of one image.
Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import math
import operator
from typing import SupportsIndex

import numpy as np
from numpy.typing import NDArray

from tiue_runtime.errors import RequestError, shorten

SEED_LIMIT = 2**64

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_SHIFT = np.uint64(32)
_MASK = np.uint64(_WORD)


def check_seed(seed: object, count: int = 1) -> int:
    """Return the seed of the first of `count` pictures. Raises RequestError unless all are integers in [0, 2**64)."""
    if isinstance(seed, bool) or not isinstance(seed, SupportsIndex):
        raise RequestError(f"seed: expected an integer in [0, 2**64), got {shorten(seed)} ({type(seed).__name__})")
    try:
        first = operator.index(seed)
    except TypeError as error:  # An array of several numbers.
        raise RequestError(f"seed: expected an integer in [0, 2**64), got {shorten(seed)}") from error
    if not 0 <= first <= SEED_LIMIT - count:
        last = f", with seed + {count - 1} the seed of the last image" if count > 1 else ""
        raise RequestError(f"seed: expected an integer in [0, 2**64){last}, got {shorten(first)}")
    return first


def gaussian(seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Draw standard normal noise. An element depends only on the seed and its index.

    Args:
        seed: 0 <= seed < 2**64.
        shape: of one picture's latents, (C, h, w) or (1, C, h, w), fewer than 2**32 elements.

    Returns:
        Noise of that shape, float32.

    Raises:
        RequestError: the seed or the shape is out of range.
    """
    first, second = _philox(check_seed(seed), math.prod(shape))
    # Box-Muller in float32, with the constants of cuRAND; its first output is the sine. Logarithm and sine are computed
    # in float64 and rounded to float32. numpy's own float32 versions have other last bits on other processors. In
    # float64, the libraries of all languages round to the same bits: of the 80 million values that u and v take, only
    # two logarithms lie within 2 ulp of a midpoint between two float32s.
    scale, half = np.float32(2**-32), np.float32(2**-33)
    two_pi = np.float32(2 * math.pi)
    u = first.astype(np.float32) * scale + half
    v = second.astype(np.float32) * (scale * two_pi) + half * two_pi
    logarithm, sine = (f(x.astype(np.float64)).astype(np.float32) for f, x in ((np.log, u), (np.sin, v)))
    return (np.sqrt(np.float32(-2) * logarithm) * sine).reshape(shape)


def _philox(seed: int, count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the first two output words for counters (0, 0, i, 0), i < count."""
    if count > _WORD:
        raise RequestError(f"shape: expected fewer than 2**32 elements, got {count}")
    zero = np.zeros(count, dtype=np.uint64)
    c0, c1, c2, c3 = zero, zero, np.arange(count, dtype=np.uint64), zero
    k0, k1 = seed & _WORD, seed >> 32
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 32 x 32 -> 64 bits
        c0 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0)
        c2 = (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _WORD, (k1 + _KEY_INCREMENTS[1]) & _WORD
    return c0, c1
