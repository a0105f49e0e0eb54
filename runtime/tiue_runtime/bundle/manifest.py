"""The bundle contract, format 1: what `bundle.json` says, one reader and one writer.

A bundle is a directory with `bundle.json`, `tokenizer.json`, four ONNX graphs (and their external data files)
and a model card. The exporter fills a `Manifest` and calls `write_bundle`; all else calls `Bundle.load`.

The graphs, with B, h, w and k dynamic:

    text_encoder   input_ids int64 (B,L) [, attention_mask int64 (B,L)]          => text (B,L,D)
    unet_encoder   latents (B,C,h,w), text                                      => features, named, opaque
    unet_decoder   features [, text], step_index int64 (k), step_weight (k)     => contribution (B,C,h,w)
    vae_decoder    latents (B,C,h,w), unscaled                                  => image (B,3,H,W) in [-1,1]

A second autoencoder is one more graph, vae_decoder_tiny or vae_decoder_kl, with the signature of vae_decoder and for
the same latents.

text, latents, step_weight, contribution and image are float32 at every precision; features are of whatever
type the two UNet graphs agree on. step_index holds rows of `decoder_timesteps`, and
contribution = sum_k step_weight_k eps_k, so that z_0 = noise_weight * z_T + contribution.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from tiue_runtime.bundle.fields import as_float, as_int, as_str, list_of, map_of, object_of
from tiue_runtime.errors import BundleError

FORMAT = 1
MANIFEST = "bundle.json"
TOKENIZER = "tokenizer.json"
PORTABLE = "portable"  # the variant that every device runs
CPU = "cpu"  # the variant for ONNX Runtime's CPU provider, where the bundle has one
CUDA = "cuda"  # the variant for NVIDIA GPUs, likewise
VARIANTS = (PORTABLE, CPU, CUDA)

TEXT_ENCODER = "text_encoder"
UNET_ENCODER = "unet_encoder"
UNET_DECODER = "unet_decoder"
VAE_DECODER = "vae_decoder"
GRAPHS = (TEXT_ENCODER, UNET_ENCODER, UNET_DECODER, VAE_DECODER)  # in the order they run
GRAPH_FILES = {graph: f"{graph}.onnx" for graph in GRAPHS}

KL, TINY = "kl", "tiny"  # the kinds of image decoder: the teacher's AutoencoderKL, a small autoencoder for its latents
VAE_KINDS = (KL, TINY)

# Names of graph inputs and outputs. The features between the UNet graphs are named by the exporter.
INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
TEXT = "text"
LATENTS = "latents"
STEP_INDEX = "step_index"
STEP_WEIGHT = "step_weight"
CONTRIBUTION = "contribution"
IMAGE = "image"

# ONNX Runtime's name of the element type, and the rank, of every tensor that the contract names.
TENSORS = {
    INPUT_IDS: ("int64", 2),
    ATTENTION_MASK: ("int64", 2),
    TEXT: ("float", 3),
    LATENTS: ("float", 4),
    STEP_INDEX: ("int64", 1),
    STEP_WEIGHT: ("float", 1),
    CONTRIBUTION: ("float", 4),
    IMAGE: ("float", 4),
}

PRECISIONS = ("fp32", "fp16", "bf16", "int8")

REMEDY = "Export the bundle again, or reinstall the package it came from."


@dataclass(frozen=True)
class Schedule:
    """One step count: z_0 = noise_weight * z_T + sum_i step_weights[i] * eps(timesteps[i])."""

    timesteps: tuple[int, ...]  # strictly decreasing, each one of Manifest.decoder_timesteps
    noise_weight: float  # w_0
    step_weights: tuple[float, ...]  # w_1 .. w_N


@dataclass(frozen=True)
class FileInfo:
    """What a file of the bundle must be."""

    sha256: str  # 64 lower-case hexadecimal digits
    size: int  # bytes


@dataclass(frozen=True)
class MemoryUse:
    """Working memory of one run of a graph, beyond its weights, measured at export.

    On h*w latents it is rows * (per_latent * h*w + per_latent_squared * (h*w)**2) bytes, where rows is k*B for
    unet_decoder and B for the other graphs.
    """

    per_latent: float  # bytes
    per_latent_squared: float  # bytes; of attention maps

    def bytes(self, rows: int, latents: int) -> float:
        """Estimate a run of `rows` rows of `latents` = h*w latent pixels."""
        return rows * (self.per_latent * latents + self.per_latent_squared * latents**2)


@dataclass(frozen=True)
class Manifest:
    """The content of bundle.json. Raises BundleError when its values contradict each other."""

    name: str
    licence: str
    created_from: Mapping[str, str]  # provenance: what, from which model, by which version
    latent_channels: int  # C
    pixels_per_latent: int  # H = pixels_per_latent * h
    default_height: int  # pixels
    default_width: int  # pixels
    size_multiple: int  # pixels; heights and widths are multiples of it
    vae_scaling_factor: float  # vae_decoder takes z_0 / vae_scaling_factor + vae_shift_factor
    text_length: int  # L, tokens
    encoder_timestep: int  # t_1 of training; folded into unet_encoder
    decoder_timesteps: tuple[int, ...]  # step_index i means timestep decoder_timesteps[i]
    schedules: Mapping[int, Schedule]  # by step count
    default_steps: int
    precision: str  # one of PRECISIONS: how the files store weights; created_from has what graphs compute in
    variants: Mapping[str, Mapping[str, str]]  # variant -> graph -> file name
    vae_shift_factor: float = 0.0
    # One of VAE_KINDS -> graph: the first is the default and vae_decoder, a second is vae_decoder_{kind}.
    vaes: Mapping[str, str] = field(default_factory=lambda: {KL: VAE_DECODER})
    memory: Mapping[str, Mapping[str, MemoryUse]] = field(  # variant -> graph -> estimate; what is absent is unknown
        default_factory=dict[str, Mapping[str, MemoryUse]]
    )
    files: Mapping[str, FileInfo] = field(default_factory=dict[str, FileInfo])  # write_bundle fills this

    def __post_init__(self) -> None:
        for name in ("latent_channels", "pixels_per_latent", "size_multiple", "text_length"):
            _require(getattr(self, name) > 0, name, "a positive integer", getattr(self, name))
        _require(bool(self.name), "name", "a name", self.name)
        _require(
            self.size_multiple % self.pixels_per_latent == 0,
            "size_multiple",
            f"a multiple of pixels_per_latent ({self.pixels_per_latent})",
            self.size_multiple,
        )
        for name in ("default_height", "default_width"):
            size = getattr(self, name)
            expected = f"a positive multiple of size_multiple ({self.size_multiple})"
            _require(size > 0 and size % self.size_multiple == 0, name, expected, size)
        scale, shift = self.vae_scaling_factor, self.vae_shift_factor
        _require(math.isfinite(scale) and scale != 0, "vae_scaling_factor", "a finite number, not 0", scale)
        _require(math.isfinite(shift), "vae_shift_factor", "a finite number", shift)
        _require(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}", self.precision)
        self._check_schedules()
        self._check_vaes()
        self._check_files()
        self._check_memory()

    def _check_schedules(self) -> None:
        rows = self.decoder_timesteps
        expected = "distinct timesteps >= 0, at least one"
        _require(bool(rows) and min(rows) >= 0 and len(set(rows)) == len(rows), "decoder_timesteps", expected, rows)
        _require(self.encoder_timestep >= 0, "encoder_timestep", "an integer >= 0", self.encoder_timestep)
        for steps, schedule in self.schedules.items():
            where = f"schedules.{steps}"
            lengths = len(schedule.timesteps), len(schedule.step_weights)
            _require(
                steps > 0 and lengths == (steps, steps),
                where,
                f"{steps} timesteps and {steps} step_weights",
                "{} and {}".format(*lengths),
            )
            weights = (schedule.noise_weight, *schedule.step_weights)
            _require(all(map(math.isfinite, weights)), where, "finite weights", weights)
            decreasing = all(a > b for a, b in zip(schedule.timesteps, schedule.timesteps[1:], strict=False))
            _require(decreasing, f"{where}.timesteps", "decreasing timesteps", schedule.timesteps)
            absent = sorted(set(schedule.timesteps) - set(rows))
            _require(not absent, f"{where}.timesteps", f"timesteps of decoder_timesteps {rows}", absent)
        _require(
            self.default_steps in self.schedules,
            "default_steps",
            f"a step count of schedules ({', '.join(map(str, self.schedules)) or 'which is empty'})",
            self.default_steps,
        )

    def _check_vaes(self) -> None:
        known = bool(self.vaes) and set(self.vaes) <= set(VAE_KINDS)
        _require(known, "vaes", f"kinds among {', '.join(VAE_KINDS)}, at least one", sorted(self.vaes))
        for i, (kind, graph) in enumerate(self.vaes.items()):
            expected = f"{VAE_DECODER}_{kind}" if i else VAE_DECODER  # the first one stands for "the" image decoder
            _require(graph == expected, f"vaes.{kind}", expected, graph)

    def _check_memory(self) -> None:
        for variant, graphs in self.memory.items():
            _require(variant in self.variants, "memory", f"variants among {', '.join(self.variants)}", variant)
            for graph, use in graphs.items():
                where = f"memory.{variant}"
                _require(graph in self.graphs, where, f"graphs among {', '.join(self.graphs)}", graph)
                numbers = use.per_latent, use.per_latent_squared
                valid = all(math.isfinite(number) and number >= 0 for number in numbers)
                _require(valid, f"{where}.{graph}", "bytes >= 0", numbers)

    def _check_files(self) -> None:
        _require(bool(self.variants), "variants", f"a variant, such as {PORTABLE!r}", "none")
        for variant, graphs in self.variants.items():
            expected = ", ".join(self.graphs)
            _require(set(graphs) == set(self.graphs), f"variants.{variant}", expected, sorted(graphs))
        for name, info in self.files.items():
            _require(_is_inside(name), "files", "names relative to the bundle, with '/', without '..'", name)
            _require(info.size >= 0, f"files.{name}.size", "bytes >= 0", info.size)
            valid = re.fullmatch(r"[0-9a-f]{64}", info.sha256) is not None
            _require(valid, f"files.{name}.sha256", "64 lower-case hexadecimal digits", info.sha256)
        needed = {TOKENIZER, *(name for graphs in self.variants.values() for name in graphs.values())}
        for name in sorted(needed):
            _require(_is_inside(name), "variants", "file names inside the bundle", name)
            if self.files:
                _require(name in self.files, "files", f"an entry for {name}", sorted(self.files))

    @property
    def graphs(self) -> tuple[str, ...]:
        """Every graph of a variant: GRAPHS and the further image decoders."""
        return tuple(dict.fromkeys((*GRAPHS, *self.vaes.values())))

    def step_rows(self, steps: int) -> tuple[int, ...]:
        """The step_index values of a schedule: rows of decoder_timesteps."""
        return tuple(self.decoder_timesteps.index(t) for t in self.schedules[steps].timesteps)


def _schedules(value: object, where: str) -> dict[int, Schedule]:
    by_text = map_of(_schedule)(value, where)
    for key in by_text:
        if not re.fullmatch(r"[1-9][0-9]*", key):
            raise BundleError(f"{where}: expected step counts such as '4' as keys, got {key!r}")
    return {int(key): schedule for key, schedule in by_text.items()}


_schedule = object_of(
    Schedule,
    {"timesteps": list_of(as_int), "noise_weight": as_float, "step_weights": list_of(as_float)},
)
_manifest = object_of(
    Manifest,
    {
        "name": as_str,
        "licence": as_str,
        "created_from": map_of(as_str),
        "latent_channels": as_int,
        "pixels_per_latent": as_int,
        "default_height": as_int,
        "default_width": as_int,
        "size_multiple": as_int,
        "vae_scaling_factor": as_float,
        "vae_shift_factor": as_float,
        "text_length": as_int,
        "encoder_timestep": as_int,
        "decoder_timesteps": list_of(as_int),
        "schedules": _schedules,
        "default_steps": as_int,
        "precision": as_str,
        "variants": map_of(map_of(as_str)),
        "vaes": map_of(as_str),
        "memory": map_of(
            map_of(object_of(MemoryUse, {"per_latent": as_float, "per_latent_squared": as_float})),
        ),
        "files": map_of(object_of(FileInfo, {"sha256": as_str, "size": as_int})),
    },
    optional=("vae_shift_factor", "vaes", "memory"),
)


def read_manifest(text: str) -> Manifest:
    """Read the text of bundle.json. Raises BundleError."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise BundleError(f"expected JSON, but {error}. {REMEDY}") from error
    fields = map_of(lambda value, where: value)(content, MANIFEST)
    version = as_int(fields.pop("format", None), "format")
    if version > FORMAT:
        raise BundleError(
            f"format: this tiue-runtime reads {FORMAT}, got {version}: written by a newer tiue; "
            "upgrade tiue-runtime: pip install --upgrade tiue-runtime"
        )
    _require(version == FORMAT, "format", str(FORMAT), version)
    try:
        manifest = _manifest(fields, "")
        _require(bool(manifest.files), "files", f"an entry for every file but {MANIFEST}", "none")
    except BundleError as error:
        raise BundleError(f"{error}. {REMEDY}") from error
    return manifest


def _require(condition: bool, where: str, expected: str, received: object) -> None:
    if not condition:
        raise BundleError(f"{where}: expected {expected}, got {received!r}")


def _is_inside(name: str) -> bool:
    """Whether a file name stays in the bundle on every platform."""
    if re.search(r'[\\:*?"<>|\x00-\x1f]', name):
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))
