"""One request: its options are checked and completed before any graph runs and before memory is taken."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from tiue_runtime.budget import Budget
from tiue_runtime.bundle import UNET_DECODER, Manifest
from tiue_runtime.choices import OutputType
from tiue_runtime.errors import RequestError, clip, shorten
from tiue_runtime.modes import Memory
from tiue_runtime.noise import check_seed, gaussian
from tiue_runtime.options import one_of
from tiue_runtime.run import Run
from tiue_runtime.tiling import plans

Float32 = NDArray[np.float32]
LARGEST = 2**20  # pictures of a prompt, and pixels of a side


@dataclass(frozen=True)
class Request:
    """A complete request for B pictures, prompt-major."""

    prompts: list[str] | None  # one per picture, with its style; exactly one of prompts and
    prompt_embeds: Float32 | None  # (B / num_images, L, D) is given
    num_images: int  # per prompt
    seeds: tuple[int, ...]  # one per picture; empty if the caller passed latents
    steps: int
    shape: tuple[int, ...]  # of z_T, (B, C, h, w)
    latents: Float32 | None  # z_T, if the caller passed it
    memory: Memory  # "auto": the free memory decides the mode; "low": graphs stay loaded only for their turns
    vae_tiling: bool | None
    upscale: int | None  # the factor of the bundle's upscaler, or None

    @classmethod
    def make(
        cls,
        manifest: Manifest,
        budget: Budget | None,
        text_width: Callable[[], int | None],
        prompt: str | Sequence[str] | None,
        output_type: OutputType,
        options: Mapping[str, Any],
    ) -> "Request":
        """Check the arguments of `Pipeline.__call__` and complete them.

        Args:
            manifest: of the bundle.
            budget: of the pipeline. It refuses requests that memory cannot hold. None refuses none.
            text_width: returns D of text (B, L, D), or None if D is unknown. Called only if embeddings are given.
            prompt: a string, a sequence of strings, or None.
            output_type: one of OutputType.
            options: complete RequestOptions of the right types. `memory` is already checked.

        Raises:
            RequestError: a value is wrong. The message begins with its name.
        """
        one_of("output_type", output_type, get_args(OutputType))
        if (prompt is None) == (options["prompt_embeds"] is None):
            given = "neither" if prompt is None else "both"
            raise RequestError(f"prompt: expected either prompt or prompt_embeds, got {given}")
        num_images = check_num_images(options["num_images"])
        steps = manifest.default_steps if options["steps"] is None else options["steps"]
        if steps not in manifest.schedules:
            known = ", ".join(map(str, sorted(manifest.schedules)))
            raise RequestError(f"steps: this bundle was trained for {known}, got {shorten(steps)}")
        sizes = [_size(side, options[side], manifest.size_multiple) for side in ("height", "width")]
        prompts = embeds = None
        if prompt is None:
            shape = (None, manifest.text_length, text_width())
            texts = embeds = _shaped("prompt_embeds", options["prompt_embeds"], shape, "B,L,D")
        else:
            texts = prompts = check_prompts(prompt)
        count, latents = num_images * len(texts), options["latents"]
        seeds = _seeds(options["seed"], count)
        if latents is None:
            fields, height, width = "num_images, height, width", *sizes
            scale = manifest.pixels_per_latent
            height, width = (height or manifest.default_height) // scale, (width or manifest.default_width) // scale
        else:
            fields, seeds = "latents", range(0)  # The caller's noise comes from no seed, even if one was given.
            latents = _latents(latents, count, manifest)
            height, width = _sizes_of_latents(latents.shape, sizes, manifest)
        shape = (count, manifest.latent_channels, height, width)
        upscale = check_upscale(options["upscale"], manifest)
        if upscale and output_type == "latent":
            raise RequestError('upscale: pictures are enlarged, not latents: ask for output_type="pil" or "np"')
        if budget is not None:
            one_timestep = UNET_DECODER, count, height * width
            enlarged = 0 if output_type == "latent" else upscale or 1
            budget.refuse_excess(shape, fields, one_timestep, enlarged)
        if prompts is not None:
            prompts = [prompt for prompt in prompts for _ in range(num_images)]
            if seeds:
                prompts = [manifest.in_style(*each) for each in zip(prompts, seeds, strict=True)]
        embeds = None if embeds is None else _finite("prompt_embeds", embeds)
        latents = None if latents is None else _finite("latents", latents)
        memory: Memory = options["memory"]
        if memory == "auto" and getattr(options["callback"], "previews", options["callback"] is not None):
            memory = "sequential"  # Only this mode has a preview of every step.
        return cls(
            prompts, embeds, num_images, tuple(seeds), steps, shape, latents, memory, options["vae_tiling"], upscale
        )  # fmt: skip

    def noise(self, run: Run) -> Float32:
        """Return z_T, float32 (B, C, h, w). The noise of a picture does not depend on the others of its batch."""
        if self.latents is not None:
            return self.latents
        noise = np.empty(self.shape, dtype=np.float32)
        for i, seed in enumerate(self.seeds):
            run.check("the noise was drawn")
            noise[i] = gaussian(seed, self.shape[1:])
        return noise


def check_num_images(num_images: int) -> int:
    """Return a number of pictures of a prompt. Raises RequestError."""
    if not 1 <= num_images <= LARGEST:
        raise RequestError(f"num_images: expected an integer from 1 to {LARGEST}, got {shorten(num_images)}")
    return num_images


def check_prompts(prompt: object) -> list[str]:
    """Return prompts as a list of at least one string. Raises RequestError."""
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
        try:
            item.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"prompt[{i}]: expected text, got bytes that are not UTF-8: {clip(ascii(item))}"
            ) from error
    return cast(list[str], items)


def check_upscale(upscale: int | None, manifest: Manifest) -> int | None:
    """Return the factor of the upscaler, or None for pictures as they are. Raises RequestError."""
    if upscale is None or upscale == 1:
        return None
    if manifest.upscaler is None:
        raise RequestError(f"upscale: bundle {manifest.name} has no upscaler; the exporter adds one (--upscaler FILE)")
    if upscale != manifest.upscaler.scale:
        raise RequestError(
            f"upscale: bundle {manifest.name} enlarges by {manifest.upscaler.scale}, got {shorten(upscale)}"
        )
    return upscale


def check_latents(
    latents: Any, manifest: Manifest, budget: Budget, vae_graph: str, tiling: bool | None, upscale: int | None
) -> Float32:
    """Return z_0 as finite float32 (B, C, h, w), of sizes that the bundle allows. Raises RequestError."""
    array = _latents(latents, None, manifest)
    least = plans(manifest, array.shape, tiling)[-1]
    budget.refuse_excess(array.shape, "latents", (vae_graph, least.rows, least.height * least.width), upscale or 1)
    return _finite("latents", array)


def _latents(latents: Any, count: int | None, manifest: Manifest) -> NDArray[np.floating[Any]]:
    """Return latents (B, C, h, w) of sizes that the bundle allows, where B is `count`, if given."""
    array = _shaped("latents", latents, (count, manifest.latent_channels, None, None), "B,C,h,w")
    for name, size in zip(("height", "width"), array.shape[2:], strict=True):
        _size(f"latents: {name} of the image", size * manifest.pixels_per_latent, manifest.size_multiple)
    return array


def _seeds(seed: int | None, count: int) -> range:
    first = secrets.randbits(32) if seed is None else check_seed(seed, count)
    return range(first, first + count)


def _size(name: str, value: int | None, multiple: int) -> int | None:
    """Return a number of pixels that the bundle allows for a side, or None. Raises RequestError."""
    if value is not None and value > LARGEST:
        raise RequestError(f"{name}: expected at most {LARGEST} pixels, got {shorten(value)}")
    if value is not None and (value < multiple or value % multiple):
        below = max(value // multiple, 0) * multiple
        near = f"{below} or {below + multiple}" if below else f"{multiple}"
        raise RequestError(
            f"{name}: expected a multiple of {multiple} in pixels, for example {near}, got {shorten(value)}"
        )
    return value


def _sizes_of_latents(shape: tuple[int, ...], sizes: Sequence[int | None], manifest: Manifest) -> tuple[int, ...]:
    """Return (h, w) of latents if they agree with `sizes` in pixels. Raises RequestError."""
    for name, pixels, size in zip(("height", "width"), sizes, shape[2:], strict=True):
        implied = size * manifest.pixels_per_latent
        if pixels is not None and pixels != implied:
            raise RequestError(f"{name}: latents of shape {shape} make {implied}, got {pixels}")
    return shape[2:]


def _shaped(name: str, value: Any, shape: tuple[int | None, ...], axes: str) -> NDArray[np.floating[Any]]:
    """Return a value as an array of floats of `shape`; None in it allows any size >= 1. Raises RequestError."""
    try:
        array = np.asarray(value)
    except Exception as error:  # A foreign object's conversion may raise anything.
        raise RequestError(
            f"{name}: expected a numpy array, got {type(value).__name__}, which numpy cannot read: "
            f"{clip(str(error))}. For a torch tensor, pass .detach().float().cpu().numpy()"
        ) from error
    fits = array.ndim == len(shape) and all(
        size >= 1 and wanted in (None, size) for size, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits:
        sizes = ", ".join(
            letter if size is None else str(size) for letter, size in zip(axes.split(","), shape, strict=True)
        )
        raise RequestError(f"{name}: expected shape ({sizes}), got {shorten(array.shape)}")
    if array.dtype.kind != "f":
        raise RequestError(f"{name}: expected floating-point values, got {clip(str(array.dtype))}")
    if isinstance(value, np.ma.MaskedArray):
        raise RequestError(f"{name}: expected a numpy array without a mask; call .filled(value)")
    return array


def _finite(name: str, array: NDArray[np.floating[Any]]) -> Float32:
    """Return an array in float32. Raises RequestError if its values are not finite in float32."""
    with np.errstate(over="ignore"):  # Values beyond float32 become infinite, and are refused below.
        values = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(values).all():
        raise RequestError(f"{name}: expected values that are finite in float32, got NaN, infinity or larger ones")
    return values
