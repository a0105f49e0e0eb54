"""The state of a running request, as its callback receives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from tiue_runtime.errors import RequestError, shorten

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

# Rough parts of a request's time on a CPU, for `Progress.fraction`. The names are those of `Result.timings`.
SHARES = {
    "text_encoder": 0.05,
    "unet_encoder": 0.2,
    "unet_decoder": 0.45,
    "vae_decoder": 0.3,
    "safety_checker": 0.1,
    "upscaler": 0.5,
}


class Preview(Protocol):
    """Turns one picture's latents into a picture."""

    def __call__(self, latents: NDArray[np.float32], *, exact: bool) -> Image:
        """Turn latents (1, C, h, w) => a picture; with `exact`, by the image decoder."""
        ...


@dataclass(frozen=True)
class Progress:
    """What a request has done. A callback receives one after each part of the work."""

    stage: str  # the graph that ran, one of SHARES
    step: int  # finished parts of the stage: timesteps of unet_decoder, tiles or pictures of the graphs after it
    steps: int  # parts of the stage
    fraction: float  # of the whole request, from 0 to 1, by rough shares of the stages; it never falls
    seconds: float  # since the request began
    _estimate: Callable[[], NDArray[np.float32]] | None = field(default=None, repr=False, compare=False)
    _preview: Preview | None = field(default=None, repr=False, compare=False)

    @cached_property
    def latents(self) -> NDArray[np.float32] | None:
        """The z_0 to expect, float32 (B, C, h, w), if the noise predicted last is right for all timesteps left.

        It is exact after the last timestep, and None before the first.
        """
        return None if self._estimate is None else self._estimate()

    def preview(self, index: int = 0, *, exact: bool = False) -> Image | None:
        """Make a picture of `latents`. Nothing is computed unless this is called.

        Args:
            index: which picture of the request, in the order of `Result`.
            exact: run the image decoder. Otherwise, a matrix of the bundle gives a soft picture in a millisecond.

        Returns:
            A picture of full size, or None before the first timestep.

        Raises:
            RequestError: there is no such picture, or the bundle has no matrix.
            Cancelled, InferenceError: as `Pipeline.decode`, with `exact`.
        """
        latents = self.latents
        if latents is None or self._preview is None:
            return None
        if not 0 <= index < len(latents):
            raise RequestError(f"index: expected 0 to {len(latents) - 1}, got {shorten(index)}")
        return self._preview(latents[index : index + 1], exact=exact)


@dataclass(frozen=True)
class Hearing:
    """A callback that says whether it makes previews. A request with "auto" chooses its memory mode by that."""

    hear: Callable[[Progress], object]
    previews: bool

    def __call__(self, progress: Progress) -> object:
        """Pass a Progress on."""
        return self.hear(progress)
