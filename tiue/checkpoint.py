"""`student.safetensors`: one self-contained file with everything that a student needs.

Tensors are prefixed `unet.`, `text_encoder.` and `vae.`. The metadata holds configurations, schedules,
tokenizer, license and provenance as JSON.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tiue.components import Components, ComponentsError, check_fit, class_named
from tiue.files import OneLineError, is_file, one_line, shortened, written_whole
from tiue.one_step import OneStep
from tiue.plausible import check_runs
from tiue.recognize import kind_of_weights
from tiue.schedule import Schedule
from tiue.sizes import check_sizes
from tiue.unet import TiUE
from tiue.weights import Stored, WeightsError, fill, read_headers, without_wrappers

FORMAT = 1
PARTS = ("unet", "text_encoder", "vae")
_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool}
# The keys of the metadata besides tiue_student, and the types of their values. Other keys belong to other programs.
_KEYS: dict[str, type] = {
    **dict.fromkeys((*PARTS, "scheduler", "tokenizer", "tokenizer_settings"), dict),
    **dict.fromkeys(("name", "license", "licence", "base_model"), str),
    **dict.fromkeys(("encoder_timestep", "shared_up_blocks"), int),
    **dict.fromkeys(("schedules", "provenance", "aliases"), dict),
    "share_encoder": bool,
}
_LONGEST_TEXT = 200  # characters of a name, as in bundle.json
_QUANTIZERS = ("bitsandbytes", "torchao", "torch.ao", "optimum.quanto", "auto_gptq", "gptqmodel", "awq", "hqq")


class CheckpointError(OneLineError):
    """A student checkpoint cannot be written or read; the message says why."""


@dataclass(frozen=True)
class Student:
    """A distilled model with the schedules that it was distilled for."""

    components: Components
    encoder_timestep: int  # t_1 of the schedule it was trained for
    schedules: dict[int, list[int]]  # number of steps => descending timesteps, for example {4: [751, 501, 251, 1]}
    base_model: str = "unknown"
    provenance: dict[str, Any] = field(default_factory=dict)  # JSON: how it was trained
    shared_up_blocks: int = 0  # up blocks that belong to the encoder
    share_encoder: bool = True  # False: a control, whose encoder was trained to run at every timestep
    declared: bool = True  # False: made from a pipeline, which does not declare the schedules of its training
    loras: tuple[str, ...] = ()  # merged since the student was read, for the record: name, scale and sha256 of each
    one_step: OneStep | None = None  # of a student of another method: its own scheduler's step, in place of DDIM's

    def tiue(self, steps: int | None = None) -> TiUE:
        """Return the network for one of the schedules, by default for the longest.

        Raises:
            ValueError: it was not trained for these steps, or its encoder is not shared.
        """
        if not self.share_encoder:
            raise ValueError(f"{self.components.name} is a control without a shared encoder: it cannot be split")
        steps = max(self.schedules) if steps is None else steps
        if steps not in self.schedules:
            raise ValueError(f"the student was trained for {sorted(self.schedules)} steps, not {steps}")
        return TiUE(self.components.unet, self.schedule(steps), self.encoder_timestep, self.shared_up_blocks)

    def schedule(self, steps: int) -> Schedule:
        """Return the timesteps and the weights of one of the step counts."""
        if self.one_step is not None:
            return self.one_step.schedule
        return self.components.noise_schedule.closed_form(self.schedules[steps])


def check_savable(student: Student) -> None:
    """Raise CheckpointError for a student that cannot be saved, read back or exported.

    A run calls this before its first update, so that its result is not lost.
    """
    _check_own(student)
    for part in PARTS:
        _check_module(part, getattr(student.components, part))
    for key, text in (
        ("name", student.components.name),
        ("license", student.components.license),
        ("base_model", student.base_model),
    ):
        if not (isinstance(text, str) and 0 < len(text) <= _LONGEST_TEXT and text.isprintable()):
            expected = f"expected 1 to {_LONGEST_TEXT} printable characters"
            raise CheckpointError(f"the student's {key} is {shortened(ascii(text))}: {expected}")
    try:
        check_fit(student.components)
    except ComponentsError as error:
        raise CheckpointError(f"the student cannot be exported: {error}") from error
    metadata = _read_metadata(Path("the student"), _metadata(student))
    try:
        rebuilt = _empty_modules(metadata)
        for part, module in rebuilt.items():
            own, expected = (
                {name: list(tensor.shape) for name, tensor in m.state_dict().items()}
                for m in (getattr(student.components, part), module)
            )
            if differing := sorted(n for n in own.keys() | expected.keys() if own.get(n) != expected.get(n)):
                raise CheckpointError(
                    f"{part} is not the module that its configuration describes: {differing[0]} differs "
                    f"({len(differing)} tensors in all); remove adapters and wrappers first"
                )
        _student(Path("the student"), metadata, rebuilt)
    except CheckpointError:
        raise
    except ComponentsError as error:
        raise CheckpointError(f"the student cannot be read back: {error}") from error
    except Exception as error:  # Libraries raise anything for configurations that make no sense.
        raise CheckpointError(f"the student cannot be read back: {one_line(repr(error))}") from error
    try:
        check_runs(student.components, replace(student, share_encoder=True).tiue())
    except ComponentsError as error:
        raise CheckpointError(f"the student cannot be exported: {error}") from error


def save_student(path: str | Path, student: Student, dtype: torch.dtype | None = None) -> None:
    """Write `student` to `path`: to a temporary file first, so that `path` is never half-written.

    Tensors that share memory, for example tied embeddings, are stored once.

    Args:
        path: usually ends in .safetensors. An existing file is replaced.
        student: modules may be on any device.
        dtype: the stored type of floating-point tensors. torch.float16 halves the file. None keeps their own types.

    Raises:
        CheckpointError: a weight cannot be stored in the given dtype, or is not finite in it.
    """
    path = Path(path)
    _check_own(student)
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}  # name => the name under which the same tensor is stored
    storages: set[int] = set()
    for part in PARTS:
        stored: dict[tuple[Any, ...], str] = {}
        for name, tensor in getattr(student.components, part).state_dict().items():
            full = f"{part}.{name}"
            if problem := _problem(tensor, dtype):
                raise CheckpointError(f"{path} not written: {full} {problem}")
            same = _identity(tensor)
            if same in stored:
                aliases[full] = stored[same]
                continue
            stored[same] = full
            tensor = _to_store(tensor, dtype)
            storage = tensor.untyped_storage().data_ptr()
            tensors[full] = tensor.clone() if storage in storages else tensor  # safetensors refuses shared memory
            storages.add(storage)
    strings = _metadata(student)
    if aliases:
        strings["aliases"] = json.dumps(aliases)
    with written_whole(path) as temporary:
        save_file(tensors, temporary, strings)


def _metadata(student: Student) -> dict[str, str]:
    """Return everything but the tensors, as safetensors' metadata. Raises CheckpointError for values outside JSON."""
    components = student.components
    metadata = {
        **{part: _config(getattr(components, part)) for part in PARTS},
        "scheduler": _without_paths(components.scheduler_config),
        "tokenizer": _tokenizer_json(components.tokenizer),
        "tokenizer_settings": _tokenizer_settings(components.tokenizer),
        "name": components.name,
        "license": components.license,
        "base_model": student.base_model,
        "encoder_timestep": student.encoder_timestep,
        "schedules": student.schedules,
        "shared_up_blocks": student.shared_up_blocks,
        "share_encoder": student.share_encoder,
        "provenance": student.provenance,
    }
    strings = {"tiue_student": str(FORMAT)}
    for key, value in metadata.items():
        try:
            strings[key] = json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"the student's {key} cannot be stored as JSON: {one_line(error)}") from error
    return strings


def _check_own(student: Student) -> None:
    if student.one_step is not None:
        raise CheckpointError(
            "a one-step student of another method cannot be saved as a student, whose steps are DDIM's: export it"
        )


def _check_module(part: str, module: nn.Module) -> None:
    if quantized := getattr(module.config, "quantization_config", None):
        raise CheckpointError(
            f"{part} is quantized ({one_line(str(quantized))}): expected weights in float32 or float16"
        )
    for name, child in module.named_modules():
        home = type(child).__module__
        if home.startswith(_QUANTIZERS):
            raise CheckpointError(
                f"{part}.{name} is a quantized module ({type(child).__name__}): expected plain layers"
            )
    for name, tensor in module.state_dict().items():
        if problem := _problem(tensor, None):
            raise CheckpointError(f"the student cannot be saved: {part}.{name} {problem}")


def _problem(tensor: Any, dtype: torch.dtype | None) -> str | None:
    """Say why a tensor cannot be stored as `dtype` (None: its own type). Return None if it can."""
    if not isinstance(tensor, torch.Tensor):
        return f"is a {type(tensor).__name__}, not a tensor"
    if tensor.is_meta:
        return "has no values (it is on the meta device)"
    if tensor.layout != torch.strided or tensor.is_quantized or type(tensor.data) not in (torch.Tensor, nn.Parameter):
        return f"is of an unsupported kind ({type(tensor.data).__name__}, {tensor.layout}): expected a plain tensor"
    if tensor.dtype not in _DTYPES:
        return f"is {tensor.dtype}: expected float32, float16 or bfloat16"
    stored = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    return None if stored.isfinite().all() else f"is not finite as {stored.dtype}"


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for tensors that are the same memory in the same order."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _to_store(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.contiguous()


def load_student(path: str | Path) -> Student:
    """Read a student: modules in float32, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, not a student, or of a newer format. Or its metadata describe no
            model or schedule. Or its tensors are not exactly those of its configurations.
    """
    path = Path(path)
    if not is_file(path):
        raise CheckpointError(f"no such checkpoint: {path}")
    try:
        found = read_headers(path)
    except WeightsError as error:
        raise CheckpointError(f"{path} {error}") from error
    with safe_open(path, framework="pt") as file:
        strings = file.metadata() or {}
    if "tiue_student" not in strings and (kind := kind_of_weights(found)):
        raise CheckpointError(f"{path} is not a TiUE student: it {kind}")
    metadata = _read_metadata(path, strings)
    try:
        check_sizes({part: metadata[part] for part in PARTS}, [stored.shape for stored in found.values()])
        modules = _empty_modules(metadata)
        _fill(path, modules, found, metadata.get("aliases", {}))
        student = _student(path, metadata, modules)
    except CheckpointError:
        raise
    except ComponentsError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # Libraries raise anything for configurations that make no sense.
        raise CheckpointError(f"{path} has incomplete or malformed metadata: {one_line(repr(error))}") from error
    return student


def _read_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    version = metadata.get("tiue_student")
    if version is None:
        raise CheckpointError(f"{path} is not a TiUE student: its metadata has no tiue_student")
    if not (version.isascii() and version.isdigit() and len(version) < 10) or int(version) > FORMAT:
        raise CheckpointError(f"{path} has student format {version[:100]}; this tiue reads up to {FORMAT}")
    try:
        values = {key: json.loads(metadata[key]) for key in _KEYS if key in metadata}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has malformed metadata: {one_line(error)}") from error
    for key, value in values.items():
        if type(value) is not _KEYS[key]:
            expected = _KEYS[key].__name__
            raise CheckpointError(f"{path} has malformed metadata: {key} is {value!r:.100}: expected {expected}")
    return values


def _empty_modules(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Make the modules that configurations describe, without weights."""
    modules: dict[str, Any] = {}
    with init_empty_weights():  # The file has the parameters, so none is initialized.
        modules["unet"] = UNet2DConditionModel.from_config(metadata["unet"])
        vae, text = metadata["vae"], metadata["text_encoder"]
        vae_class = class_named(diffusers, vae["_class_name"], (AutoencoderKL, AutoencoderTiny))
        modules["vae"] = vae_class.from_config(vae)
        text_class = class_named(transformers, text["_class_name"], PreTrainedModel)
        modules["text_encoder"] = text_class(text_class.config_class.from_dict(text))
    return modules


def _fill(path: Path, modules: Mapping[str, Any], found: Mapping[str, Stored], aliases: Mapping[str, str]) -> None:
    """Give modules their weights, and tie the weights that are stored once for several names."""
    unknown = [name for name in found if name.partition(".")[0] not in modules]
    if unknown:
        raise CheckpointError(f"{path} has an unexpected tensor {unknown[0]} ({len(unknown)} in all)")
    for alias, name in aliases.items():
        if name not in found or alias in found or alias.partition(".")[0] != name.partition(".")[0]:
            raise CheckpointError(f"{path} has malformed metadata: {alias[:100]!r} is not an alias of {name[:100]!r}")
    found = {**found, **{alias: found[name] for alias, name in aliases.items()}}
    for part, module in modules.items():
        try:
            own = {name.removeprefix(f"{part}."): s for name, s in found.items() if name.startswith(f"{part}.")}
            own, taken = without_wrappers(own, module.state_dict())
            if taken:
                warnings.warn(
                    f"{path}: removed the prefix {taken} from names of {part}'s tensors (a wrapped model)", stacklevel=3
                )
            fill(module, own, f"{part}.")
        except WeightsError as error:
            raise CheckpointError(f"{path} {error}") from error
    for alias, name in aliases.items():
        part, _, own = alias.partition(".")
        owner, _, leaf = own.rpartition(".")
        tensor = modules[part].state_dict(keep_vars=True)[name.removeprefix(f"{part}.")]
        setattr(modules[part].get_submodule(owner), leaf, tensor)


def _student(path: Path, metadata: Mapping[str, Any], modules: Mapping[str, Any]) -> Student:
    components = Components(
        **modules,
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=_tokenizer(path, metadata["tokenizer"]),
            **metadata["tokenizer_settings"],
        ),
        scheduler_config=metadata["scheduler"],
        name=metadata["name"],
        license=metadata["license"]
        if "license" in metadata
        else metadata["licence"],  # Older files have the second key.
    )
    student = Student(
        components=components,
        encoder_timestep=metadata["encoder_timestep"],
        schedules={int(steps): timesteps for steps, timesteps in metadata["schedules"].items()},
        shared_up_blocks=metadata.get("shared_up_blocks", 0),  # Older files lack this setting.
        share_encoder=metadata.get("share_encoder", True),
        base_model=metadata["base_model"],
        provenance=metadata["provenance"],
    )
    _check_schedules(path, student)
    return student


def _tokenizer(path: Path, content: Any) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # The tokenizers library raises bare Exceptions.
        raise CheckpointError(f"{path} has a malformed tokenizer: {one_line(error)}") from error


def _tokenizer_json(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(f"{type(tokenizer).__name__} cannot be stored: expected a fast tokenizer")
    try:
        return json.loads(backend.to_str())
    except Exception as error:  # The tokenizer has a part that is written in Python.
        raise CheckpointError(f"the tokenizer cannot be stored: {one_line(error)}") from error


def _check_schedules(path: Path, student: Student) -> None:
    """Raise CheckpointError unless the student has a schedule and all its schedules fit its scheduler."""
    if not student.schedules:
        raise CheckpointError(f"{path} names no schedule that it was trained for")
    for steps, timesteps in student.schedules.items():
        if any(type(t) is not int for t in [student.encoder_timestep, *timesteps]) or len(timesteps) != steps:
            found = f"{timesteps} and {student.encoder_timestep!r} for the encoder"
            raise CheckpointError(f"{path}: expected {steps} timesteps, and one for the encoder, found {found}")
        try:
            replace(student, share_encoder=True).tiue(steps)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error


def _config(module: nn.Module) -> dict[str, Any]:
    config = module.config
    content = config.to_dict() if isinstance(module, PreTrainedModel) else dict(config)
    return _without_paths(content) | {"_class_name": type(module).__name__}


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the libraries' private keys. One of them is a local path."""
    return {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}


def _tokenizer_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the arguments of PreTrainedTokenizerFast that tokenizer.json leaves out."""
    return {
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
