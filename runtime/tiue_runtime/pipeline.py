"""From a prompt to pictures: four graphs, run once each (the decoder at all timesteps in one batch).

prompt -> text_encoder -> text;  z_T, text -> unet_encoder -> features
features, text -> unet_decoder at t_1 .. t_N -> contribution;  z_0 = w_0 z_T + contribution
z_0 / scaling + shift -> vae_decoder -> image
"""

import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Generic, Literal, Protocol, TypedDict, TypeVar, Unpack, cast, overload

import numpy as np
from PIL.Image import Image

from . import bundle as contract
from .bundle import Bundle
from .errors import Cancelled, RequestError
from .find import find_bundle
from .graph import Graph
from .images import to_pil, to_unit
from .request import Float32, Memory, OutputType, Request
from .sessions import Device, choose_device
from .text import PromptTokenizer

Images = TypeVar("Images")
Callback = Callable[[int, int, Float32], object]


class Flag(Protocol):
    """Something like threading.Event."""

    def is_set(self) -> bool:
        """Whether to stop."""
        ...


Cancel = Flag | Callable[[], bool]


@dataclass(frozen=True)
class Result(Generic[Images]):
    """What a request made, in prompt-major order."""

    images: Images  # list of PIL images; float32 (B,H,W,3) in [0,1] for "np"; z_0 float32 (B,C,h,w) for "latent"
    seeds: tuple[int, ...]  # one per image; empty when the caller brought the latents
    timings: Mapping[str, float]  # seconds: each graph that ran, and "total"
    device: str  # where the graphs ran: "cpu", "cuda", "cuda:1"
    steps: int
    memory: Literal["parallel", "sequential"]


class Options(TypedDict, total=False):
    """Keyword arguments of `Pipeline.__call__` other than output_type, for type checkers."""

    num_images: int
    seed: int | None
    steps: int | None
    height: int | None
    width: int | None
    latents: Any
    prompt_embeds: Any
    memory: Memory
    callback: Callback | None
    cancel: Cancel | None


class Pipeline:
    """A loaded bundle. Calls from several threads at once are safe: nothing changes after loading."""

    bundle: Bundle
    device: str

    def __init__(self, bundle: Bundle, device: Device) -> None:
        """Load every graph of `bundle` on `device`; `Pipeline.load` finds both."""
        manifest = bundle.manifest
        self.bundle = bundle
        self.device = str(device)
        variant = device.kind if device.kind in manifest.variants else contract.PORTABLE
        self._tokenizer = PromptTokenizer(bundle.tokenizer_path, manifest.text_length)
        graphs = {name: Graph(bundle.graph_path(name, variant), device) for name in contract.GRAPHS}
        self._text_encoder, self._unet_encoder, self._unet_decoder, self._vae_decoder = graphs.values()
        self._check_graphs()

    @classmethod
    def load(cls, bundle: str | Path | None = None, *, device: str = "auto") -> "Pipeline":
        """Find, validate and load a bundle.

        bundle: a directory, the name of an installed bundle, or None for the environment variable
            TIUE_BUNDLE, else the installed "emoji".
        device: "auto" (CUDA if it really works, else the CPU), "cpu", "cuda" or "cuda:N". A device asked
            for by name is never replaced by another.
        Raises BundleError, DeviceError.
        """
        found = Bundle.load(find_bundle(bundle))
        return cls(found, choose_device(device))

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
        memory: Memory = "auto",
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
        memory: "parallel" runs the decoder at all steps in one batch; "sequential" runs it step by step, in
            about 1/steps of the memory; "auto" is parallel unless there is a callback to show previews to.
        callback: called as callback(step, steps, preview) after each decoder run. preview is the z_0
            (B,C,h,w) that would result if the noise predicted last were right for all steps left; after the
            last step it is z_0. In parallel mode there is one call, with step == steps.
        cancel: a threading.Event or a function returning bool, asked between graphs and steps.

        Raises RequestError for a wrong argument, Cancelled, InferenceError.
        """
        start = time.perf_counter()
        run = _Run(cancel)
        request = Request.make(
            self.bundle.manifest,
            self._text_width(),
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
            previews=callback is not None,
        )
        text = self._encode_text(request, run)
        z_0 = self._denoise(request, text, run, callback)
        images: Any = z_0
        if output_type != "latent":
            unit = to_unit(self._decode(z_0, run))
            images = to_pil(unit) if output_type == "pil" else unit
        run.timings["total"] = time.perf_counter() - start
        mode = "sequential" if request.sequential else "parallel"
        return Result(images, request.seeds, run.timings, self.device, request.steps, mode)

    def _encode_text(self, request: Request, run: "_Run") -> Float32:
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
                text = cast(Float32, self._text_encoder(feed)[contract.TEXT])
        return np.repeat(text, request.num_images, axis=0)

    def _denoise(self, request: Request, text: Float32, run: "_Run", callback: Callback | None) -> Float32:
        """z_T => z_0, both float32 (B,C,h,w)."""
        manifest = self.bundle.manifest
        schedule = manifest.schedules[request.steps]
        rows = np.array(manifest.step_rows(request.steps), dtype=np.int64)
        weights = np.array(schedule.step_weights, dtype=np.float32)
        known = {contract.LATENTS: request.latents, contract.TEXT: text}
        with run.timed(contract.UNET_ENCODER):
            features = self._unet_encoder(known, keep_on_device=True)
        z = np.float32(schedule.noise_weight) * request.latents
        feed = {**known, **features}

        def decode(step_index: Any, step_weight: Any) -> Float32:
            feed.update({contract.STEP_INDEX: step_index, contract.STEP_WEIGHT: step_weight})
            with run.timed(contract.UNET_DECODER):
                contribution = self._unet_decoder(feed)[contract.CONTRIBUTION]
            self._unet_decoder.check_output(contract.CONTRIBUTION, contribution, z.shape)
            return contribution

        if not request.sequential:
            z = z + decode(rows, weights)
            if callback is not None:
                callback(request.steps, request.steps, z.copy())
            return z
        for i in range(request.steps):
            eps = decode(rows[i : i + 1], np.ones(1, dtype=np.float32))
            if callback is not None:
                # The noise predicted at this step stands in for that of the steps to come.
                callback(i + 1, request.steps, z + weights[i:].sum() * eps)
            z = z + weights[i] * eps
        return z

    def _decode(self, z_0: Float32, run: "_Run") -> Float32:
        """z_0 (B,C,h,w) => image float32 (B,3,H,W) in [-1,1]."""
        manifest = self.bundle.manifest
        scale, shift = np.float32(manifest.vae_scaling_factor), np.float32(manifest.vae_shift_factor)
        with run.timed(contract.VAE_DECODER):
            image = self._vae_decoder({contract.LATENTS: z_0 / scale + shift})[contract.IMAGE]
        height, width = (size * manifest.pixels_per_latent for size in z_0.shape[2:])
        self._vae_decoder.check_output(contract.IMAGE, image, (len(z_0), 3, height, width))
        return image

    def _text_width(self) -> int | None:
        shape = self._unet_encoder.inputs.get(contract.TEXT) or self._unet_decoder.inputs.get(contract.TEXT)
        width = shape[-1] if shape else None
        return width if isinstance(width, int) else None

    def _check_graphs(self) -> None:
        """Compare the graphs' inputs and outputs with the contract. Raises BundleError."""
        features = self._unet_encoder.outputs
        given = {contract.LATENTS, contract.TEXT}
        steps = {contract.STEP_INDEX, contract.STEP_WEIGHT}
        self._text_encoder.expect({contract.INPUT_IDS, contract.ATTENTION_MASK}, {contract.TEXT})
        self._unet_encoder.expect(given, set())
        self._unet_decoder.expect({*features, *given, *steps}, {contract.CONTRIBUTION}, needed=steps)
        self._vae_decoder.expect({contract.LATENTS}, {contract.IMAGE})


class _Run:
    """The clock and the stop sign of one request."""

    def __init__(self, cancel: Cancel | None) -> None:
        self.timings: dict[str, float] = {}
        self._asked: object = getattr(cancel, "is_set", cancel)
        if cancel is not None and not callable(self._asked):
            raise RequestError(f"cancel: expected a threading.Event or a function, got {cancel!r}")

    @contextmanager
    def timed(self, graph: str) -> Generator[None]:
        """Add the time spent inside to timings[graph], unless the caller wants to stop. Raises Cancelled."""
        if callable(self._asked) and self._asked():
            raise Cancelled(f"cancelled before {graph}")
        start = time.perf_counter()
        yield
        self.timings[graph] = self.timings.get(graph, 0.0) + time.perf_counter() - start


def generate(
    prompt: str | Sequence[str],
    *,
    bundle: str | Path | None = None,
    device: str = "auto",
    **options: Unpack[Options],
) -> list[Image]:
    """Make pictures of a prompt with a pipeline that stays loaded; options are those of `Pipeline.__call__`.

    Raises BundleError, DeviceError, RequestError.
    """
    with _loading:
        pipeline = _cached_pipeline(str(find_bundle(bundle).resolve()), device)
    return pipeline(prompt, **options).images


_loading = Lock()


@lru_cache(maxsize=2)
def _cached_pipeline(directory: str, device: str) -> Pipeline:
    return Pipeline.load(Path(directory), device=device)
