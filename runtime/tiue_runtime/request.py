"""What a caller asked for, checked and made complete before any graph runs."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from tiue_runtime.bundle import Manifest
from tiue_runtime.errors import RequestError, clip, shorten
from tiue_runtime.host.memory import free_memory
from tiue_runtime.modes import Memory
from tiue_runtime.noise import check_seed, gaussian
from tiue_runtime.options import OutputType

Float32 = NDArray[np.float32]
LARGEST = 2**20  # pictures, and pixels of a side
LITTLE = 2**26  # bytes, for which asking the system how much is free would take longer than the noise


@dataclass(frozen=True)
class Request:
    """A complete request for B = len(prompts or prompt_embeds) * num_images pictures, prompt-major."""

    prompts: list[str] | None  # exactly one of prompts and
    prompt_embeds: Float32 | None  # (B / num_images, L, D) is given
    num_images: int  # per prompt
    seeds: tuple[int, ...]  # of each picture; empty when the caller brought the latents
    steps: int
    latents: Float32  # z_T (B,C,h,w)
    memory: Memory  # "auto" where the free memory shall decide; "low" holds graphs only while they are used
    vae_tiling: bool | None

    @classmethod
    def make(
        cls,
        manifest: Manifest,
        text_width: int | None,
        prompt: str | Sequence[str] | None,
        output_type: OutputType,
        options: Mapping[str, Any],
    ) -> "Request":
        """Check the arguments of `Pipeline.__call__` and complete them.

        Args:
            manifest: of the bundle.
            text_width: D of text (B, L, D), if known.
            prompt: a string, a sequence of strings, or None.
            output_type: one of OutputType.
            options: RequestOptions, complete; memory is checked already.

        Raises:
            RequestError: a value is wrong. The message begins with its name.
        """
        num_images, seed, steps = options["num_images"], options["seed"], options["steps"]
        height, width, vae_tiling = options["height"], options["width"], options["vae_tiling"]
        latents, prompt_embeds = options["latents"], options["prompt_embeds"]
        _one_of("output_type", output_type, get_args(OutputType))
        if not isinstance(vae_tiling, bool | None):
            raise RequestError(f"vae_tiling: expected True, False or None, got {shorten(vae_tiling)}")
        if (prompt is None) == (prompt_embeds is None):
            given = "neither" if prompt is None else "both"
            raise RequestError(f"prompt: expected either prompt or prompt_embeds, got {given}")
        num_images = _positive("num_images", num_images)
        steps = manifest.default_steps if steps is None else steps
        if not _is_int(steps) or steps not in manifest.schedules:
            known = ", ".join(map(str, sorted(manifest.schedules)))
            raise RequestError(f"steps: this bundle was trained for {known}, got {shorten(steps)}")
        prompts = None if prompt is None else _prompts(prompt)
        embeds = None
        if prompts is None:
            shape = (None, manifest.text_length, text_width)
            embeds = _array("prompt_embeds", prompt_embeds, shape, "B,L,D")
        count = num_images * (len(prompts or ()) if embeds is None else len(embeds))
        if latents is None:
            height = _size("height", height, manifest.default_height, manifest.size_multiple)
            width = _size("width", width, manifest.default_width, manifest.size_multiple)
            seeds = _seeds(seed, count)
            _check_size(count, height, width, manifest)
            shape = (manifest.latent_channels, height // manifest.pixels_per_latent,
                     width // manifest.pixels_per_latent)  # fmt: skip
            # Each picture's noise is drawn alone, so that it does not depend on its batch.
            noise = np.stack([gaussian(s, shape) for s in seeds])
        else:
            seeds = ()  # the caller's noise is no seed's, whether or not a seed was given too
            noise = _array("latents", latents, (count, manifest.latent_channels, None, None), "B,C,h,w")
            for name, pixels, size in zip(("height", "width"), (height, width), noise.shape[2:], strict=True):
                implied = size * manifest.pixels_per_latent
                if pixels is not None and pixels != implied:
                    raise RequestError(f"{name}: latents of shape {noise.shape} make {implied}, got {pixels}")
                _size(f"latents: {name} of the image", implied, implied, manifest.size_multiple)
        memory: Memory = options["memory"]
        if memory == "auto" and options["callback"] is not None:
            memory = "sequential"  # The other modes have no preview of every step.
        return cls(prompts, embeds, num_images, seeds, int(steps), noise, memory, vae_tiling)


def check_memory(memory: Memory, *, cuda_graphs: bool) -> None:
    """Raise RequestError unless `memory` is one that a pipeline, with or without recordings, can take."""
    _one_of("memory", memory, get_args(Memory))
    if memory == "low" and cuda_graphs:
        raise RequestError('cuda_graphs: recordings hold what memory="low" lets go of; choose one of them')


def _check_size(count: int, height: int, width: int, manifest: Manifest) -> None:
    """Raise RequestError if the noise and the pictures alone, without any work, exceed the free memory."""
    latents = manifest.latent_channels / manifest.pixels_per_latent**2
    # Bytes of a pixel: z_T and z_0; then the decoder's image, the same in [0, 1], and the picture.
    need = count * height * width * (2 * 4 * latents + 3 * (4 + 4 + 1))
    free = free_memory() if need > LITTLE else None
    if free is not None and need > free:
        pictures = "1 picture" if count == 1 else f"{count} pictures"
        raise RequestError(
            f"num_images, height, width: {pictures} of {width}x{height} pixels need {need / 2**30:,.1f} GiB, and "
            f"{free / 2**30:,.1f} GiB are free; ask for fewer or smaller ones"
        )


def _prompts(prompt: object) -> list[str]:
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, list | tuple):
        raise RequestError(f"prompt: expected a string or a list of strings, got {type(prompt).__name__}")
    items = list(cast(Sequence[object], prompt))
    if not items:
        raise RequestError("prompt: expected at least one prompt, got an empty list")
    for i, item in enumerate(items):
        if not isinstance(item, str):
            raise RequestError(f"prompt[{i}]: expected a string, got {type(item).__name__}")
        if any("\ud800" <= character <= "\udfff" for character in item):
            raise RequestError(f"prompt[{i}]: expected text, got bytes that are not UTF-8: {clip(ascii(item))}")
    return cast(list[str], items)


def _seeds(seed: int | None, count: int) -> tuple[int, ...]:
    first = secrets.randbits(32) if seed is None else check_seed(seed, count)
    return tuple(range(first, first + count))


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise RequestError(f"{name}: expected one of {', '.join(allowed)}, got {shorten(value)}")


def _is_int(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _positive(name: str, value: int) -> int:
    if not _is_int(value) or not 1 <= value <= LARGEST:
        raise RequestError(f"{name}: expected an integer from 1 to {LARGEST}, got {shorten(value)}")
    return int(value)


def _size(name: str, value: int | None, default: int, multiple: int) -> int:
    if value is None:
        return default
    if not _is_int(value):
        raise RequestError(f"{name}: expected a multiple of {multiple} in pixels, got {shorten(value)}")
    if value > LARGEST:
        raise RequestError(f"{name}: expected at most {LARGEST} pixels, got {shorten(value)}")
    if value < multiple or value % multiple:
        below = max(value // multiple, 0) * multiple
        near = f"{below} or {below + multiple}" if below else f"{multiple}"
        raise RequestError(f"{name}: expected a multiple of {multiple} in pixels, such as {near}, got {shorten(value)}")
    return int(value)


def _array(name: str, value: Any, shape: tuple[int | None, ...], axes: str) -> Float32:
    """`value` as float32 of `shape`, where None is any size of at least 1."""
    try:
        array = np.asarray(value)
    except Exception as error:  # A foreign object's conversion may raise anything.
        raise RequestError(
            f"{name}: expected a numpy array, got {type(value).__name__}, which numpy cannot read: "
            f"{clip(str(error))}. "
            "Of a torch tensor pass .detach().float().cpu().numpy()"
        ) from error
    fits = array.ndim == len(shape) and all(
        size >= 1 and wanted in (None, size) for size, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits:
        sizes = ",".join(
            letter if size is None else str(size) for letter, size in zip(axes.split(","), shape, strict=True)
        )
        raise RequestError(f"{name}: expected shape ({sizes}), got {shorten(array.shape)}")
    if array.dtype.kind != "f":
        raise RequestError(f"{name}: expected floating-point values, got {array.dtype}")
    with np.errstate(over="ignore"):  # Values beyond float32 become infinite, and are refused as such.
        values = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(values).all():
        raise RequestError(f"{name}: expected values that are finite in float32, got NaN, infinity or larger ones")
    return values
