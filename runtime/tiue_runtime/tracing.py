"""Pictures that can be made again: the record of each picture, and the request that repeats it."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL.Image import Image
from PIL.Image import open as open_image

from tiue_runtime import __version__
from tiue_runtime.errors import RequestError, clip
from tiue_runtime.modes import Mode
from tiue_runtime.ort.sessions import installed_wheels
from tiue_runtime.record import Record
from tiue_runtime.request import Request
from tiue_runtime.saving import Picture, read_record

if TYPE_CHECKING:
    from tiue_runtime.pipeline import Pipeline, Result


def trace(
    pipeline: "Pipeline", request: Request, mode: Mode, tile: tuple[int, int] | None, images: list[Image]
) -> list[Image]:
    """Return pictures that hold their records.

    Args:
        pipeline: made them.
        request: that they were made for.
        mode: as `Result.memory`.
        tile: as `Result.tile`.
        images: all pictures of the request.
    """
    scale = pipeline.bundle.manifest.pixels_per_latent
    first = Record(
        prompts=None if request.prompts is None else tuple(request.prompts),
        num_images=request.num_images,
        index=0,
        seed=request.seeds[0] if request.seeds else None,
        steps=request.steps,
        height=request.shape[2] * scale,
        width=request.shape[3] * scale,
        memory=mode,
        tile=tile,
        **_made_with(pipeline),
    )
    return [Picture.of(image, replace(first, index=index)) for index, image in enumerate(images)]


def _made_with(pipeline: "Pipeline") -> dict[str, Any]:
    """Return those fields of a record that a pipeline decides."""
    return {
        "vae": pipeline.vae,
        "variant": pipeline.variant,
        "device": pipeline.device,
        "precision": pipeline.precision,
        "threads": pipeline.threads,
        "bundle": pipeline.bundle.manifest.name,
        "bundle_sha256": pipeline.bundle.sha256,
        "versions": {"tiue-runtime": __version__, "numpy": np.__version__, **installed_wheels()},
    }


def repeat(pipeline: "Pipeline", path: str | Path) -> "Result[list[Image]]":
    """Make a saved picture again. See `Pipeline.repeat`."""
    record = read_record(path)
    if record.prompts is None or record.seed is None:
        given = "prompt_embeds" if record.prompts is None else "latents"
        raise RequestError(f"picture: it was made from the caller's own {given}, which are not in its record")
    differences = [
        f"{name.replace('_', ' ')} {_show(was)} instead of {_show(now)}"
        for name, now in _made_with(pipeline).items()
        if (was := getattr(record, name)) != now
    ]
    result = pipeline(
        record.prompts,
        num_images=record.num_images,
        seed=record.seed,
        steps=record.steps,
        height=record.height,
        width=record.width,
        memory=record.memory,  # pyright: ignore[reportArgumentType] (the pipeline refuses other words)
        vae_tiling=record.tile is not None,
    )
    ways = [(one.memory, one.tile) for one in (record, result)]
    if ways[0] != ways[1]:
        was, now = (f"memory mode {mode} and tiles {tile}" for mode, tile in ways)
        differences.append(f"{was} instead of {now}")
    if record.index >= len(result.images):
        raise RequestError(f"picture: its record names picture {record.index} of {len(result.images)}")
    picture = result.images[record.index]
    if differences:
        warnings.warn(f"the picture may differ, because it was made with {'; '.join(differences)}", stacklevel=3)
    elif not _same_pixels(path, picture):
        warnings.warn("the picture was made again as recorded, and its pixels differ from the file's", stacklevel=3)
    return replace(result, images=[picture], seeds=(result.seeds[record.index],))


def _show(value: Any) -> str:
    """Return a field for a message."""
    return clip(str(dict(value)) if isinstance(value, Mapping) else str(value))  # pyright: ignore[reportUnknownArgumentType]


def _same_pixels(path: str | Path, picture: Image) -> bool:
    """Compare a file with a picture. A JPEG or WebP may have lost something, so it counts as the same."""
    with open_image(path, formats=("PNG", "JPEG", "WEBP")) as image:
        return image.format != "PNG" or image.convert("RGB").tobytes() == picture.tobytes()
