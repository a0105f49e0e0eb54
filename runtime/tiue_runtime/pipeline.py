"""The public face of the runtime: a loaded bundle that makes pictures.

This module imports neither numpy nor ONNX Runtime, so that a program which may need pictures later starts quickly.
`Pipeline` imports the rest when it loads a bundle.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, get_args, overload

from tiue_runtime.choices import OutputType, Vae
from tiue_runtime.errors import OutOfMemoryError, RequestError, is_out_of_memory, shorten
from tiue_runtime.modes import Memory
from tiue_runtime.options import DecodeOptions, LoadOptions, RequestOptions, complete, document, one_of
from tiue_runtime.result import Result
from tiue_runtime.run import Callback, Cancel, Run

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from tiue_runtime.bundle import Bundle
    from tiue_runtime.choices import Precision
    from tiue_runtime.graphs import Graphs
    from tiue_runtime.ort.placement import Placement
    from tiue_runtime.record import Record
    from tiue_runtime.sampler import Sampler

    Float32 = NDArray[np.float32]


class Pipeline:
    """A loaded bundle. Calls from several threads at once are safe.

    Use it in a `with` block, or call `close`, to free its memory. Pipelines of the same files and the same options of
    loading share their graphs.
    """

    bundle: Bundle
    device: str
    vae: str  # the kind of image decoder that was loaded
    safety_checker: bool  # whether pictures are checked: the bundle has a safety checker, and it was loaded
    variant: str  # the bundle's graphs that were loaded
    cuda_graphs: bool  # whether `warmup` records kernels
    precision: Precision | None  # as in `Result`
    threads: int | None  # as given to `load`
    memory: Memory  # the default of calls

    def __init__(
        self,
        bundle: Bundle,
        placement: Placement,
        vae: Vae | None = None,
        memory: Memory = "auto",
        *,
        safety_checker: bool = True,
    ) -> None:
        """Load the graphs of a bundle as placed. `Pipeline.load` finds the bundle and the placement.

        Raises:
            BundleError, DeviceError, OutOfMemoryError, RequestError: as `Pipeline.load`.
        """
        from tiue_runtime.graphs import shared_graphs
        from tiue_runtime.sampler import Sampler

        manifest = bundle.manifest
        self.bundle, self.device, self.variant = bundle, str(placement.device), placement.variant
        self.precision, self.cuda_graphs = placement.precision, placement.settings.cuda_graphs
        self.threads = placement.settings.threads
        self.memory = self._check_memory(memory)
        self.vae = manifest.vaes[0] if vae is None else vae
        if self.vae not in manifest.vaes:
            raise RequestError(f"vae: bundle {manifest.name} has {', '.join(manifest.vaes)}, got {shorten(vae)}")
        self.safety_checker = safety_checker and manifest.safety_checker is not None
        graphs = shared_graphs(bundle, placement, self.vae, memory, safety=self.safety_checker)
        self._sampler: Sampler | None = Sampler(bundle, graphs)

    @classmethod
    @document(LoadOptions)
    def load(
        cls, bundle: str | Path | None = None, *, memory: Memory = "auto", **options: Unpack[LoadOptions]
    ) -> Pipeline:
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
        from tiue_runtime.bundle import Bundle
        from tiue_runtime.bundle.find import find_bundle
        from tiue_runtime.hub.signature import check_signature, demanded_trust
        from tiue_runtime.ort.placement import place

        given = complete(LoadOptions, options)
        vae, safety_checker = given.pop("vae"), given.pop("safety_checker")
        try:
            found = Bundle.load(find_bundle(bundle))
            trust = demanded_trust()
            if trust:
                check_signature(found, trust)
            placement = place(variants=found.manifest.variants, **given)
            return cls(found, placement, vae, memory, safety_checker=safety_checker)
        except (MemoryError, RuntimeError) as error:  # RuntimeError: no thread can be started.
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError('the bundle does not fit into memory: load with memory="low"') from error

    def __enter__(self) -> Self:
        """Return this pipeline. The end of the `with` block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Free the graphs and their memory. Requests that run end first, on their threads. Later calls are refused.

        Graphs that another pipeline shares stay loaded for it.
        """
        self._sampler = None

    def __repr__(self) -> str:
        """Name the bundle, and where and how it runs."""
        state = "" if self._sampler else ", closed"
        return f"<Pipeline {self.bundle.manifest.name}, {self.device}, {self.variant} graphs, vae {self.vae}{state}>"

    @property
    def graphs(self) -> Graphs:
        """The graphs. Raises RequestError if this pipeline is closed."""
        return self._open().graphs

    def _open(self) -> Sampler:
        if self._sampler is None:
            raise RequestError("this pipeline is closed: load the bundle again with Pipeline.load")
        return self._sampler

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
        prompt = "" if options.get("prompt_embeds") is None else None
        with recording.recording() if recording else nullcontext():
            self(prompt, output_type="np", **{"seed": 0, **options})

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
            prompt: a string or a list of strings. If the bundle has styles and the prompt names none, the seed adds
                one. The part that exceeds the bundle's text length is cut, with a warning.
            output_type: "pil"; "np", float32 (B, H, W, 3) in [0, 1]; or "latent", z_0 float32 (B, C, h, w).
            **options: the options of RequestOptions:
                {options}

        All memory modes make the same pictures. If a mode runs out of memory, the next one follows, with a warning.
        Pictures decoded in tiles differ from pictures decoded whole, because group norms see one tile at a time.
        Pictures that the bundle's safety checker flags are blurred, and `Result.flagged` tells which. Latents and quick
        previews are not checked.

        Returns:
            The pictures, prompt-major, and how they were made.

        Raises:
            RequestError: an argument is wrong, or the request would exceed the free memory by far.
            Cancelled: `cancel` or `timeout` ended the request.
            InferenceError: a graph failed. OutOfMemoryError is a subclass.
        """
        from tiue_runtime.images import attach
        from tiue_runtime.record import records_of
        from tiue_runtime.request import Request

        given = complete(RequestOptions, options)
        run = Run(given["cancel"], given["callback"], given["timeout"])
        memory = given["memory"] = self._check_memory(given["memory"] or self.memory)
        sampler = self._open()
        graphs = sampler.graphs
        with self._remedies(sampler, run, low=memory == "low", tiles=given["vae_tiling"] is not False):
            # The width of text embeddings is looked up late: it may load the text encoder.
            width = lambda: graphs.text_width  # noqa: E731
            request = Request.make(self.bundle.manifest, graphs.budget, width, prompt, output_type, given)
            decoding = {"memory": memory, "vae_tiling": request.vae_tiling, "cancel": run.cancelled}
            exact = partial(self._decode, sampler, "pil", complete(DecodeOptions, decoding))
            sampled = sampler.sample(request, output_type, run, exact)
            records = records_of(self, request, sampled)
            if output_type == "pil":
                attach(sampled.images, records)
        run.timings["total"] = time.perf_counter() - run.begun
        how = self.device, self.precision, request.steps, sampled.memory, self.vae, sampled.tile
        made = records, request.upscale, sampled.flagged
        return Result(sampled.images, request.seeds, run.timings, *how, *made)

    def repeat(
        self,
        source: str | Path | Record,
        *,
        callback: Callback | None = None,
        cancel: Cancel | None = None,
        timeout: float | None = None,
    ) -> Result[list[Image]]:
        """Make a picture again from its file: bit for bit on the same machine with the same versions.

        If the pixels differ from those of the record, a warning says what else differs. `repeating.load_for` loads the
        bundle of a record with its options.

        Args:
            source: a PNG, JPEG or WebP file that holds its record, or the record itself.
            callback: as in `__call__`.
            cancel: as in `__call__`.
            timeout: as in `__call__`, for each of at most two runs.

        Returns:
            One picture.

        Raises:
            RequestError: the file holds no record, or this pipeline cannot make the picture. The message says why.
            Cancelled, InferenceError: as `__call__`.
        """
        from tiue_runtime.repeating import repeat

        return repeat(self, source, callback=callback, cancel=cancel, timeout=timeout)

    async def agenerate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        output_type: OutputType = "pil",
        **options: Unpack[RequestOptions],
    ) -> Result[Any]:
        """Make pictures without blocking an event loop. Cancelling the task cancels the request.

        `tiue_runtime.aio` also has `stream`, which yields each Progress on the way.

        Args:
            prompt: as in `__call__`.
            output_type: as in `__call__`.
            **options: as in `__call__`. callback and cancel are called on another thread.

        Raises:
            RequestError, Cancelled, InferenceError: as `__call__`.
        """
        from tiue_runtime.aio import agenerate

        return await agenerate(self, prompt, output_type=output_type, **options)

    def encode(
        self,
        prompt: str | Sequence[str],
        *,
        memory: Memory | None = None,
        timeout: float | None = None,
        cancel: Cancel | None = None,
    ) -> Float32:
        """Encode prompts, for example to mix them. Pass the result to a call as `prompt_embeds`.

        Args:
            prompt: a string or a list of strings.
            memory: as in `__call__`. Only "low" matters: the text encoder is then freed afterwards.
            timeout: as in `__call__`.
            cancel: as in `__call__`.

        Returns:
            Text embeddings, float32 (B, L, D), one row per prompt.

        Raises:
            RequestError, Cancelled, InferenceError: as `__call__`.
        """
        from tiue_runtime.request import check_prompts

        given = complete(RequestOptions, {"memory": memory, "timeout": timeout, "cancel": cancel})
        run, sampler = Run(given["cancel"], None, given["timeout"]), self._open()
        low = self._check_memory(given["memory"] or self.memory) == "low"
        with self._remedies(sampler, run, low=low):
            return sampler.encode(check_prompts(prompt), run, low=low)

    @overload
    def decode(
        self, latents: Any, *, output_type: Literal["pil"] = "pil", **options: Unpack[DecodeOptions]
    ) -> list[Image]: ...

    @overload
    def decode(self, latents: Any, *, output_type: Literal["np"], **options: Unpack[DecodeOptions]) -> Float32: ...

    def decode(
        self, latents: Any, *, output_type: Literal["pil", "np"] = "pil", **options: Unpack[DecodeOptions]
    ) -> list[Image] | Float32:
        """Turn latents into pictures, for example those of `output_type="latent"` or `Progress.latents`.

        Args:
            latents: z_0, floats (B, C, h, w).
            output_type: "pil", or "np" for float32 (B, H, W, 3) in [0, 1].
            **options: upscale, memory, vae_tiling, timeout, callback and cancel, as in `__call__`.

        Returns:
            The pictures. Those that the safety checker flags are blurred.

        Raises:
            RequestError, Cancelled, InferenceError: as `__call__`.
        """
        given = complete(DecodeOptions, options)
        one_of("output_type", output_type, ("pil", "np"))
        return self._decode(self._open(), output_type, given, latents)

    def _decode(
        self, sampler: Sampler, output_type: Literal["pil", "np"], given: Mapping[str, Any], latents: Any
    ) -> Any:
        """Decode with complete DecodeOptions, also for a request that runs while this pipeline is closed."""
        from tiue_runtime.request import check_latents, check_upscale

        run = Run(given["cancel"], given["callback"], given["timeout"])
        low, tiling = self._check_memory(given["memory"] or self.memory) == "low", given["vae_tiling"]
        with self._remedies(sampler, run, low=low, tiles=tiling is not False):
            upscale = check_upscale(given["upscale"], self.bundle.manifest)
            graphs = sampler.graphs
            checked = check_latents(latents, self.bundle.manifest, graphs.budget, graphs.vae_name, tiling, upscale)
            return sampler.decode(checked, output_type, tiling, upscale, run, low=low)

    @contextmanager
    def _remedies(self, sampler: Sampler, run: Run, *, low: bool, tiles: bool = True) -> Generator[None]:
        """Add remedies to the error if memory runs out. Errors of the callback pass unchanged."""
        try:
            yield
        except (OutOfMemoryError, MemoryError, RuntimeError) as error:  # RuntimeError: no thread can be started.
            if error is run.raised or not is_out_of_memory(error):
                raise
            loading = [] if low or self.cuda_graphs else ['with memory="low"']
            tiling = [] if tiles else ["allow `vae_tiling`"]
            remedies = ["make smaller pictures", "fewer at once", *loading, *tiling]
            raise sampler.graphs.out_of_memory(error, *remedies) from error
        finally:
            run.end()

    def _check_memory(self, memory: Memory) -> Memory:
        """Return `memory` if this pipeline can take it. Raises RequestError."""
        one_of("memory", memory, get_args(Memory))
        if memory == "low" and self.cuda_graphs:
            raise RequestError('cuda_graphs: recordings hold the memory that memory="low" frees; choose one of them')
        return memory
