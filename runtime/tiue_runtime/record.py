"""The record of a picture: everything that is needed to make it again, as JSON, and as the text that web UIs read."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, cast

from tiue_runtime.bundle.fields import Field, parse_json, reader_of
from tiue_runtime.errors import BundleError, RequestError, shorten

FORMAT = 1
LONGEST = 2**20  # characters of a record

_Prompt = Annotated[str, Field(longest=LONGEST, pattern=r"(?s).*")]  # also with line breaks
_Word = Annotated[str, Field(longest=1000)]
_Count = Annotated[int, Field(least=1, most=2**20)]


@dataclass(frozen=True, kw_only=True)
class Record:
    """How a picture was made. Paths, names of people and names of machines are not in it."""

    # Of the whole request. None: the caller passed embeddings.
    prompts: Annotated[tuple[_Prompt, ...] | None, Field(shortest=1, longest=2**20)] = None
    num_images: _Count  # per prompt
    index: Annotated[int, Field(least=0, most=2**40)]  # of this picture in the request
    # Of the request's first picture. None: the caller passed latents.
    seed: Annotated[int | None, Field(least=0, most=2**64 - 1)] = None
    steps: _Count
    height: _Count  # pixels
    width: _Count
    memory: _Word  # the mode of the decoder
    tile: Annotated[tuple[int, int] | None, Field("(height, width) in pixels.")] = None
    vae: _Word
    variant: _Word
    device: _Word
    precision: Annotated[str | None, Field(longest=1000)] = None
    threads: Annotated[int | None, Field(least=1, most=2**20)] = None  # that the caller set
    bundle: _Word  # its name
    bundle_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # of bundle.json, which names all files' hashes
    versions: Annotated[Mapping[str, _Word], Field(longest=100)]  # of packages

    @property
    def prompt(self) -> str | None:
        """The prompt of this picture."""
        return None if self.prompts is None else self.prompts[self.index // self.num_images]

    @property
    def own_seed(self) -> int | None:
        """The seed that makes this picture alone."""
        return None if self.seed is None else self.seed + self.index

    def to_json(self) -> str:
        """Return one line of ASCII. `prompt` and `own_seed` are in it for readers of single pictures."""
        content = {"format": FORMAT, **asdict(self), "prompt": self.prompt, "own_seed": self.own_seed}
        return json.dumps({name: value for name, value in content.items() if value is not None})

    def to_text(self) -> str:
        """Return the parameters in the form of stable-diffusion-webui. Characters that no text may hold are dropped."""
        parts = {
            "Steps": self.steps,
            "Seed": "unknown" if self.own_seed is None else self.own_seed,
            "Size": f"{self.width}x{self.height}",
            "Model hash": self.bundle_sha256[:10],
            "Model": self.bundle,
            "Version": f"tiue-runtime {self.versions['tiue-runtime']}",
        }
        settings = ", ".join(f"{name}: {value}" for name, value in parts.items())
        return f"{self.prompt or ''}\n{settings}".replace("\0", "")

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Read a record. Raises RequestError if it is damaged, or of another format."""
        if len(text) > LONGEST:
            raise RequestError(f"record: expected at most {LONGEST:,} characters, got {len(text):,}")
        try:
            content = parse_json(text.encode(errors="replace"))
            fields = cast(dict[str, Any], content) if isinstance(content, dict) else {}
            if fields.get("format") != FORMAT:
                raise RequestError(f"record: expected format {FORMAT}, got {shorten(text)}")
            for name in ("format", "prompt", "own_seed"):
                fields.pop(name, None)
            record = _read(fields, "")
        except BundleError as error:
            raise RequestError(f"record: {error}") from error
        count = record.num_images * len(record.prompts or (None,))
        if record.prompts is not None and record.index >= count:
            raise RequestError(f"record: expected an index below {count}, got {record.index}")
        return record


_read = reader_of(Record)
