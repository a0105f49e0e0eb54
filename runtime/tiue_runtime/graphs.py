"""The graphs of a pipeline: loading, checking, running and freeing them."""

from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from tiue_runtime import bundle as contract
from tiue_runtime.budget import Budget
from tiue_runtime.bundle import Bundle
from tiue_runtime.errors import OutOfMemoryError
from tiue_runtime.host.forks import ForkSafeLock
from tiue_runtime.modes import Memory
from tiue_runtime.ort.cuda_graphs import CudaGraphs
from tiue_runtime.ort.engines import with_cache
from tiue_runtime.ort.graph import Float32, Graph
from tiue_runtime.ort.interrupt import for_each
from tiue_runtime.ort.placement import Placement
from tiue_runtime.ort.sessions import first_line
from tiue_runtime.run import Run

_GIVEN = {contract.LATENTS, contract.TEXT}
_STEPS = {contract.STEP_INDEX, contract.STEP_WEIGHT}
_LOAD_TINY = 'load with vae="tiny"'


class Graphs:
    """Text encoder, UNet encoder and decoder, image decoder, safety checker and upscaler, in the order of their runs.

    Args:
        bundle: where they are.
        placement: where and how they run.
        vae: the kind of image decoder.
        safety: whether pictures are checked, if the bundle has a safety checker.

    They are loaded by `load`, or each when it is first needed. The upscaler is always loaded when it is first needed.
    """

    def __init__(self, bundle: Bundle, placement: Placement, vae: str, *, safety: bool) -> None:
        self._bundle, self._device, self._settings, self._vae = bundle, placement.device, placement.settings, vae
        self.variant = placement.variant
        self.budget = Budget(bundle.manifest, self.variant, self._device)
        self.cuda_graphs = CudaGraphs() if self._settings.cuda_graphs else None
        expect = Graph.expect
        self.text_encoder = self._graph(
            contract.TEXT_ENCODER,
            lambda g: expect(g, {contract.INPUT_IDS, contract.ATTENTION_MASK}, {contract.TEXT}),
        )
        # The checks must not hold self: a reference cycle would keep the sessions alive until garbage collection.
        encoder = self.unet_encoder = self._graph(contract.UNET_ENCODER, lambda g: expect(g, _GIVEN, set()))
        self.unet_decoder = self._graph(
            contract.UNET_DECODER,
            lambda g: expect(g, _GIVEN | _STEPS, {contract.CONTRIBUTION}, needed=_STEPS, features=encoder.outputs),
        )
        self.vae_name = bundle.manifest.vae_graphs[vae]
        self.vae_decoder = self._graph(self.vae_name, lambda g: expect(g, {contract.LATENTS}, {contract.IMAGE}))
        self.safety_checker: Graph | None = None
        if safety and bundle.manifest.safety_checker is not None:
            self.safety_checker = self._graph(
                contract.SAFETY_CHECKER, lambda g: expect(g, {contract.IMAGE}, {contract.SCORE})
            )
        self.upscaler: Graph | None = None
        if bundle.manifest.upscaler is not None:
            self.upscaler = self._graph(
                contract.UPSCALER, lambda g: expect(g, {contract.IMAGE}, {contract.ENLARGED}), recorded=False
            )

    def _graph(self, name: str, check: Callable[[Graph], object], *, recorded: bool = True) -> Graph:
        path = self._bundle.graph_path(name, self.variant)
        settings = with_cache(self._settings, self._device, self._bundle.directory, path)
        recording = self.cuda_graphs if recorded else None
        if recording is None or name in (contract.TEXT_ENCODER, contract.SAFETY_CHECKER):
            # Some of their nodes may stay on the CPU, for example those of a mask. Such a graph cannot be recorded.
            settings, recording = replace(settings, cuda_graphs=False), None
        files = partial(self._bundle.check_graph, name, self.variant)
        load_now = self.cuda_graphs is not None and recorded  # Recordings need a session at once.
        with self._loading():
            return Graph(path, self._device, settings, recording, check=check, check_files=files, load=load_now)

    def __iter__(self) -> Iterator[Graph]:
        always = self.text_encoder, self.unet_encoder, self.unet_decoder, self.vae_decoder
        return iter((*always, *(graph for graph in (self.safety_checker, self.upscaler) if graph is not None)))

    def load(self) -> None:
        """Load the graphs that are not loaded. Raises BundleError, DeviceError, OutOfMemoryError."""
        missing = [graph for graph in self if not graph.loaded and graph is not self.upscaler]
        with self._loading():
            for_each(Graph.session, missing, self._device.row.loads_at_once)

    def unload(self, *graphs: Graph) -> None:
        """Free graphs and the memory that they hold."""
        for graph in graphs:
            graph.unload()
        for graph, name in (
            (self.unet_decoder, contract.UNET_DECODER),
            (self.vae_decoder, self.vae_name),
            (self.safety_checker, contract.SAFETY_CHECKER),
            (self.upscaler, contract.UPSCALER),
        ):
            if graph in graphs:
                self.budget.freed(name)

    @contextmanager
    def request(self, run: Run, *, low: bool) -> "Generator[Turns]":
        """Prepare the graphs for a request. With low memory, free them afterwards."""
        if not low:
            self.load()  # An earlier request may have freed them. Free memory must be looked up after this.
        try:
            turn = self.cuda_graphs.turn(partial(run.check, "its turn")) if self.cuda_graphs else nullcontext()
            with self.budget.request(), turn:
                yield Turns(self, run, low=low)
        finally:
            if low:
                self.unload(*self)

    @contextmanager
    def _loading(self) -> Generator[None]:
        """Add the remedy to the error if there is not enough memory for all graphs."""
        try:
            yield
        except OutOfMemoryError as error:
            without = " and without `cuda_graphs`" if self.cuda_graphs else ""
            raise self.out_of_memory(error, f'load with memory="low"{without}') from error

    def out_of_memory(self, error: Exception, *remedies: str) -> OutOfMemoryError:
        """Return the error to raise when memory is exhausted."""
        helps = (*remedies, _LOAD_TINY) if self._tiny_is_left() else remedies
        return OutOfMemoryError(f"{first_line(error)}: {', '.join(helps)}")

    def overflow_remedy(self, *, vae: bool = False) -> str:
        """Return the remedy for a graph that computes values that are not finite."""
        manifest, variant = self._bundle.manifest, self.variant
        if variant == contract.CUDA and contract.PORTABLE in manifest.variants:
            remedy = 'Its cuda graphs overflowed: load with variant="portable"'
        elif manifest.precision != "fp32" and variant != contract.CPU:  # The cpu graphs compute in fp32 in any case.
            remedy = f"{manifest.precision} overflowed: export the bundle again in fp32"
        else:
            remedy = "Look for damaged weights with `tiue-runtime verify` and for extreme latents or prompt_embeds"
        return remedy + (f", or {_LOAD_TINY}" if vae and self._tiny_is_left() else "")

    def _tiny_is_left(self) -> bool:
        """Say whether the bundle has a smaller image decoder than this one."""
        return contract.TINY in self._bundle.manifest.vaes and self._vae != contract.TINY

    @property
    def text_width(self) -> int | None:
        """D of text (B, L, D), if a graph declares it."""
        before = [graph for graph in self if graph.loaded]
        text = self.unet_encoder.inputs.get(contract.TEXT) or self.unet_decoder.inputs.get(contract.TEXT)
        width = text.shape[-1] if text else None
        self.unload(*(graph for graph in self if graph.loaded and graph not in before))
        return width if isinstance(width, int) else None


_shared: WeakValueDictionary[Hashable, Graphs] = WeakValueDictionary()
_sharing = ForkSafeLock()


def shared_graphs(bundle: Bundle, placement: Placement, vae: str, memory: Memory, *, safety: bool) -> Graphs:
    """Return the graphs of a pipeline. Pipelines of equal files, placement, vae and safety get the same ones.

    Two kinds of pipelines get their own graphs. With memory="low", they are not loaded now, and each request loads and
    frees them. With cuda_graphs, a recording belongs to one pipeline.

    Raises:
        BundleError, DeviceError, OutOfMemoryError: a graph could not be loaded.
    """
    if memory == "low":
        return Graphs(bundle, placement, vae, safety=safety)
    if placement.settings.cuda_graphs:
        graphs = Graphs(bundle, placement, vae, safety=safety)
    else:
        key = bundle.directory.resolve(), tuple(sorted(bundle.stamps.items())), repr(placement), vae, safety
        with _sharing.hold():
            graphs = _shared.get(key)
            if graphs is None:
                graphs = _shared[key] = Graphs(bundle, placement, vae, safety=safety)
    graphs.load()
    return graphs


class Turns:
    """The graphs during one request. Call it to run one of them."""

    def __init__(self, graphs: Graphs, run: Run, *, low: bool) -> None:
        self.graphs, self.run, self.low = graphs, run, low

    def __call__(self, stage: str, graph: Graph, feed: Mapping[str, Any], **options: bool) -> dict[str, Any]:
        """Run a graph as a stage of the request. With low memory, no other graph stays loaded."""
        if self.low:
            self.graphs.unload(*(other for other in self.graphs if other is not graph and other.loaded))
        with self.run.stage(stage):
            return graph(feed, cancelled=self.run.cancelled, **options)


class Halves:
    """The two halves of the UNet in one request, as functions of arrays."""

    def __init__(self, turns: Turns, steps: int, *, decoded: bool) -> None:
        """Take the halves.

        Args:
            turns: runs their graphs.
            steps: N, the number of timesteps of all calls of `decode` together.
            decoded: whether the image decoder follows.
        """
        self._turns, self._left, self._decoded = turns, steps, decoded
        self._shape: tuple[int, ...] = ()

    def encode(self, latents: Float32, text: Float32) -> dict[str, Any]:
        """Run the encoder. Returns all inputs of the decoder, on the device."""
        graph = self._turns.graphs.unet_encoder
        known = graph.place({contract.LATENTS: latents, contract.TEXT: text})
        features = self._turns(contract.UNET_ENCODER, graph, known, keep_on_device=not self._turns.low)
        self._shape = latents.shape
        return {**known, **features}

    def decode(self, features: Mapping[str, Any], rows: NDArray[np.int64], weights: Float32) -> Float32:
        """Run the decoder at k timesteps.

        Args:
            features: from `encode`.
            rows: int64 (k,), rows of the manifest's decoder_timesteps.
            weights: float32 (k,), w_i.

        Returns:
            sum_i w_i eps_i over these timesteps, float32 (B, C, h, w).
        """
        graphs = self._turns.graphs
        graph, budget = graphs.unet_decoder, graphs.budget
        count, _, height, width = self._shape
        this_run = contract.UNET_DECODER, len(rows) * count, height * width
        # Free the decoder's memory now if the image decoder would otherwise have to work in tiles.
        last = graph.releases and self._decoded and len(rows) == self._left
        release = last and not budget.fits(graphs.vae_name, 1, height * width, before=this_run)
        feed = {**features, contract.STEP_INDEX: rows, contract.STEP_WEIGHT: weights}
        with budget.run(*this_run, keeps=lambda: graph.keeps and not release):
            contribution = self._turns(contract.UNET_DECODER, graph, feed, release=release)[contract.CONTRIBUTION]
        if not np.isfinite(contribution).all():
            self._check_features(features)  # If the inputs are at fault, blame the encoder instead.
        graph.check_output(contract.CONTRIBUTION, contribution, self._shape, graphs.overflow_remedy())
        self._left -= len(rows)
        return contribution

    def _check_features(self, features: Mapping[str, Any]) -> None:
        """Raise InferenceError if features (arrays, or values in device memory) are not finite."""
        graphs = self._turns.graphs
        for name in graphs.unet_encoder.outputs:
            value = features[name]
            array = cast(Float32, value if isinstance(value, np.ndarray) else value.numpy())
            graphs.unet_encoder.check_output(name, array, array.shape, graphs.overflow_remedy())
