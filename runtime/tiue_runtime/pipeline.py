"""From a prompt to pictures.

prompt -> text_encoder -> text
z_T, text -> denoise: unet_encoder once, unet_decoder at N timesteps -> z_0
z_0 -> vae_decoder -> image
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, Unpack, cast, get_args, overload

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from tiue_runtime.bundle import ATTENTION_MASK, INPUT_IDS, SAFETY_CHECKER, TEXT, TEXT_ENCODER, UNET_DECODER, Bundle
from tiue_runtime.bundle.find import find_bundle
from tiue_runtime.decode import decode_image
from tiue_runtime.denoise import denoise
from tiue_runtime.errors import OutOfMemoryError, RequestError, clip, is_out_of_memory, shorten
from tiue_runtime.graphs import Graphs, Halves, Turns
from tiue_runtime.hub.signature import check_signature, demanded_trust
from tiue_runtime.images import to_pil, to_unit
from tiue_runtime.modes import Ladder, Memory, Mode
from tiue_runtime.options import LoadOptions, OutputType, RequestOptions, Vae, complete, document, one_of
from tiue_runtime.ort.devices import Precision
from tiue_runtime.ort.placement import Placement, place
from tiue_runtime.request import Request
from tiue_runtime.run import Run
from tiue_runtime.tokenizer import PromptTokenizer

Float32 = NDArray[np.float32]
Images = TypeVar("Images")


@dataclass(frozen=True)
class Result(Generic[Images]):
    """The pictures of a request, in prompt-major order, and how they were made."""

    images: Images  # list of PIL images; float32 (B, H, W, 3) in [0, 1] for "np"; z_0 float32 (B, C, h, w) for "latent"
    seeds: tuple[int, ...]  # one per image; empty if the caller passed latents
    timings: Mapping[str, float]  # seconds: each graph that ran, and "total"
    device: str  # where the graphs ran: "cpu", "openvino", "cuda", "cuda:1"
    precision: Precision | None  # of OpenVINO; None on other devices, or if provider options determine it
    steps: int
    memory: Mode  # the mode in which the decoder ran; after running out of memory, the last one
    vae: str  # the kind of image decoder, one of bundle.VAE_KINDS
    tile: tuple[int, int] | None  # (height, width) in pixels, if pictures were decoded in tiles


class Pipeline:
    """A loaded bundle. Calls from several threads at once are safe."""

    bundle: Bundle
    graphs: Graphs
    device: str
    vae: str  # the kind of image decoder that was loaded
    variant: str  # the bundle's graphs that were loaded
    cuda_graphs: bool  # whether `warmup` records kernels
    precision: Precision | None  # as in `Result`
    memory: Memory  # the default of calls

    def __init__(self, bundle: Bundle, placement: Placement, vae: Vae | None = None, memory: Memory = "auto") -> None:
        """Load the graphs of a bundle as placed. `Pipeline.load` finds the bundle and the placement.

        Raises:
            BundleError, DeviceError, OutOfMemoryError, RequestError: as `Pipeline.load`.
        """
        manifest = bundle.manifest
        self.bundle, self.device, self.variant = bundle, str(placement.device), placement.variant
        self.precision, self.cuda_graphs = placement.precision, placement.settings.cuda_graphs
        self.memory = self._check_memory(memory)
        self.vae = manifest.vaes[0] if vae is None else vae
        if self.vae not in manifest.vaes:
            raise RequestError(f"vae: bundle {manifest.name} has {', '.join(manifest.vaes)}, got {shorten(vae)}")
        if SAFETY_CHECKER in manifest.graphs:
            warnings.warn(
                f"bundle {manifest.name} has a safety checker, which this version of tiue-runtime does not run: "
                "pictures are not checked",
                stacklevel=3,
            )
        self._tokenizer = PromptTokenizer(bundle.tokenizer_path, manifest.text_length)
        self.graphs = Graphs(bundle, placement, self.vae, memory)

    @classmethod
    @document(LoadOptions)
    def load(
        cls, bundle: str | Path | None = None, *, memory: Memory = "auto", **options: Unpack[LoadOptions]
    ) -> "Pipeline":
        """Find, validate and load a bundle.

        Args:
            bundle: a directory, or the name of an installed or pulled bundle. None takes the environment variable
                TIUE_BUNDLE if it is set, else the installed "emoji".
            memory: the default of calls. With "low", nothing is loaded now. Each call then loads each graph for its
                turn, and errors of a graph show only then.
            **options: the options of LoadOptions:
                {options}

        The device "auto" is the first of CUDA, OpenVINO and the CPU on which a session really starts. Devices that run
        none of the bundle's variants are skipped. OpenVINO is also skipped if the CPU has no bf16 instructions and the
        bundle has a "cpu" variant. provider_options need a device by name.

        With cuda_graphs, `warmup` records the kernels of a shape. Later calls of that shape launch all kernels at once,
        and requests run one at a time. TensorRT compiles for minutes. The results are kept in the user's cache
        directory, or in the directory that the environment variable TIUE_CACHE names.

        Raises:
            BundleError: there is no such bundle, it is damaged, or TIUE_KEY demands a signature that it lacks.
            DeviceError: the device or a setting is not available.
            OutOfMemoryError: the graphs do not fit into memory.
            RequestError: vae or memory is wrong, or an option is of another type.
        """
        given = complete(LoadOptions, options)
        vae = given.pop("vae")
        try:
            found = Bundle.load(find_bundle(bundle))
            trust = demanded_trust()
            if trust:
                check_signature(found, trust)
            return cls(found, place(variants=found.manifest.variants, **given), vae, memory)
        except (MemoryError, RuntimeError) as error:  # RuntimeError: no thread can be started.
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError('the bundle does not fit into memory: load with memory="low"') from error

    def warmup(self, **options: Unpack[RequestOptions]) -> None:
        """Make a picture and discard it, so that the next one of the same options is as quick as later ones.

        With cuda_graphs, the shapes of this call are recorded. Calls with the same number of pictures, size, steps and
        memory mode replay the recording. All other calls run without one. Nothing else in this process may use the GPU
        during the recording. With TensorRT, engines are built for all shapes between the smallest and the largest seen.

        Args:
            **options: as in `__call__`.

        Raises:
            RequestError, Cancelled, InferenceError: as `__call__`.
        """
        recording = self.graphs.cuda_graphs
        with recording.recording() if recording else nullcontext():
            self("", output_type="np", **{"seed": 0, **options})

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        output_type: Literal["pil"] = "pil",
        **options: Unpack[RequestOptions],
    ) -> Result[list[Image]]: ...

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        output_type: Literal["np", "latent"],
        **options: Unpack[RequestOptions],
    ) -> Result[Float32]: ...

    @document(RequestOptions)
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        output_type: OutputType = "pil",
        **options: Unpack[RequestOptions],
    ) -> Result[list[Image]] | Result[Float32]:
        """Make pictures of a prompt.

        Args:
            prompt: a string or a list of strings. The part that exceeds the bundle's text length is cut, with a
                warning.
            output_type: "pil"; "np", float32 (B, H, W, 3) in [0, 1]; or "latent", z_0 float32 (B, C, h, w).
            **options: the options of RequestOptions:
                {options}

        All memory modes make the same pictures. If a mode runs out of memory, the next one follows, with a warning.
        Pictures decoded in tiles differ from pictures decoded whole, because group norms see one tile at a time.

        Returns:
            The pictures, prompt-major, and how they were made.

        Raises:
            RequestError: an argument is wrong, or the request would exceed the free memory by far.
            Cancelled: `cancel` or `timeout` ended the request.
            InferenceError: a graph failed. OutOfMemoryError is a subclass.
        """
        given = complete(RequestOptions, options)
        run = Run(given["cancel"], given["callback"], given["timeout"])
        memory = given["memory"] = self._check_memory(given["memory"] or self.memory)
        manifest, graphs = self.bundle.manifest, self.graphs
        try:
            # The width of text embeddings is looked up late: it may load the text encoder.
            request = Request.make(manifest, graphs.budget, lambda: graphs.text_width, prompt, output_type, given)
            images, mode, tile = self._make(request, output_type, run)
        except (OutOfMemoryError, MemoryError, RuntimeError) as error:  # RuntimeError: no thread can be started.
            if not is_out_of_memory(error):
                raise
            low = [] if memory == "low" or self.cuda_graphs else ['with memory="low"']
            tiles = ["allow `vae_tiling`"] if given["vae_tiling"] is False else []
            remedies = ["make smaller pictures", "fewer at once", *low, *tiles]
            raise graphs.out_of_memory(error, *remedies) from error
        run.timings["total"] = time.perf_counter() - run.begun
        made = self.device, self.precision, request.steps, mode, self.vae, tile
        return Result(images, request.seeds, run.timings, *made)

    def _make(self, request: Request, output_type: OutputType, run: Run) -> tuple[Any, Mode, tuple[int, int] | None]:
        """Go the way from noise to pictures. Returns the pictures, and `memory` and `tile` as in Result."""
        manifest = self.bundle.manifest
        z_T = request.noise(run)
        with self.graphs.request(run, low=request.memory == "low") as turns:
            text = self._encode_text(request, turns)
            ladder = Ladder(self._first_mode(request), request.steps)
            halves = Halves(turns, request.steps, decoded=output_type != "latent")
            z_0 = denoise(halves, manifest, z_T, text, ladder, run)
            if output_type == "latent":
                return z_0, ladder.mode, None
            image, tile = decode_image(turns, manifest, z_0, request.vae_tiling)
        unit = to_unit(image)
        return to_pil(unit) if output_type == "pil" else unit, ladder.mode, tile

    def _check_memory(self, memory: Memory) -> Memory:
        """Return `memory` if this pipeline can take it. Raises RequestError."""
        one_of("memory", memory, get_args(Memory))
        if memory == "low" and self.cuda_graphs:
            raise RequestError('cuda_graphs: recordings hold the memory that memory="low" frees; choose one of them')
        return memory

    def _first_mode(self, request: Request) -> Mode:
        """Return the mode to begin with: the requested one, or the first that fits into free memory."""
        if request.memory == "auto":
            count, _, height, width = request.shape
            return self.graphs.budget.fastest_mode(UNET_DECODER, request.steps, count, height * width)
        return "sequential" if request.memory == "low" else request.memory

    def _encode_text(self, request: Request, turns: Turns) -> Float32:
        """Return text embeddings (B, L, D). Each prompt is encoded once and repeated for its images."""
        if request.prompts is None:
            text = cast(Float32, request.prompt_embeds)
        else:
            tokens, length = self._tokenizer(request.prompts), self.bundle.manifest.text_length
            for cut in filter(None, tokens.cut):
                warnings.warn(f"prompt longer than {length} tokens; this part was cut off: {clip(cut)!r}", stacklevel=4)
            graph = self.graphs.text_encoder
            feed = {INPUT_IDS: tokens.input_ids, ATTENTION_MASK: tokens.attention_mask}
            text = cast(Float32, turns(TEXT_ENCODER, graph, feed)[TEXT])
            shape = (len(request.prompts), length, text.shape[-1])
            graph.check_output(TEXT, text, shape, self.graphs.overflow_remedy())
        return np.repeat(text, request.num_images, axis=0)
