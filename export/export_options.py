"""The options of an export: default, help and choices of each in one place. The command line has a flag for each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tiue_runtime import bundle

from export.errors import ExportError
from tiue.settings import check, setting

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

    from export.upscaler import LoadedUpscaler
else:
    AutoencoderTiny = LoadedUpscaler = Any  # Importing diffusers takes seconds, which the help should not take.

# The lowest PSNR allowed of latents and images: with graphs or weights in less than float32, and with int8.
PSNR_FLOOR_DB, INT8_FLOOR_DB = 35.0, 30.0
TRITON = "triton"  # the target that arranges the files of another one for NVIDIA's Triton Inference Server


@dataclass(frozen=True)
class Options:
    """Options of `export_bundle`. Values that are wrong or contradict each other raise ExportError."""

    name: str | None = setting(None, "the model's name", group="how to export", shown="the one in the checkpoint")
    target: tuple[str, ...] = setting(
        (),
        "portable runs anywhere; cpu and cuda use ONNX Runtime's own operators for CPUs and CUDA; web is for browsers, "
        "in files of at most 256 MiB; all targets share their weights. triton, alone or with one of the first three, "
        "makes a model repository for Triton Inference Server",
        choices=(*bundle.VARIANTS, TRITON),
        metavar="TARGET[,TARGET]",
        shown="portable, and cpu for a model over 1 GB",
    )
    precision: str = setting(
        "fp32",
        "the precision that graphs compute in; fp16 is for GPUs and keeps fp32 where it would overflow; int8 is "
        "for CPUs and keeps fp32 where it would lose most",
        choices=("fp32", "fp16", "int8"),
    )
    weights: str | None = setting(
        None,
        "how files store weights; fp16 halves the files, also of graphs that compute in fp32; int8 quarters them, "
        "for graphs that compute in fp32",
        choices=("fp32", "fp16", "int8"),
        shown="as the graphs compute; for the web target alone, fp16",
    )
    vae: tuple[str, ...] = setting(
        (),
        "image decoders; tiny alone replaces the model's own decoder; if there are two, the first is the default",
        choices=bundle.VAE_KINDS,
        metavar="KIND[,KIND]",
        shown="the model's own",
    )
    text_encoder: str = setting(
        "fp32", "how the file of the text encoder stores weights; int8 quarters it", choices=("fp32", "int8")
    )
    sizes: tuple[str, ...] = setting(
        (),
        "further sizes in pixels that the model was trained for; the runtime warns of all others",
        metavar="WIDTHxHEIGHT[,...]",
        shown="only the size of the model's configuration",
    )
    safety_checker: bool = setting(
        True, "export the safety checker of a pipeline that has one; without it, pictures are not checked"
    )
    overwrite: bool = setting(False, "replace a bundle that exists")
    upscaler: LoadedUpscaler | None = None  # enlarges pictures on request, after the image decoder
    tiny_vae: AutoencoderTiny | None = None  # beside the model's own decoder, or in its place
    calibration_prompts: tuple[str, ...] = ()  # for int8 to measure ranges on; () uses 16 built-in prompts

    def __post_init__(self) -> None:
        try:
            check(self)
        except ValueError as error:
            raise ExportError(str(error)) from error
        for name, values in (("target", self.target), ("vae", self.vae)):
            if len(set(values)) < len(values):
                raise ExportError(f"`{name}` must name each kind once, got {','.join(values)}")
        for size in self.sizes:
            if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", size):
                raise ExportError(f"`sizes`: expected WIDTHxHEIGHT in pixels, for example 768x512, got {size!r}")
        if self.precision == "fp16" and self.weights in ("fp32", "int8"):
            raise ExportError(f"`weights` {self.weights}: graphs that compute in fp16 have fp16 weights; leave it out")
        if self.precision == "int8" and self.weights == "int8":
            raise ExportError("`weights` int8: graphs that compute in int8 store what they can so; leave it out")
        if self.precision == "fp16" and self.variants and {*self.variants} <= {bundle.CPU, bundle.WEB}:
            named = f"{self.variants[0]} target computes" if len(self.variants) == 1 else "targets cpu and web compute"
            raise ExportError(f"`precision` fp16: the {named} in fp32; `weights` fp16 halves the files")
        if self.precision == "int8" and bundle.CUDA in self.target:
            raise ExportError("`precision` int8: CUDA has no such kernels; export the cuda target in fp16")
        if self.precision == "int8" and bundle.WEB in self.target:
            raise ExportError("`precision` int8: WebGPU has no such kernels; `weights` int8 quarters the files")
        if self.calibration_prompts and self.precision != "int8":
            raise ExportError("`calibration_prompts` are for `precision` int8; leave them out")
        if (bundle.TINY in self.vae) != (self.tiny_vae is not None):
            raise ExportError("`vae` tiny and `vae_path`, a directory of a diffusers AutoencoderTiny, need each other")
        self._check_triton()

    def _check_triton(self) -> None:
        if not self.triton:
            return
        if bundle.WEB in self.variants or len(self.variants) > 1:
            raise ExportError(
                f"`target` triton: expected it alone or with one of portable, cpu and cuda, got {','.join(self.target)}"
            )
        if len(self.vae) > 1:
            raise ExportError(f"`target` triton: expected one image decoder, got `vae` {','.join(self.vae)}")
        if self.upscaler is not None:
            raise ExportError("`target` triton: its model has no upscaler; leave `upscaler` out")

    @property
    def triton(self) -> bool:
        """Whether the files are arranged for Triton Inference Server."""
        return TRITON in self.target

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that are asked for. Empty: the default."""
        return tuple(target for target in self.target if target != TRITON)

    @property
    def further_sizes(self) -> tuple[tuple[int, int], ...]:
        """Return `sizes` as (height, width) in pixels."""
        pairs = (size.split("x") for size in self.sizes)
        return tuple((int(height), int(width)) for width, height in pairs)

    @property
    def stored(self) -> str:
        """How the files store weights."""
        if self.weights is None and self.target == (bundle.WEB,):
            return "fp16"
        return self.weights or ("fp32" if self.precision == "int8" else self.precision)

    @property
    def stored_text_encoder(self) -> str:
        """How the file of the text encoder stores weights."""
        return self.stored if self.text_encoder == "fp32" else self.text_encoder

    @property
    def floor_db(self) -> float | None:
        """The PSNR that latents and images must reach; None where all outputs must match to float32 rounding."""
        if self.precision == "int8":
            return INT8_FLOOR_DB
        return None if (self.precision, self.stored, self.text_encoder) == ("fp32",) * 3 else PSNR_FLOOR_DB
