"""`generate`: pictures in one call, with pipelines that stay loaded.

The module is not named `generate`, because a submodule of that name would replace the function in the package.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from PIL.Image import Image

from tiue_runtime.bundle import Bundle
from tiue_runtime.bundle.find import find_bundle
from tiue_runtime.choices import Vae
from tiue_runtime.host.forks import ForkSafeLock
from tiue_runtime.modes import Memory
from tiue_runtime.options import LoadOptions, RequestOptions, complete
from tiue_runtime.pipeline import Pipeline


def generate(
    prompt: str | Sequence[str],
    *,
    bundle: str | Path | None = None,
    device: str = "auto",
    vae: Vae | None = None,
    **options: Unpack[RequestOptions],
) -> list[Image]:
    """Make pictures of a prompt with a pipeline that stays loaded.

    The two pipelines used last stay loaded. Two pipelines differ in bundle, device or vae. If a bundle was written
    again in its place, it is loaded again. After memory="low", none of the pipeline's graphs stays loaded.

    Args:
        prompt: as in `Pipeline.__call__`.
        bundle: as in `Pipeline.load`.
        device: as in `Pipeline.load`.
        vae: as in `Pipeline.load`.
        **options: as in `Pipeline.__call__`.

    Returns:
        The pictures, in the order of `Result`.

    Raises:
        BundleError, DeviceError: as `Pipeline.load`.
        RequestError, Cancelled, InferenceError: as `Pipeline.__call__`. OutOfMemoryError is an InferenceError.
    """
    complete(LoadOptions, {"device": device, "vae": vae})
    complete(RequestOptions, options)  # before a bundle is loaded for them
    given = options.get("memory")
    options["memory"] = memory = "auto" if given is None else given
    pipeline = kept_pipelines.get(Bundle.load(find_bundle(bundle).resolve()), device, vae, memory)
    return pipeline(prompt, **options).images


class KeptPipelines:
    """The pipelines that were used last, `most` of them. Calls from several threads at once are safe."""

    def __init__(self, most: int = 2) -> None:
        self._most = most
        self._kept: dict[tuple[Path, str, Vae | None], Pipeline] = {}  # in the order of their last use
        self._loading = ForkSafeLock()

    def get(self, bundle: Bundle, device: str, vae: Vae | None, memory: Memory) -> Pipeline:
        """Return the kept pipeline of the same files, else a new one that is loaded for a call with `memory`."""
        key = bundle.directory, device, vae
        with self._loading.hold():
            pipeline = self._kept.pop(key, None)
            if pipeline is None or (pipeline.bundle, pipeline.bundle.stamps) != (bundle, bundle.stamps):
                pipeline = None  # Free this one and the one used longest ago before loading another.
                if len(self._kept) >= self._most:
                    del self._kept[next(iter(self._kept))]
                pipeline = Pipeline.load(bundle.directory, device=device, vae=vae, memory=memory)
            self._kept[key] = pipeline
            return pipeline

    def all(self) -> list[Pipeline]:
        """Return the kept pipelines in the order of their last use."""
        return list(self._kept.values())


kept_pipelines = KeptPipelines()  # of this process
