"""The bundle contract, format 1: the fields of `bundle.json`.

A bundle is a directory with `bundle.json`, `tokenizer.json`, at least four ONNX graphs with their external data
files, and a model card. The exporter fills a `Manifest` and calls `write_bundle`. Everything else calls `Bundle.load`.
docs/bundle.md describes the format for readers in other languages. bundle.schema.json is generated from these
dataclasses.

The graphs, with B, h, w and k dynamic:

    text_encoder     input_ids int64 (B, L) [, attention_mask int64 (B, L)]     => text (B, L, D)
    unet_encoder     latents (B, C, h, w), text                                 => features, named, opaque
    unet_decoder     features [, text], step_index int64 (k), step_weight (k)   => contribution (B, C, h, w)
    vae_decoder      latents (B, C, h, w)                                       => image (B, 3, H, W) in [-1, 1]
    safety_checker   image (B, 3, S, S) in [-1, 1]                              => score (B)
    upscaler         image (B, 3, H, W) in [-1, 1]                              => enlarged (B, 3, scale*H, scale*W)

vae_decoder is the first of Manifest.vaes. A second image decoder is one more graph, vae_decoder_tiny or vae_decoder_kl,
with the same signature and for the same latents. safety_checker is optional. It takes pictures as
Manifest.safety_checker prepares them, and flags those with a score above 0. upscaler is optional.

text, latents, step_weight, contribution, image and score are float32 at every precision. The two UNet graphs agree on
the types of features. step_index holds rows of `decoder_timesteps`. contribution = sum_k step_weight_k eps_k, so that
z_0 = noise_weight * z_T + contribution.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, cast

from tiue_runtime.bundle.fields import Field, parse_json, reader_of, require
from tiue_runtime.errors import BundleError, clip

FORMAT = 1
MANIFEST = "bundle.json"
TOKENIZER = "tokenizer.json"
PORTABLE = "portable"  # the variant that every device runs
CPU = "cpu"  # the optional variant for ONNX Runtime's CPU provider
CUDA = "cuda"  # the optional variant for NVIDIA GPUs
WEB = "web"  # the optional variant for ONNX Runtime in a browser
VARIANTS = (PORTABLE, CPU, CUDA, WEB)

TEXT_ENCODER = "text_encoder"
UNET_ENCODER = "unet_encoder"
UNET_DECODER = "unet_decoder"
VAE_DECODER = "vae_decoder"
GRAPHS = (TEXT_ENCODER, UNET_ENCODER, UNET_DECODER, VAE_DECODER)  # in the order of their runs
GRAPH_FILES = {graph: f"{graph}.onnx" for graph in GRAPHS}
SAFETY_CHECKER = "safety_checker"  # optional, in all variants of a bundle or in none
UPSCALER = "upscaler"  # likewise

KL, TINY = "kl", "tiny"  # the kinds of image decoder: the teacher's AutoencoderKL, a small autoencoder for its latents
VAE_KINDS = (KL, TINY)

# Names of graph inputs and outputs. The exporter names the features between the UNet graphs.
INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
TEXT = "text"
LATENTS = "latents"
STEP_INDEX = "step_index"
STEP_WEIGHT = "step_weight"
CONTRIBUTION = "contribution"
IMAGE = "image"
SCORE = "score"
ENLARGED = "enlarged"

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
    SCORE: ("float", 1),
    ENLARGED: ("float", 4),
}

FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")  # of Pillow
PRECISIONS = ("fp32", "fp16", "bf16", "int8")  # of computing, and of stored weights

MANIFEST_LIMIT = 16 * 2**20  # bytes of bundle.json
REMEDY = "Export the bundle again, or reinstall its package."

_MOST_STEPS = 1000
_Timesteps = Annotated[
    tuple[Annotated[int, Field(least=0, most=999_999)], ...],
    Field("Timesteps of the noise schedule.", shortest=1, longest=_MOST_STEPS),
]
_FileName = Annotated[str, Field("A file's name relative to the bundle, with '/'.", shortest=1, longest=1000)]
_Text = Annotated[str, Field(shortest=1, longest=1000)]


def _pixels(doc: str) -> Field:
    return Field(doc, least=1, most=65_536)


@dataclass(frozen=True)
class Schedule:
    """One step count: z_0 = noise_weight * z_T + sum_i step_weights[i] * eps(timesteps[i])."""

    timesteps: _Timesteps  # strictly decreasing, each one of Manifest.decoder_timesteps
    noise_weight: Annotated[float, Field("w_0, the weight of the noise z_T.")]
    step_weights: Annotated[
        tuple[float, ...], Field("w_1 .. w_N, one for each timestep.", shortest=1, longest=_MOST_STEPS)
    ]


@dataclass(frozen=True)
class FileInfo:
    """The size and hash of a file of the bundle."""

    sha256: Annotated[str, Field("Of the file's bytes, in lower-case hexadecimal.", pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, Field("Bytes.", least=0, most=2**53)]


@dataclass(frozen=True)
class MemoryUse:
    """Working memory of one run of a graph, beyond its weights, measured at export.

    On h*w latents, a run takes rows * (per_latent * h*w + per_latent_squared * (h*w)**2) bytes. rows is k*B for
    unet_decoder and B for the other graphs. For safety_checker, h*w is 1: its pictures have one size. For upscaler, it
    is the number of pixels before it enlarges them.
    """

    per_latent: Annotated[float, Field("Bytes for each latent pixel of a row.", least=0)]
    per_latent_squared: Annotated[float, Field("Bytes for each pair of latent pixels: attention maps.", least=0)]

    def bytes(self, rows: int, latents: int) -> float:
        """Return the bytes of a run. rows: k*B or B, as above. latents: h*w."""
        return rows * (self.per_latent * latents + self.per_latent_squared * latents**2)


@dataclass(frozen=True)
class Preview:
    """A linear image decoder: RGB in [0, 1] is latents @ matrix + bias, clipped."""

    matrix: Annotated[tuple[tuple[float, float, float], ...], Field("C rows of 3 numbers.", shortest=1, longest=1024)]
    bias: Annotated[tuple[float, float, float], Field("One number for red, green and blue each.")]


@dataclass(frozen=True)
class Prompts:
    """Prompts that suit the model, for applications that show examples or complete words."""

    examples: Annotated[tuple[_Text, ...], Field("Whole prompts that the model renders well.")] = ()
    vocabulary: Annotated[
        tuple[_Text, ...], Field("Words and phrases that it was trained on, if it knows no others.")
    ] = ()
    styles: Annotated[tuple[_Text, ...], Field("Names of styles. The seed adds one to a prompt that has none.")] = ()


@dataclass(frozen=True)
class SafetyChecker:
    """How the graph safety_checker gets a picture of 8-bit levels: resized, then cut to the square at its center."""

    resize: Annotated[int, _pixels("The shorter side after resizing. The longer one keeps the ratio, rounded down.")]
    crop: Annotated[int, _pixels("S, the sides of the square.")]
    filter: Annotated[str, Field("Pillow's filter for resizing, with antialiasing.", choices=FILTERS)]


@dataclass(frozen=True)
class Upscaler:
    """The graph upscaler, which enlarges pictures on request."""

    scale: Annotated[int, Field("The factor of both sides.", least=2, most=16)]


@dataclass(frozen=True)
class Manifest:
    """The content of bundle.json. Raises BundleError when its values contradict each other."""

    name: Annotated[str, Field("The model's name.", shortest=1, longest=200)]
    license: Annotated[str, Field('An SPDX expression, or "unknown".', shortest=1, longest=1000)]
    created_from: Annotated[Mapping[str, str], Field("Provenance, for people: no program depends on it.", longest=100)]
    precision: Annotated[
        str, Field("The type of the graphs' arithmetic; the cpu and web variants: fp32.", choices=PRECISIONS)
    ]
    weights: Annotated[
        str, Field("The type of the stored weights of the UNet and the image decoders.", choices=PRECISIONS)
    ]
    latent_channels: Annotated[int, Field("C.", least=1, most=1024)]
    pixels_per_latent: Annotated[int, _pixels("H = pixels_per_latent * h, and likewise W.")]
    default_height: Annotated[int, _pixels("Pixels.")]
    default_width: Annotated[int, _pixels("Pixels.")]
    size_multiple: Annotated[int, _pixels("Pixels: heights and widths are multiples of it.")]
    text_length: Annotated[int, Field("L, tokens.", least=1, most=65_536)]
    encoder_timestep: Annotated[int, Field("t_1 of training, a constant of unet_encoder.", least=0, most=999_999)]
    decoder_timesteps: Annotated[
        _Timesteps, Field("step_index i means timestep decoder_timesteps[i].", shortest=1, longest=_MOST_STEPS)
    ]
    schedules: Annotated[Mapping[int, Schedule], Field("By step count N.", shortest=1, longest=_MOST_STEPS)]
    default_steps: Annotated[int, Field("One of the step counts of schedules.", least=1, most=_MOST_STEPS)]
    variants: Annotated[
        Mapping[str, Mapping[str, _FileName]], Field("Variant => graph => file.", shortest=1, longest=100)
    ]
    vaes: Annotated[
        tuple[Annotated[str, Field(choices=VAE_KINDS)], ...],
        Field(
            "Kinds of image decoders: the first is the graph vae_decoder, another one vae_decoder_<kind>.",
            shortest=1,
            longest=len(VAE_KINDS),
        ),
    ] = (KL,)
    sizes: Annotated[
        tuple[tuple[Annotated[int, _pixels("")], Annotated[int, _pixels("")]], ...],
        Field("Further (height, width) in pixels that the model was trained for. Others get a warning.", longest=1000),
    ] = ()
    memory: Annotated[
        Mapping[str, Mapping[str, MemoryUse]], Field("Variant => graph => estimate; absent if unknown.")
    ] = field(default_factory=dict[str, Mapping[str, MemoryUse]])
    preview: Annotated[Preview | None, Field("A linear image decoder, for previews.")] = None
    prompts: Annotated[Prompts | None, Field("Prompts that suit the model.")] = None
    safety_checker: Annotated[
        SafetyChecker | None, Field("How pictures are prepared for the graph safety_checker, if there is one.")
    ] = None
    upscaler: Annotated[Upscaler | None, Field("What the graph upscaler does, if there is one.")] = None
    files: Annotated[
        Mapping[str, FileInfo], Field("Every file of the bundle but bundle.json.", shortest=1, always=True)
    ] = field(default_factory=dict[str, FileInfo])  # write_bundle fills this

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_schedules()
        require(bool(self.vaes) and len(set(self.vaes)) == len(self.vaes), "vaes", "different kinds", self.vaes)
        self._check_variants()
        self._check_optional_graphs()
        self._check_files()
        self._check_memory()
        if self.preview is not None:
            rows = len(self.preview.matrix)
            require(rows == self.latent_channels, "preview.matrix", f"{self.latent_channels} rows", rows)

    def _check_sizes(self) -> None:
        expected = f"a multiple of pixels_per_latent ({self.pixels_per_latent})"
        require(self.size_multiple % self.pixels_per_latent == 0, "size_multiple", expected, self.size_multiple)
        sizes = {"default_height": self.default_height, "default_width": self.default_width}
        sizes |= {f"sizes[{i}][{j}]": self.sizes[i][j] for i in range(len(self.sizes)) for j in range(2)}
        for name, size in sizes.items():
            expected = f"a positive multiple of size_multiple ({self.size_multiple})"
            require(size > 0 and size % self.size_multiple == 0, name, expected, size)

    def _check_schedules(self) -> None:
        rows = self.decoder_timesteps
        require(len(set(rows)) == len(rows), "decoder_timesteps", "distinct timesteps", rows)
        for steps, schedule in self.schedules.items():
            where = f"schedules.{steps}"
            lengths = len(schedule.timesteps), len(schedule.step_weights)
            require(
                lengths == (steps, steps),
                where,
                f"{steps} timesteps and {steps} step_weights",
                "{} and {}".format(*lengths),
            )
            decreasing = all(a > b for a, b in zip(schedule.timesteps, schedule.timesteps[1:], strict=False))
            require(decreasing, f"{where}.timesteps", "decreasing timesteps", schedule.timesteps)
            absent = sorted(set(schedule.timesteps) - set(rows))
            require(not absent, f"{where}.timesteps", "timesteps of decoder_timesteps", absent)
        known = clip(", ".join(map(str, self.schedules)) or "which is empty")
        require(
            self.default_steps in self.schedules,
            "default_steps",
            f"a step count of schedules ({known})",
            self.default_steps,
        )

    def _check_variants(self) -> None:
        require(bool(self.variants), "variants", f"a variant such as {PORTABLE!r}", "none")
        for variant, graphs in self.variants.items():
            where = f"variants.{variant}"
            require(set(graphs) == set(self.graphs), where, f"the graphs {', '.join(self.graphs)}", sorted(graphs))
            for graph, name in graphs.items():
                expected = "a file name inside the bundle that ends in .onnx"
                require(is_portable(name) and name.endswith(".onnx"), f"{where}.{graph}", expected, name)

    def _check_optional_graphs(self) -> None:
        checker = self.safety_checker
        for graph, about in ((SAFETY_CHECKER, checker), (UPSCALER, self.upscaler)):
            expected = f"an object if variants have the graph {graph}, else none"
            require((graph in self.graphs) == (about is not None), graph, expected, about)
        if checker is not None:
            most = f"at most safety_checker.resize ({checker.resize})"
            require(checker.crop <= checker.resize, "safety_checker.crop", most, checker.crop)

    def _check_files(self) -> None:
        if not self.files:
            return  # The exporter has not written them yet.
        for name in self.files:
            expected = "names relative to the bundle, with '/', that every system can store"
            require(is_portable(name), "files", expected, name)
        folded = [unicodedata.normalize("NFC", name).casefold() for name in (*self.files, MANIFEST)]
        count = Counter(folded)
        names = sorted(name for name, fold in zip(self.files, folded, strict=False) if count[fold] > 1)
        require(not names, "files", "names that differ by more than capitals, without bundle.json", names)
        for name in (TOKENIZER, *(name for graphs in self.variants.values() for name in graphs.values())):
            require(name in self.files, "files", f"an entry for {clip(name)}", sorted(self.files))

    def _check_memory(self) -> None:
        for variant, graphs in self.memory.items():
            known = clip(", ".join(self.variants))
            require(variant in self.variants, "memory", f"variants among {known}", variant)
            for graph in graphs:
                expected = f"graphs among {', '.join(self.graphs)}"
                require(graph in self.graphs, f"memory.{variant}", expected, graph)

    @property
    def size(self) -> int:
        """Bytes of all files of the bundle, without bundle.json."""
        return sum(file.size for file in self.files.values())

    @property
    def made_for(self) -> tuple[tuple[int, int], ...]:
        """Every (height, width) in pixels that the model was trained for, the default first."""
        return tuple(dict.fromkeys([(self.default_height, self.default_width), *self.sizes]))

    @property
    def vae_graphs(self) -> dict[str, str]:
        """The graph of each kind of image decoder, the default first."""
        return vae_graphs(self.vaes)

    @property
    def graphs(self) -> tuple[str, ...]:
        """Every graph of a variant: GRAPHS, further image decoders, the safety checker and the upscaler, if any."""
        named = {graph for graphs in self.variants.values() for graph in graphs}
        optional = [graph for graph in (SAFETY_CHECKER, UPSCALER) if graph in named]
        return tuple(dict.fromkeys((*GRAPHS, *self.vae_graphs.values(), *optional)))

    def step_rows(self, steps: int) -> tuple[int, ...]:
        """The step_index values of a schedule: rows of decoder_timesteps."""
        return tuple(self.decoder_timesteps.index(t) for t in self.schedules[steps].timesteps)

    def in_style(self, prompt: str, seed: int) -> str:
        """Return the prompt that is drawn: the seed adds a style if `prompt` has words, but none of them names one."""
        styles = self.prompts.styles if self.prompts else ()
        words = _spaced(prompt)
        if not styles or words == " " or any(_spaced(name) in words for name in ("style", *styles)):
            return prompt
        return f"{prompt}, {styles[seed % len(styles)]} style"


def vae_graphs(kinds: Iterable[str]) -> dict[str, str]:
    """Return the graph of each kind of image decoder. The first kind is the default."""
    return {kind: f"{VAE_DECODER}_{kind}" if i else VAE_DECODER for i, kind in enumerate(kinds)}


def _spaced(text: str) -> str:
    """Return the words of a text in lower case, with a space before and after each."""
    return " ".join(["", *re.findall(r"\w+", text.lower()), ""])


_manifest = reader_of(Manifest)


def read_manifest(data: bytes) -> Manifest:
    """Read the bytes of bundle.json. Raises BundleError."""
    with _remedied():
        content = parse_json(data)
        require(isinstance(content, dict), MANIFEST, "an object", content)
        fields = dict(cast(dict[str, object], content))
        version = fields.pop("format", None)
        require(isinstance(version, int) and not isinstance(version, bool), "format", "an integer", version)
    if cast(int, version) > FORMAT:
        raise BundleError(
            f"format: this tiue-runtime reads {FORMAT}, got {version}: written by a newer tiue; "
            "install a newer tiue-runtime"
        )
    with _remedied():
        require(version == FORMAT, "format", str(FORMAT), version)
        return _manifest(fields, "")


@contextmanager
def _remedied() -> Generator[None]:
    try:
        yield
    except BundleError as error:
        raise BundleError(f"{error}. {REMEDY}") from error


# Names that Windows reserves, with any extension.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9\u00b9\u00b2\u00b3]|lpt[0-9\u00b9\u00b2\u00b3])(\..*)?", re.IGNORECASE)


def is_portable(name: str) -> bool:
    """Say whether a file name stays inside the bundle and can be stored on every system."""
    if len(name) > 1000 or re.search(r'[\\:*?"<>|\x00-\x1f\x7f]', name):
        return False
    return all(
        part not in ("", ".", "..")
        and part[-1] not in ". "
        and not _RESERVED.fullmatch(part)
        and len(part.encode("utf-8", "surrogatepass")) <= 255
        for part in name.split("/")
    )
