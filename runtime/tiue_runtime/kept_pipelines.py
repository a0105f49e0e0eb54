"""`generate`: pictures in one call, by pipelines that stay loaded.

The module has another name than the function: a submodule `generate` would replace it in the package.
"""

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Unpack

from PIL.Image import Image

from tiue_runtime.bundle import Bundle
from tiue_runtime.bundle.find import find_bundle
from tiue_runtime.modes import Memory
from tiue_runtime.options import RequestOptions, Vae
from tiue_runtime.pipeline import Pipeline


def generate(
    prompt: str | Sequence[str],
    *,
    bundle: str | Path | None = None,
    device: str = "auto",
    vae: Vae | None = None,
    **options: Unpack[RequestOptions],
) -> list[Image]:
    """Make pictures of a prompt with a pipeline that stays loaded; options are those of `Pipeline.__call__`.

    Two pipelines stay, the last used of different bundle, device or vae. A bundle that was written again in its place
    is loaded again. After memory="low" none of the pipeline's graphs is loaded.

    Raises BundleError, DeviceError, RequestError, Cancelled, InferenceError, and of its kind OutOfMemoryError.
    """
    given = options.get("memory")
    options["memory"] = memory = "auto" if given is None else given
    pipeline = _kept_pipeline(Bundle.load(find_bundle(bundle).resolve()), device, vae, memory)
    return pipeline(prompt, **options).images


_KEPT = 2


_kept: dict[tuple[Path, str, Vae | None], Pipeline] = {}  # the last used is the last


_loading = Lock()


def _kept_pipeline(bundle: Bundle, device: str, vae: Vae | None, memory: Memory) -> Pipeline:
    """The pipeline of an earlier call if it is of the same files, else a new one, loaded for a call with `memory`."""
    key = bundle.directory, device, vae
    with _loading:
        pipeline = _kept.pop(key, None)
        if pipeline is None or pipeline.bundle != bundle:
            pipeline = None  # let go of it, and of the one used longest ago, before there is another
            if len(_kept) >= _KEPT:
                del _kept[next(iter(_kept))]
            pipeline = Pipeline.load(bundle.directory, device=device, vae=vae, memory=memory)
        _kept[key] = pipeline
        return pipeline
