"""Making a picture again from its record, and saying what differs when that fails.

The values of a picture may depend on the shape of the batch that it was made in, never on the other pictures of it. So
the picture is first made alone. If its pixels differ from the record's, it is made once more in a batch of the same
shape, in which every prompt is its own.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiue_runtime.bundle.find import installed_bundles
from tiue_runtime.bundle.pulled import pulled_bundles
from tiue_runtime.errors import DeviceError, RequestError, clip
from tiue_runtime.ort.devices import parse_device
from tiue_runtime.record import Record
from tiue_runtime.saving import read_record

if TYPE_CHECKING:
    from PIL.Image import Image

    from tiue_runtime.pipeline import Pipeline
    from tiue_runtime.result import Result


MOST_PICTURES = 64
"""A batch of more is not made again for one picture: a file from a stranger must not take all memory."""


def load_for(record: Record, bundle: str | Path | None = None, **options: Any) -> "Pipeline":
    """Load a pipeline that can repeat a record.

    Args:
        record: of the picture.
        bundle: as in `Pipeline.load`. None is the installed or pulled bundle that the record names, else the
            default. The name in a record is never a path.
        **options: of `Pipeline.load`, in place of the record's device, variant, image decoder and precision.

    Raises:
        BundleError, DeviceError, OutOfMemoryError, RequestError: as `Pipeline.load`.
    """
    from tiue_runtime.pipeline import Pipeline

    recorded: dict[str, Any] = {"device": _known(record.device), "variant": record.variant, "vae": record.vae}
    if "device" not in options:
        recorded |= {"precision": record.precision, "threads": record.threads}
    if bundle is None and record.bundle in {*installed_bundles(), *pulled_bundles()}:
        bundle = record.bundle
    return Pipeline.load(bundle, **{**recorded, **options})


def _known(device: str) -> str:
    """Return a recorded device, or "auto" if it belongs to another runtime, for example a browser's "wasm"."""
    try:
        parse_device(device)
    except DeviceError:
        return "auto"
    return device


def repeat(
    pipeline: "Pipeline", source: str | Path | Record, name: str | None = None, **options: Any
) -> "Result[list[Image]]":
    """Make a picture again. `Pipeline.repeat` describes arguments, result and errors.

    Args:
        pipeline: loaded.
        source: a file, or its record.
        name: of the file in messages, if the record is given.
        **options: callback, cancel and timeout.
    """
    record = source if isinstance(source, Record) else read_record(source)
    shown = clip(str(name or ("the picture" if isinstance(source, Record) else source)), 300)
    _refuse(pipeline, record, shown)
    result = _make(pipeline, record, options, alone=True)
    if not _equal(result, record) and 1 < record.prompts * record.num_images <= MOST_PICTURES:
        result = _make(pipeline, record, options, alone=False)
    if not _equal(result, record):
        found = "; ".join(_differences(result.records[0], record)) or (
            "all versions and options are the recorded ones: another processor may compute other values"
        )
        warnings.warn(f"{shown} could not be repeated bit for bit: {found}", stacklevel=3)
    return result


def _refuse(pipeline: "Pipeline", record: Record, shown: str) -> None:
    """Raise RequestError if a pipeline cannot make a picture at all."""
    sources = (record.prompt, "text embeddings", "prompt_embeds"), (record.seed, "noise", "latents")
    for value, given, name in sources:
        if value is None:
            raise RequestError(f"{shown} was made from {given} of the caller, which no file holds: pass {name} again")
    manifest = pipeline.bundle.manifest
    if manifest.name != record.bundle:
        raise RequestError(f"{shown} was made with bundle {record.bundle}, got {manifest.name}: load {record.bundle}")
    if pipeline.vae != record.vae:
        raise RequestError(f'{shown} was made with vae {record.vae}, got {pipeline.vae}: load with vae="{record.vae}"')


def _make(pipeline: "Pipeline", record: Record, options: dict[str, Any], *, alone: bool) -> "Result[list[Image]]":
    """Make the picture alone, or in a batch of the recorded shape. Returns a result of one picture."""
    index = 0 if alone else record.index
    prompts = 1 if alone else record.prompts
    made: Any = pipeline  # `memory` is checked when a record is read.
    result: Result[list[Image]] = made(
        [record.prompt or ""] * prompts,
        num_images=1 if alone else record.num_images,
        seed=(record.seed or 0) - index,
        steps=record.steps,
        height=record.height,
        width=record.width,
        memory=record.memory,
        vae_tiling=record.tile is not None,
        upscale=record.upscale,
        **options,
    )
    return replace(
        result,
        images=result.images[index : index + 1],
        seeds=result.seeds[index : index + 1],
        records=result.records[index : index + 1],
    )


def _equal(result: "Result[list[Image]]", record: Record) -> bool:
    made = getattr(result.images[0], "record", None)
    return made is not None and made.pixels_sha256 == record.pixels_sha256


_COMPARED = (
    "variant",
    "device",
    "provider",
    "precision",
    "threads",
    "memory",
    "tile",
    "steps",
    "upscale_tile",
    "flagged",
)


def _differences(made: Record, record: Record) -> Iterator[str]:
    """Say in which values two records differ."""
    if made.bundle_sha256 != record.bundle_sha256:
        yield f"the bundle {record.bundle} was another one, {record.bundle_sha256[:10]}, now {made.bundle_sha256[:10]}"
    for name in _COMPARED:
        then, now = getattr(record, name), getattr(made, name)
        if then != now:
            yield f"{name} was {then}, now {now}"
    for name in dict.fromkeys((*record.versions, *made.versions)):
        then, now = record.versions.get(name, "absent"), made.versions.get(name, "absent")
        if then != now:
            yield f"{name} was {clip(then)}, now {now}"
    if record.prompts * record.num_images > MOST_PICTURES:
        yield f"it was made in a batch of {record.prompts * record.num_images}, and made alone here"
    elif record.prompts > 1:
        yield f"it was made together with {record.prompts - 1} other prompts"
    if record.pixels_sha256 is None:
        yield "the record has no sha256 of the pixels"
