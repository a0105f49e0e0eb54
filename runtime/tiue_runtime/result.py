"""The result of a request."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tiue_runtime.errors import RequestError
from tiue_runtime.modes import Mode

if TYPE_CHECKING:
    from PIL.Image import Image

    from tiue_runtime.choices import Precision
    from tiue_runtime.credentials import Credentials
    from tiue_runtime.record import Record

Images = TypeVar("Images")


@dataclass(frozen=True)
class Result(Generic[Images]):
    """The pictures of a request, in prompt-major order, and how they were made."""

    images: Images  # list of PIL images; float32 (B, H, W, 3) in [0, 1] for "np"; z_0 float32 (B, C, h, w) for "latent"
    seeds: tuple[int, ...]  # one per image; empty if the caller passed latents
    timings: Mapping[str, float]  # seconds: each graph that ran, and "total"
    device: str  # where the graphs ran: "cpu", "openvino", "cuda", "cuda:1"
    precision: "Precision | None"  # of OpenVINO; None on other devices, or if provider options determine it
    steps: int
    memory: Mode  # the mode in which the decoder ran; after running out of memory, the last one
    vae: str  # the kind of image decoder, one of bundle.VAE_KINDS
    tile: tuple[int, int] | None  # (height, width) in pixels, if pictures were decoded in tiles
    records: "tuple[Record, ...]" = ()  # one per image: everything that a file says about it
    upscale: int | None = None  # the factor of the upscaler, if it enlarged the pictures
    flagged: tuple[bool, ...] = ()  # one per image: flagged by the safety checker, and blurred; empty if not checked

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        metadata: bool = True,
        ai_mark: bool = True,
        credentials: "Credentials | None" = None,
        **options: Any,
    ) -> list[Path]:
        """Save all pictures as PNG, JPEG or WebP, by the name's ending.

        Args:
            path: heart.png saves one picture as heart.png, and several as heart-1.png, heart-2.png and so on.
            metadata: whether to write the record and webui's `parameters`.
            ai_mark: whether to write the mark "made by AI" (IPTC's DigitalSourceType in XMP).
            credentials: sign the files with content credentials (extra [c2pa]).
            **options: options of `PIL.Image.Image.save` for the format, for example quality=80.

        Returns:
            The paths of the files.

        Raises:
            RequestError: the path cannot be written, the ending is another one, or these are latents, not pictures.
            OSError: a file could not be written. No file is half written.
        """
        from tiue_runtime.saving import check_picture_path, numbered, save_picture

        images = self._pictures()
        if images is None:
            raise RequestError('save: expected pictures, got latents: ask for output_type="pil" or "np"')
        paths = list(numbered(Path(path), len(images)))
        for each in paths:
            check_picture_path(each)
        for each, image in zip(paths, images, strict=True):
            save_picture(image, each, metadata=metadata, ai_mark=ai_mark, credentials=credentials, **options)
        return paths

    def __repr__(self) -> str:
        """Tell in one line what was made, and how."""
        images: Any = self.images
        count = len(images)
        made = f"array {images.shape}" if hasattr(images, "shape") else f"{count} picture{'s' * (count != 1)}"
        seeds = " to ".join(dict.fromkeys(str(seed) for seed in (*self.seeds[:1], *self.seeds[-1:])))
        how = [f"{'seeds' if count > 1 else 'seed'} {seeds}"] if seeds else []
        return f"<Result: {', '.join([made, *how])}, {self.timings['total']:.2f} s on {self.device}>"

    def _repr_mimebundle_(
        self, include: object = None, exclude: object = None
    ) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
        """Show the pictures in a notebook: one picture, or a sheet of several. IPython itself includes and excludes."""
        from tiue_runtime.notebook import mime_bundle

        pictures = self._pictures()
        data, metadata = mime_bundle(pictures, self.records) if pictures else ({}, {})
        return {"text/plain": repr(self), **data}, metadata

    def _pictures(self) -> "list[Image] | None":
        """Return the pictures as PIL images, or None if these are latents."""
        from tiue_runtime.images import attach, to_pil

        images: Any = self.images
        if hasattr(images, "shape"):
            if images.shape[-1] != 3 or (self.records and images.shape[1] != self.records[0].pixel_height):
                return None
            images = to_pil(images)
            attach(images, self.records)
        return images
