"""The record of a picture: everything that made it, as one JSON object and as webui's `parameters` text.

Files hold the JSON (metadata.py). `repeating` makes the picture again from it. No field holds a path of this computer.
docs/traceability.md describes the format for readers in other languages.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, cast

import numpy as np

from tiue_runtime import __version__
from tiue_runtime.bundle import VAE_KINDS
from tiue_runtime.bundle.fields import Field, parse_json, reader_of
from tiue_runtime.errors import BundleError, RequestError, shorten
from tiue_runtime.modes import MODES
from tiue_runtime.ort.devices import KINDS, parse_device
from tiue_runtime.ort.sessions import installed_wheels

if TYPE_CHECKING:
    from tiue_runtime.pipeline import Pipeline
    from tiue_runtime.request import Request
    from tiue_runtime.sampler import Sampled

FORMAT = 1
MOST_BYTES = 16 * 2**20  # of a record

_SHA256 = "^[0-9a-f]{64}$"
_Pixels = Annotated[int, Field(least=1, most=2**20)]


@dataclass(frozen=True)
class Record:
    """How one picture was made."""

    bundle: Annotated[str, Field("The bundle's name.", shortest=1, longest=200)]
    bundle_sha256: Annotated[str, Field("Of bundle.json, which lists the sha256 of all files.", pattern=_SHA256)]
    steps: Annotated[int, Field("N, the decoder's timesteps.", least=1, most=1000)]
    height: Annotated[int, Field("Pixels.", least=1, most=2**20)]
    width: Annotated[int, Field("Pixels.", least=1, most=2**20)]
    memory: Annotated[str, Field("The mode in which the decoder ran.", choices=tuple(MODES))]
    vae: Annotated[str, Field("The kind of image decoder.", choices=VAE_KINDS)]
    variant: Annotated[str, Field("The bundle's graphs that ran.", shortest=1, longest=100)]
    device: Annotated[str, Field("Where they ran.", shortest=1, longest=100)]
    provider: Annotated[str, Field("ONNX Runtime's name of the provider.", shortest=1, longest=100)]
    versions: Annotated[Mapping[str, str], Field("Of tiue-runtime, ONNX Runtime's wheel and numpy.", longest=20)]
    prompt: Annotated[
        str | None, Field("Absent if the caller passed text embeddings.", longest=2**24, pattern="^[\\s\\S]*$")
    ] = None
    seed: Annotated[
        int | None, Field("Of this picture. Absent if the caller passed noise.", least=0, most=2**64 - 1)
    ] = None
    threads: Annotated[int | None, Field("CPU threads, if the caller set them.", least=1, most=2**20)] = None
    precision: Annotated[str | None, Field("The precision of OpenVINO's arithmetic.", choices=("bf16", "fp32"))] = None
    tile: Annotated[tuple[_Pixels, _Pixels] | None, Field("Height and width of tiles in pixels, if any.")] = None
    prompts: Annotated[int, Field("Prompts of the request, which ran as one batch.", least=1, most=2**20)] = 1
    num_images: Annotated[int, Field("Pictures of each prompt.", least=1, most=2**20)] = 1
    index: Annotated[int, Field("Of this picture in the request, prompt-major, from 0.", least=0, most=2**40)] = 0
    upscale: Annotated[
        int | None, Field("Factor of the upscaler that enlarged it to this multiple of its size.", least=2, most=16)
    ] = None
    upscale_tile: Annotated[tuple[_Pixels, _Pixels] | None, Field("Of the upscaler, before it enlarges them.")] = None
    flagged: Annotated[
        bool | None, Field("Flagged by the safety checker, and therefore blurred. Absent if it was not checked.")
    ] = None
    pixels_sha256: Annotated[str | None, Field("Of the RGB bytes, row by row, as made.", pattern=_SHA256)] = None

    @property
    def pixel_height(self) -> int:
        """The height of the picture as it was saved."""
        return self.height * (self.upscale or 1)

    def to_json(self) -> str:
        """Return the record as one line of JSON in ASCII, without the fields that are absent."""
        present = {key: value for key, value in asdict(self).items() if value is not None}
        return json.dumps({"format": FORMAT, **present})

    def parameters(self) -> str:
        """Return the text that webui writes into pictures, and that tools around it read."""
        values = {
            "Steps": self.steps,
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": self.bundle,
            "Model hash": self.bundle_sha256[:10],
            "VAE": self.vae,
            "Hires upscale": self.upscale,
            "Version": f"tiue-runtime {self.versions.get('tiue-runtime', '')}",
        }
        pairs = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in values.items() if value is not None)
        # Neither NUL nor half a surrogate pair can stand in all three formats. The JSON has them as escapes.
        prompt = re.sub("[\0\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", self.prompt or "")
        return f"{prompt}\n{pairs}"


_RECORD = reader_of(Record)


def parse_record(data: bytes) -> Record:
    """Read the JSON of a record.

    Raises:
        RequestError: the data are no record, or one of a newer format.
    """
    if len(data) > MOST_BYTES:
        raise RequestError(f"expected a record of at most {MOST_BYTES:,} bytes, got {len(data):,}")
    try:
        content = parse_json(data)
        if not isinstance(content, dict):
            raise RequestError(f"expected a record that is a JSON object, got {shorten(content)}")
        given = cast(dict[str, object], content)
        version = given.pop("format", None)
        if version != FORMAT or isinstance(version, bool):
            newer = ". Upgrade tiue-runtime" if isinstance(version, int) and version > FORMAT else ""
            raise RequestError(f"expected a record of format {FORMAT}, got {shorten(version)}{newer}")
        record: Record = _RECORD(given, "record")
    except BundleError as error:
        raise RequestError(f"its record is damaged: {error}") from error
    if record.index >= record.prompts * record.num_images or (record.seed is not None and record.index > record.seed):
        raise RequestError(f"its record is damaged: index {record.index} is outside of its request")
    return record


def records_of(pipeline: "Pipeline", request: "Request", sampled: "Sampled") -> tuple[Record, ...]:
    """Return the record of each picture of a request, prompt-major, without the sha256 of its pixels."""
    manifest = pipeline.bundle.manifest
    count, _, height, width = request.shape
    first = Record(
        bundle=manifest.name,
        bundle_sha256=pipeline.bundle.sha256,
        steps=request.steps,
        height=height * manifest.pixels_per_latent,
        width=width * manifest.pixels_per_latent,
        memory=sampled.memory,
        vae=pipeline.vae,
        variant=pipeline.variant,
        device=pipeline.device,
        provider=KINDS[parse_device(pipeline.device).kind].provider,
        versions=versions(),
        threads=pipeline.threads,
        precision=pipeline.precision,
        tile=sampled.tile,
        upscale=request.upscale,
        upscale_tile=sampled.upscale_tile,
        prompts=count // request.num_images,
        num_images=request.num_images,
    )
    return tuple(
        replace(
            first,
            prompt=None if request.prompts is None else request.prompts[i],
            seed=request.seeds[i] if request.seeds else None,
            index=i,
            flagged=sampled.flagged[i] if sampled.flagged else None,
        )
        for i in range(count)
    )


@cache
def versions() -> dict[str, str]:
    """Return the versions on which the values of pixels depend."""
    return {"tiue-runtime": __version__, **installed_wheels(), "numpy": np.__version__}


def _quoted(value: str) -> str:
    """Quote a value of `parameters` as webui does."""
    return json.dumps(value, ensure_ascii=False) if re.search("[,:\n]", value) else value
