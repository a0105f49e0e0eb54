"""From a prompt to pictures: four graphs, run once each (the decoder at all timesteps in one batch).

Where memory is short, the decoder runs at fewer timesteps at once, and the image decoder on parts of the pictures.

prompt -> text_encoder -> text;  z_T, text -> unet_encoder -> features
features, text -> unet_decoder at t_1 .. t_N -> contribution;  z_0 = w_0 z_T + contribution
z_0 / scaling + shift -> vae_decoder -> image
"""

import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypedDict, TypeVar, Unpack, cast, overload

import numpy as np
from PIL.Image import Image

from tiue_runtime import bundle as contract
from tiue_runtime.budget import Budget
from tiue_runtime.bundle import Bundle
from tiue_runtime.bundle.find import find_bundle
from tiue_runtime.decode import ImageDecoder
from tiue_runtime.errors import LoadingError, OutOfMemoryError, RequestError, shorten
from tiue_runtime.images import to_pil, to_unit
from tiue_runtime.modes import Mode, lower_mode, timesteps_at_once
from tiue_runtime.ort.cuda_graphs import CudaGraphs
from tiue_runtime.ort.devices import KINDS, Device, Precision, Settings
from tiue_runtime.ort.engines import with_cache
from tiue_runtime.ort.graph import Graph
from tiue_runtime.ort.interrupt import for_each
from tiue_runtime.ort.placement import check_settings, choose_device, choose_variant, settle_precision
from tiue_runtime.ort.sessions import first_line
from tiue_runtime.request import Float32, Memory, OutputType, Request, check_memory
from tiue_runtime.run import Cancel, Run
from tiue_runtime.tokenizer import PromptTokenizer

Images = TypeVar("Images")
Callback = Callable[[int, int, Float32], object]
Vae = Literal["kl", "tiny"]  # bundle.VAE_KINDS

_LOAD_TINY = 'load with vae="tiny"'


@dataclass(frozen=True)
class Result(Generic[Images]):
    """What a request made, in prompt-major order."""

    images: Images  # list of PIL images; float32 (B,H,W,3) in [0,1] for "np"; z_0 float32 (B,C,h,w) for "latent"
    seeds: tuple[int, ...]  # one per image; empty when the caller brought the latents
    timings: Mapping[str, float]  # seconds: each graph that ran, and "total"
    device: str  # where the graphs ran: "cpu", "openvino", "cuda", "cuda:1"
    precision: Precision | None  # what OpenVINO computed in; None on other devices, and where provider options say it
    steps: int
    memory: Mode  # the one the decoder really ran in; after running out of memory, the one it ended in
    vae: str  # the kind of image decoder, one of bundle.VAE_KINDS
    tile: tuple[int, int] | None  # (height, width) in pixels, if pictures were decoded in tiles


class Options(TypedDict, total=False):
    """Keyword arguments of `Pipeline.__call__` other than output_type, for type checkers."""

    num_images: int
    seed: int | None
    steps: int | None
    height: int | None
    width: int | None
    latents: Any
    prompt_embeds: Any
    memory: Memory | None
    vae_tiling: bool | None
    callback: Callback | None
    cancel: Cancel | None


class Pipeline:
    """A loaded bundle. Calls from several threads at once are safe: only what memory sufficed for is remembered."""

    bundle: Bundle
    device: str
    vae: str  # the kind of image decoder that was loaded
    variant: str  # the bundle's graphs that were loaded
    cuda_graphs: bool  # whether `warmup` records kernels
    precision: Precision | None  # as in `Result`
    memory: Memory  # for calls that do not say

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        vae: Vae | None = None,
        variant: str | None = None,
        settings: Settings | None = None,
        memory: Memory = "auto",
    ) -> None:
        """Load the graphs of `bundle` on `device`; `Pipeline.load` finds both."""
        settings = settings or Settings()
        check_memory(memory, cuda_graphs=settings.cuda_graphs)
        self.memory = memory
        check_settings(device, settings)
        settings = settle_precision(device, settings)
        self.precision = settings.precision
        manifest = bundle.manifest
        self.bundle = bundle
        self.device = str(device)
        self.vae = next(iter(manifest.vaes)) if vae is None else vae
        if self.vae not in tuple(manifest.vaes):
            raise RequestError(f"vae: bundle {manifest.name} has {', '.join(manifest.vaes)}, got {shorten(vae)}")
        self.variant = choose_variant(device, manifest.variants, variant)
        self._budget = Budget(manifest, self.variant, device)
        self.cuda_graphs = settings.cuda_graphs
        self._cuda_graphs = CudaGraphs() if settings.cuda_graphs else None
        self._tokenizer = PromptTokenizer(bundle.tokenizer_path, manifest.text_length)

        now = memory != "low" and device.kind != "cpu"  # there, two at a time

        def graph(name: str, check: Callable[[Graph], object]) -> Graph:
            path = bundle.graph_path(name, self.variant)
            chosen, recording = with_cache(settings, device, bundle.directory, path), self._cuda_graphs
            # A text encoder makes its mask by arithmetic that ONNX Runtime may leave on the CPU, which excludes
            # recording.
            if name == contract.TEXT_ENCODER:
                chosen, recording = replace(chosen, cuda_graphs=False), None
            with self._loading():
                return Graph(path, device, chosen, recording, check=check, load=now)

        given = {contract.LATENTS, contract.TEXT}
        steps = {contract.STEP_INDEX, contract.STEP_WEIGHT}
        self._text_encoder = graph(
            contract.TEXT_ENCODER, lambda g: g.expect({contract.INPUT_IDS, contract.ATTENTION_MASK}, {contract.TEXT})
        )
        # A check that held the pipeline would make a cycle of it, which keeps its memory when nobody holds it any more.
        encoder = self._unet_encoder = graph(contract.UNET_ENCODER, lambda g: g.expect(given, set()))
        self._unet_decoder = graph(
            contract.UNET_DECODER,
            lambda g: g.expect({*given, *steps}, {contract.CONTRIBUTION}, needed=steps, features=encoder.outputs),
        )
        vae_decoder = graph(manifest.vaes[self.vae], lambda g: g.expect({contract.LATENTS}, {contract.IMAGE}))
        remedy = self._overflow_remedy(vae=True)
        self._decode_image = ImageDecoder(vae_decoder, manifest.vaes[self.vae], manifest, self._budget, remedy)
        if memory != "low":
            with self._loading():
                self._load_graphs()

    @classmethod
    def load(
        cls,
        bundle: str | Path | None = None,
        *,
        device: str = "auto",
        vae: Vae | None = None,
        variant: str | None = None,
        cuda_graphs: bool = False,
        provider_options: Mapping[str, object] | None = None,
        precision: Precision | None = None,
        threads: int | None = None,
        memory: Memory = "auto",
    ) -> "Pipeline":
        """Find, validate and load a bundle.

        bundle: a directory, the name of an installed bundle, or None for the environment variable
            TIUE_BUNDLE, else the installed "emoji".
        device: "auto", "cpu", "openvino", "cuda", "tensorrt", "tensorrt-rtx", or the second GPU as "cuda:1" and so on.
            "auto" is CUDA if it really works, else OpenVINO likewise, else the CPU: of those that run one of the
            bundle's variants, or the one asked for, and OpenVINO only if the CPU multiplies in bf16 or no "cpu" variant
            is among them. A device asked for by name is never replaced by another. What TensorRT compiles, in minutes,
            is kept in the user's cache directory, or in that of the environment variable TIUE_CACHE.
        vae: the image decoder: "kl", the original AutoencoderKL; "tiny", a small autoencoder, faster and in less
            memory with coarser details; or None for the bundle's default. Only this one is loaded.
        variant: the graphs to load, "portable", "cpu" or "cuda", or None for the best that the bundle has for the
            device.
        cuda_graphs: on "cuda", let `warmup` record the kernels of a shape, which later calls of that shape launch all
            at once. Recorded shapes keep their working memory. Requests are then made one at a time. Where "auto"
            chooses another device, this has no effect.
        provider_options: options of ONNX Runtime's provider for the device, such as {"gpu_mem_limit": 4 * 2**30}, which
            win over those chosen here. They need a device by name.
        precision: what "openvino" computes in on the CPU: "bf16", "fp32", or None for bf16 where the CPU multiplies in
            it, else fp32. The result tells.
        threads: CPU threads of a graph, or None for all CPUs that this process may use, by affinity and by the quota
            of a container. Graphs run one after the other. Idle threads do not spin.
        memory: for calls that do not say. With "low" nothing is loaded now, but each graph in each call, when its turn
            comes, and what is wrong with a graph shows only then.
        Raises BundleError, DeviceError, OutOfMemoryError, and RequestError for a wrong vae or memory.
        """
        found = Bundle.load(find_bundle(bundle))
        settings = Settings(provider_options or {}, cuda_graphs, precision, threads)
        chosen = choose_device(device, settings, found.manifest.variants if variant is None else (variant,))
        if device == "auto" and chosen.kind != "cuda":
            settings = replace(settings, cuda_graphs=False)
        return cls(found, chosen, vae, variant, settings, memory)

    def warmup(
        self,
        *,
        num_images: int = 1,
        steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        memory: Memory | None = None,
        vae_tiling: bool | None = None,
    ) -> None:
        """Make a picture and throw it away, so that the first real one of that size and number is as quick as others.

        With cuda_graphs, its shapes are recorded: calls with as many pictures of the same size, steps and memory mode
        replay them, all others run as without. Nothing else in this process may use the GPU meanwhile.
        With TensorRT, engines are built for the shapes between the smallest and the largest seen.

        Raises what `__call__` raises.
        """
        with self._cuda_graphs.recording() if self._cuda_graphs else nullcontext():
            self(
                "",
                num_images=num_images,
                seed=0,
                steps=steps,
                height=height,
                width=width,
                output_type="np",
                memory=memory,
                vae_tiling=vae_tiling,
            )

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        output_type: Literal["pil"] = "pil",
        **options: Unpack[Options],
    ) -> Result[list[Image]]: ...

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        output_type: Literal["np", "latent"],
        **options: Unpack[Options],
    ) -> Result[Float32]: ...

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_images: int = 1,
        seed: int | None = None,
        steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        output_type: OutputType = "pil",
        memory: Memory | None = None,
        vae_tiling: bool | None = None,
        callback: Callback | None = None,
        cancel: Cancel | None = None,
    ) -> Result[list[Image]] | Result[Float32]:
        """Make num_images pictures of each prompt.

        prompt: a string or a list of strings; what exceeds the bundle's text length is cut, with a warning.
        seed: 0 <= seed < 2**64; image j of the request uses seed + j, whatever batch it is made in.
            None draws one, which the result reports.
        steps: one of the bundle's step counts.
        height, width: pixels, multiples of the bundle's size_multiple.
        latents: z_T, floats (B,C,h,w). No noise is drawn then, so seed has no effect, and the picture's size is theirs.
        prompt_embeds: floats (B / num_images, L, D), instead of prompt.
        output_type: "pil"; "np", float32 (B,H,W,3) in [0,1]; or "latent", z_0 float32 (B,C,h,w).
        memory: "parallel" runs the decoder at all steps in one batch; "partial" at two at once; "sequential" step by
            step, in about 1/steps of the memory; "auto" is sequential if there is a callback to show previews to,
            else the first of the three that fits into the free memory by the bundle's estimate. A mode that runs out
            of memory is followed by the next, with a warning; the pictures are the same. "low" is sequential and holds
            each graph for its turn alone, to be loaded again for the next picture. None: as the pipeline was loaded.
        vae_tiling: whether pictures larger than the bundle's default are decoded in overlapping tiles, in less memory.
            They differ from those decoded whole, because group norms see one tile at a time. None does so,
            with a warning, where memory does not suffice otherwise.
        callback: in sequential mode called as callback(step, steps, preview) after each step. preview is the z_0
            (B,C,h,w) that would result if the noise predicted last were right for all steps left; after the
            last step it is z_0. In the other modes there is one call, with step == steps.
        cancel: a threading.Event or a function returning bool, asked between graphs, steps and tiles.

        Raises RequestError for a wrong argument, Cancelled, InferenceError, and of its kind OutOfMemoryError.
        """
        start = time.perf_counter()
        run = Run(cancel)
        memory = self.memory if memory is None else memory
        check_memory(memory, cuda_graphs=self.cuda_graphs)
        try:
            request = Request.make(
                self.bundle.manifest,
                None if prompt_embeds is None else self._text_width(),
                prompt,
                num_images=num_images,
                seed=seed,
                steps=steps,
                height=height,
                width=width,
                latents=latents,
                prompt_embeds=prompt_embeds,
                output_type=output_type,
                memory=memory,
                vae_tiling=vae_tiling,
                callback=callback,
            )
            if memory == "low":
                first = self._text_encoder if request.prompts is not None else self._unet_encoder
                self._unload(*(graph for graph in self._graphs() if graph is not first))
            else:
                self._load_graphs()  # before free memory is looked up, if a call with "low" let go of them
            with self._budget.request(), self._cuda_graphs.turn() if self._cuda_graphs else nullcontext():
                text = self._encode_text(request, run)
                z_0, mode = self._denoise(request, text, run, callback, decoded=output_type != "latent")
                images: Any = z_0
                tile = None
                if output_type != "latent":
                    image, tile = self._decode_image(z_0, request.vae_tiling, run)
                    self._used(self._decode_image.graph, request)
                    unit = to_unit(image)
                    images = to_pil(unit) if output_type == "pil" else unit
        except (OutOfMemoryError, MemoryError) as error:
            low = [] if memory == "low" or self.cuda_graphs else ['with memory="low"']
            tiles = ["allow vae_tiling"] if vae_tiling is False else []
            remedies = ["make smaller pictures", "fewer at once", *low, *tiles]
            raise self._out_of_memory(error, *remedies) from error
        finally:
            if memory == "low":
                self._unload(*self._graphs())
        run.timings["total"] = time.perf_counter() - start
        return Result(
            images, request.seeds, run.timings, self.device, self.precision, request.steps, mode, self.vae, tile
        )

    def _encode_text(self, request: Request, run: Run) -> Float32:
        """Text embeddings (B,L,D), each prompt encoded once and repeated for its images."""
        if request.prompts is None:
            text = cast(Float32, request.prompt_embeds)
        else:
            tokens = self._tokenizer(request.prompts)
            for cut in filter(None, tokens.cut):
                length = self.bundle.manifest.text_length
                warnings.warn(f"prompt longer than {length} tokens; this part was cut off: {cut!r}", stacklevel=3)
            feed = {contract.INPUT_IDS: tokens.input_ids, contract.ATTENTION_MASK: tokens.attention_mask}
            with run.timed(contract.TEXT_ENCODER):
                text = cast(Float32, self._text_encoder(feed, cancelled=run.cancelled)[contract.TEXT])
            shape = (len(request.prompts), self.bundle.manifest.text_length, text.shape[-1])
            self._text_encoder.check_output(contract.TEXT, text, shape, self._overflow_remedy())
            self._used(self._text_encoder, request)
        return np.repeat(text, request.num_images, axis=0)

    def _denoise(
        self, request: Request, text: Float32, run: Run, callback: Callback | None, *, decoded: bool
    ) -> tuple[Float32, Mode]:
        """z_T => z_0, both float32 (B,C,h,w), and the mode that had memory enough. decoded: whether the VAE follows."""
        manifest = self.bundle.manifest
        steps, schedule = request.steps, manifest.schedules[request.steps]
        rows = np.array(manifest.step_rows(steps), dtype=np.int64)
        weights = np.array(schedule.step_weights, dtype=np.float32)
        with run.timed(contract.UNET_ENCODER):
            known = self._unet_encoder.place({contract.LATENTS: request.latents, contract.TEXT: text})
            features = self._unet_encoder(known, keep_on_device=request.memory != "low", cancelled=run.cancelled)
        self._used(self._unet_encoder, request)
        z = np.float32(schedule.noise_weight) * request.latents
        feed = {**known, **features}
        count, latents = len(z), z.shape[2] * z.shape[3]
        if request.memory == "auto":
            mode = self._budget.fastest_mode(contract.UNET_DECODER, steps, count, latents)
        else:
            mode = "sequential" if request.memory == "low" else request.memory
        i = 0
        while i < steps:
            now = slice(i, i + timesteps_at_once(mode, steps))
            sequential = mode == "sequential"
            feed[contract.STEP_INDEX] = rows[now]
            # A step alone gives its noise unweighted, which previews need.
            feed[contract.STEP_WEIGHT] = np.ones(1, dtype=np.float32) if sequential else weights[now]
            this_run = contract.UNET_DECODER, len(rows[now]) * count, latents
            # What the decoder keeps for the next picture must not drive this one's into tiles.
            release = self._unet_decoder.releases and decoded and now.stop >= steps
            release = release and not self._decode_image.fits_whole(z.shape, this_run)
            try:
                with run.timed(contract.UNET_DECODER):
                    contribution = self._unet_decoder(feed, release=release, cancelled=run.cancelled)[
                        contract.CONTRIBUTION
                    ]
            except LoadingError:
                raise  # in a lower mode, too
            except OutOfMemoryError as error:
                self._budget.released(contract.UNET_DECODER)
                lower = lower_mode(mode, steps)
                if lower is None:
                    raise
                warnings.warn(f"{error} in {mode} mode: going on in {lower} mode", stacklevel=3)
                mode = lower
                continue
            if not np.isfinite(contribution).all():
                self._check_features(features)  # the decoder is not to blame for what it was given
            self._unet_decoder.check_output(contract.CONTRIBUTION, contribution, z.shape, self._overflow_remedy())
            if release:
                self._budget.released(contract.UNET_DECODER)
            elif self._unet_decoder.keeps:
                self._budget.succeeded(*this_run)
            if sequential:
                if callback is not None:
                    # The noise predicted at this step stands in for that of the steps to come.
                    callback(i + 1, steps, z + weights[i:].sum() * contribution)
                contribution = weights[i] * contribution
            z = z + contribution
            i = now.stop
        self._used(self._unet_decoder, request)
        if callback is not None and mode != "sequential":
            callback(steps, steps, z.copy())
        return z, mode

    def _graphs(self) -> tuple[Graph, ...]:
        """All graphs, in the order they run."""
        return self._text_encoder, self._unet_encoder, self._unet_decoder, self._decode_image.graph

    def _load_graphs(self) -> None:
        """Load those that are not loaded: on the CPU two at a time, since to load one is the work of one thread.

        SD 2.1 on 2 cores: 6.4 s, one by one 15.3 s, all four at once 7.6 s, and each graph takes memory meanwhile.
        """
        missing = [graph for graph in self._graphs() if not graph.loaded]
        at_once = KINDS[self._unet_decoder.device.kind].loads_at_once
        for_each(Graph.session, missing, at_once)

    @contextmanager
    def _loading(self) -> Generator[None]:
        """Say what helps if memory does not suffice for all graphs."""
        try:
            yield
        except OutOfMemoryError as error:
            without = " and without cuda_graphs" if self.cuda_graphs else ""
            raise self._out_of_memory(error, f'load with memory="low"{without}') from error

    def _used(self, graph: Graph, request: Request) -> None:
        """Let go of a graph whose turn is over, if the request is to take little memory."""
        if request.memory == "low":
            self._unload(graph)

    def _unload(self, *graphs: Graph) -> None:
        for graph in graphs:
            graph.unload()
        self._budget.released(contract.UNET_DECODER)
        self._budget.released(self.bundle.manifest.vaes[self.vae])

    def _check_features(self, features: Mapping[str, Any]) -> None:
        """Raise InferenceError if features, on the device or not, are not finite."""
        for name, value in features.items():
            array = cast(Float32, value if isinstance(value, np.ndarray) else value.numpy())
            self._unet_encoder.check_output(name, array, array.shape, self._overflow_remedy())

    def _overflow_remedy(self, *, vae: bool = False) -> str:
        """What helps when a graph computes values that are not finite."""
        manifest = self.bundle.manifest
        precision = manifest.created_from.get("precision", "fp32")  # `manifest.precision` is that of the files
        if self.variant == contract.CUDA and contract.PORTABLE in manifest.variants:
            remedy = 'Its cuda graphs overflowed: load with variant="portable"'
        elif precision != "fp32" and self.variant != contract.CPU:  # which computes in fp32 whatever the others do
            remedy = f"{precision} overflowed: export the bundle again with --precision fp32"
        else:
            remedy = "Look for damaged weights with `tiue-runtime verify` and for extreme latents or prompt_embeds"
        return remedy + (f", or {_LOAD_TINY}" if vae and self._tiny_is_left() else "")

    def _out_of_memory(self, error: Exception, *remedies: str) -> OutOfMemoryError:
        """What to raise for an exhausted memory."""
        helps = (*remedies, _LOAD_TINY) if self._tiny_is_left() else remedies
        return OutOfMemoryError(f"{first_line(error)}: {', '.join(helps)}")

    def _tiny_is_left(self) -> bool:
        """Whether the bundle has a smaller image decoder than this one."""
        return contract.TINY in self.bundle.manifest.vaes and self.vae != contract.TINY

    def _text_width(self) -> int | None:
        text = self._unet_encoder.inputs.get(contract.TEXT) or self._unet_decoder.inputs.get(contract.TEXT)
        width = text.shape[-1] if text else None
        return width if isinstance(width, int) else None
