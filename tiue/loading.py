"""Loading the parts of a model with weights: from a pipeline's folders, a UNet's file, or a single file of all."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as libraries_logging
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from tiue.files import one_line
from tiue.pipeline_directory import ComponentsError, PipelineDirectory, read_json
from tiue.recognize import is_original_layout, kind_of_weights
from tiue.sizes import check_sizes
from tiue.tokenization import load_tokenizer
from tiue.weights import (
    Stored,
    WeightsError,
    check_stored,
    choose_weights,
    fill,
    has_wrappers,
    is_harmless,
    read_headers,
    without_wrappers,
)

# The prefixes of the parts of a model in a single file in the original layout.
_ORIGINAL_PLACES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
# Tensors of single files that no picture depends on: the averaged copy of the weights, and the noise process. The
# scheduler's configuration also has the noise process.
_ORIGINAL_HARMLESS = re.compile(
    r"model_ema\.|betas$|alphas_cumprod|sqrt_|log_one_minus|posterior_|lvlb_weights|logvar$|scale_factor$|"
    r"first_stage_model\.(loss\.|model_ema\.)|cond_stage_model\.(logit_scale|model\.(logit_scale|text_projection))|"
    r"(.*\.)?position_ids$|(.*\.)?num_updates$|(.*\.)?decay$|state_dict$"
)


def load_part(cls: Any, directory: Path, part: str) -> Any:
    """Load a folder with config.json and weights as `cls`. Raises ComponentsError."""
    try:
        variant, files = choose_weights(part, (path.name for path in directory.iterdir()))
        found: dict[str, Stored] = {}
        for name in files:
            if name.endswith(".safetensors"):
                found |= _headers(directory / name)
        check_stored(found, part)
        _check_sizes({part: read_json(directory, "config.json")}, found)
        if has_wrappers(found):
            clean, taken = without_wrappers(found, _empty(cls, directory).state_dict())
            if taken:
                return _load_unwrapped(cls, directory, part, clean, taken)
        with _quiet():
            module, report = _from_pretrained(cls, directory, variant)
    except WeightsError as error:
        raise ComponentsError(f"{directory} cannot be loaded: {error}") from error
    except ComponentsError:
        raise
    except Exception as error:  # Libraries raise anything for configurations that make no sense.
        raise ComponentsError(f"{directory} cannot be loaded as {cls.__name__}: {one_line(error)}") from error
    # The libraries would leave missing tensors at random values and ignore the others.
    unexpected = [name for name in report["unexpected_keys"] if not is_harmless(part, name)]
    for problem, names in (
        ("lacks tensor", report["missing_keys"]),
        ("has a wrong shape for", report["mismatched_keys"]),
        ("has an unexpected tensor", unexpected),
    ):
        if names:
            raise ComponentsError(f"{directory} cannot be loaded: it {problem} {min(names)} ({len(names)} in all)")
    return module.float().eval()  # transformers keeps 8-bit floats.


def load_unet_file(path: Path, directory: PipelineDirectory) -> UNet2DConditionModel:
    """Load a pipeline's UNet with the weights of another file. Raises ComponentsError."""
    try:
        found = read_headers(path)
        _check_sizes({"unet": directory.configs["unet"]}, found)
        unet = _empty_unet(directory)
        found, taken = without_wrappers(found, unet.state_dict())
        if taken not in ("", "unet."):
            _warn_of_wrappers(path, taken)
        fill(unet, found, part="unet")
    except WeightsError as error:
        where = directory.root / "unet" / "config.json"
        raise ComponentsError(f"{path} {error}, by {where}" if _is_misfit(error) else f"{path} {error}") from error
    return unet


def _empty_unet(directory: PipelineDirectory) -> UNet2DConditionModel:
    try:
        with init_empty_weights():
            return UNet2DConditionModel.from_config(directory.configs["unet"])
    except Exception as error:  # Libraries raise anything for configurations that make no sense.
        what = f"{directory.root / 'unet'} cannot be loaded as UNet2DConditionModel"
        raise ComponentsError(f"{what}: {one_line(error)}") from error


def single_file_parts(path: Path) -> set[str]:
    """Return the parts that a file in the original layout (A1111's) holds. There are none in another layout.

    Raises:
        ComponentsError: the file is not a safetensors file.
    """
    try:
        names = read_headers(path)
    except WeightsError as error:
        raise ComponentsError(f"{path} {error}") from error
    if not is_original_layout(names):
        return set()
    return {"unet"} | {part for part, place in _ORIGINAL_PLACES.items() if any(n.startswith(place) for n in names)}


def load_single_file(path: Path, directory: PipelineDirectory, parts: set[str]) -> dict[str, Any]:
    """Load the parts that a file in the original layout holds, with diffusers and a pipeline's configurations.

    Args:
        path: a safetensors file.
        directory: a pipeline of the same family. Its weights are not read.
        parts: the result of `single_file_parts`.

    Returns:
        The modules by part.

    Raises:
        ComponentsError: the file does not fit the configurations, or holds a tensor that no part takes.
    """
    headers = read_headers(path)
    if kind := kind_of_weights(headers):
        raise ComponentsError(f"{path} {kind}")
    _check_sizes({part: directory.configs[part] for part in parts}, headers)
    places = tuple(_ORIGINAL_PLACES[part] for part in parts)
    whole = any(name.startswith(places) for name in headers)
    others = [name for name in headers if whole and not name.startswith(places) and not _ORIGINAL_HARMLESS.match(name)]
    if others:
        raise ComponentsError(f"{path} has an unexpected tensor {min(others)} ({len(others)} in all)")
    try:
        for part in parts:
            place = _ORIGINAL_PLACES[part] if whole else ""
            own = {name: s for name, s in headers.items() if name.startswith(place)}
            check_stored({name: s for name, s in own.items() if not _ORIGINAL_HARMLESS.match(name)}, part)
    except WeightsError as error:
        raise ComponentsError(f"{path} {error}") from error
    options = {"config": str(directory.root), "local_files_only": True, "torch_dtype": torch.float32}
    try:
        with _quiet():
            state = load_file(path)
            if not whole:  # The file is a UNet alone. diffusers expects its names with their prefix.
                state = {f"{_ORIGINAL_PLACES['unet']}{name}": tensor for name, tensor in state.items()}
            loaded = {
                part: directory.classes[part].from_single_file(dict(state), subfolder=part, **options)
                for part in ("unet", "vae")
                if part in parts
            }
            del state
            if "text_encoder" in parts:
                loaded["text_encoder"] = _original_text_encoder(path, directory, loaded, options)
    except ComponentsError:
        raise
    except Exception as error:  # Libraries raise anything for configurations that make no sense.
        raise ComponentsError(
            f"{path} does not fit the configurations in {directory.root}: {one_line(error)}"
        ) from error
    for part, module in loaded.items():
        _check_complete(path, directory, part, module, headers)
        module.float().eval()
    return loaded


def load_fast_tokenizer(directory: PipelineDirectory) -> Any:
    """Load a pipeline's tokenizer. Raises ComponentsError."""
    cls, folder = directory.classes["tokenizer"], directory.root / "tokenizer"
    if not folder.is_dir():
        raise ComponentsError(f"{directory.root} is not a complete diffusers pipeline: tokenizer is missing")
    try:
        tokenizer = load_tokenizer(cls, folder, like_slow=directory.slow_tokenizer)
    except Exception as error:  # The tokenizers library raises bare Exceptions.
        raise ComponentsError(f"{folder} cannot be loaded as {cls.__name__}: {one_line(error)}") from error
    limit = directory.configs["text_encoder"].get("max_position_embeddings")
    if tokenizer.model_max_length == VERY_LARGE_INTEGER and limit:  # vocab.json and merges.txt hold no limit.
        tokenizer.model_max_length = limit
    return tokenizer


def _headers(path: Path) -> dict[str, Stored]:
    try:
        return read_headers(path)
    except WeightsError as error:
        raise WeightsError(f"{path.name} {error}") from error


def _check_sizes(configs: Mapping[str, Any], found: Mapping[str, Stored]) -> None:
    check_sizes(configs, [stored.shape for stored in found.values()])


def _from_pretrained(cls: Any, directory: Path, variant: str | None) -> tuple[Any, Mapping[str, Any]]:
    if issubclass(cls, PreTrainedModel):  # transformers names misshapen tensors only with ignore_mismatched_sizes
        options = {"dtype": torch.float32, "ignore_mismatched_sizes": True}
    else:
        options = {"torch_dtype": torch.float32}
    return cls.from_pretrained(
        directory, variant=variant, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
    )


def _empty(cls: Any, directory: Path) -> Any:
    """Make a module without weights from a folder's config.json."""
    with init_empty_weights():
        if issubclass(cls, PreTrainedModel):
            return cls(cls.config_class.from_pretrained(directory, local_files_only=True))
        return cls.from_config(cls.load_config(directory, local_files_only=True))


def _load_unwrapped(cls: Any, directory: Path, part: str, found: Mapping[str, Stored], taken: str) -> Any:
    module = _empty(cls, directory)
    fill(module, found, part=part)
    if isinstance(module, PreTrainedModel):
        module.tie_weights()
    _warn_of_wrappers(directory, taken)
    return module


def _warn_of_wrappers(path: Path, taken: str) -> None:
    warnings.warn(
        f"{path}: removed the prefix {taken} from its tensors' names (a wrapped or compiled model)", stacklevel=5
    )


def _is_misfit(error: WeightsError) -> bool:
    return str(error).startswith(("lacks", "has"))


def _original_text_encoder(path: Path, directory: PipelineDirectory, loaded: Mapping[str, Any], options: Any) -> Any:
    """Load the text encoder of a single file. Only diffusers' pipeline class can do this."""
    pipeline = StableDiffusionPipeline.from_single_file(
        str(path),
        unet=loaded["unet"],
        **({"vae": loaded["vae"]} if "vae" in loaded else {}),
        tokenizer=load_fast_tokenizer(directory),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
        **options,
    )
    return pipeline.text_encoder


def _check_complete(
    path: Path, directory: PipelineDirectory, part: str, module: Any, headers: Mapping[str, Stored]
) -> None:
    """Raise ComponentsError if diffusers left a weight without value, or ignored a tensor of the file."""
    empty = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    if empty:
        raise ComponentsError(
            f"{path} does not fit {directory.root / part / 'config.json'}: it lacks {min(empty)} ({len(empty)} in all)"
        )
    place = _ORIGINAL_PLACES[part]
    own = [name for name in headers if name.startswith(place) and not _ORIGINAL_HARMLESS.match(name)]
    is_open_clip = part == "text_encoder" and any(name.startswith("cond_stage_model.model.") for name in own)
    if is_open_clip or not own:
        return  # OpenCLIP's tensors cannot be counted: one holds query, key and value, and one layer is unused.
    count = len(module.state_dict())
    if len(own) != count:
        raise ComponentsError(
            f"{path} does not fit {directory.root / part / 'config.json'}: "
            f"it has {len(own)} tensors in {place}, expected {count}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' long reports of weights that do not fit. Such weights are refused here, in one line."""
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    shows_bars = libraries_logging.is_progress_bar_enabled()
    libraries_logging.disable_progress_bar()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shows_bars:
            libraries_logging.enable_progress_bar()
