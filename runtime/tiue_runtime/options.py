"""The options of a request and of loading, each written once: type, default, help, and whether it is a flag.

`Pipeline.__call__`, `warmup`, `generate`, `bench` and the command line all take their options from here.
"""

import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypedDict,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from tiue_runtime.choices import Precision, Vae, Variant
from tiue_runtime.errors import RequestError, shorten
from tiue_runtime.modes import Memory
from tiue_runtime.run import Callback, Cancel

Function = TypeVar("Function", bound=Callable[..., object])


@dataclass(frozen=True)
class Option:
    """Everything about an option but its type."""

    help: str
    default: object = None
    choices: tuple[str, ...] = ()
    flag: bool = True  # whether the command line has it
    metavar: str | None = None


class Described(NamedTuple):
    """An option and its type."""

    kind: Any  # without None
    option: Option
    optional: bool  # whether it may be None


class _NoiseOptions(TypedDict, total=False):
    """Options of a request that decoding latents does not have."""

    num_images: Annotated[int, Option("pictures of each prompt; image j of all uses seed + j (default: 1)", 1)]
    seed: Annotated[int | None, Option("0 <= seed < 2**64; the same seed gives the same picture (default: a new one)")]
    steps: Annotated[int | None, Option("a step count of the bundle (default: the bundle's)")]
    height: Annotated[int | None, Option("pixels, a multiple of the bundle's size_multiple (default: the bundle's)")]
    width: Annotated[int | None, Option("pixels, a multiple of the bundle's size_multiple (default: the bundle's)")]
    latents: Annotated[
        Any,
        Option("z_T, floats (B, C, h, w), instead of noise from a seed; they determine the size", flag=False),
    ]
    prompt_embeds: Annotated[Any, Option("floats (B / num_images, L, D), instead of a prompt", flag=False)]


class DecodeOptions(TypedDict, total=False):
    """Options of decoding latents."""

    upscale: Annotated[
        int | None, Option("enlarge the pictures by the bundle's upscaler; its factor, for example 4 (default: no)")
    ]
    memory: Annotated[
        Memory | None,
        Option(
            "parallel: all timesteps in one run of the decoder; partial: two at once; sequential: one by one, in about "
            "1/steps of the memory; auto: the first of these that fits into free memory, or sequential if previews "
            "are requested; low: one by one, and each graph is loaded only for its turn (default: auto)"
        ),
    ]
    vae_tiling: Annotated[
        bool | None,
        Option(
            "decode pictures larger than the bundle's default in overlapping tiles, in less memory; the pictures "
            "differ a little (default: only if memory is short)"
        ),
    ]
    timeout: Annotated[
        float | None, Option("seconds after which the request is cancelled, also while a graph runs", metavar="SECONDS")
    ]
    callback: Annotated[
        Callback | None,
        Option(
            "called with a Progress after each graph, timestep and tile; if it returns True, the request is cancelled. "
            "Previews come after each timestep in sequential mode, else after the last one. If the callback has an "
            "attribute `previews` that is False, it does not change the memory mode",
            flag=False,
        ),
    ]
    cancel: Annotated[
        Cancel | None,
        Option("a threading.Event, or a function that says whether to stop; asked while graphs run", flag=False),
    ]


class RequestOptions(_NoiseOptions, DecodeOptions, total=False):
    """Options of one request, besides prompt and output type."""


class LoadOptions(TypedDict, total=False):
    """Options of loading a pipeline, besides the bundle."""

    device: Annotated[
        str,
        Option(
            "auto, cpu, openvino, cuda, tensorrt or tensorrt-rtx; cuda:1 is the second GPU; a device requested by name "
            "is never replaced",
            "auto",
        ),
    ]
    vae: Annotated[
        Vae | None,
        Option("kl: the full image decoder; tiny: a small, fast one (default: the bundle's)"),
    ]
    variant: Annotated[
        str | None, Option("the bundle's graphs to run (default: the best for the device)", choices=get_args(Variant))
    ]
    safety_checker: Annotated[
        bool,
        Option("check pictures, if the bundle has a safety checker, and blur those that it flags (default: yes)", True),
    ]
    cuda_graphs: Annotated[bool, Option("record the kernels once and replay them (cuda)", False, flag=False)]
    provider_options: Annotated[
        Mapping[str, object] | None, Option("options of ONNX Runtime's provider for the device", flag=False)
    ]
    precision: Annotated[
        Precision | None,
        Option("precision of openvino's arithmetic (default: bf16 if the CPU has instructions for it, else fp32)"),
    ]
    threads: Annotated[int | None, Option("CPU threads of a graph (default: all that the process may use)")]


_FROM_NOISE = "a student makes pictures from noise and a prompt only"
_NO_GUIDANCE = "guidance was distilled into the student, so there is none at run time"

# Arguments of diffusers' pipelines that people try, and the sentence that each of them gets.
LESSONS = {
    "num_inference_steps": "use `steps`; a bundle offers the step counts that it was trained for",
    "guidance_scale": _NO_GUIDANCE,
    "guidance_rescale": _NO_GUIDANCE,
    "true_cfg_scale": _NO_GUIDANCE,
    "negative_prompt": f"{_NO_GUIDANCE}, and nothing to push against; say in the prompt what the picture shows",
    "negative_prompt_embeds": f"{_NO_GUIDANCE}, and nothing to push against",
    "generator": "use `seed`; the same seed gives the same noise on every device",
    "num_images_per_prompt": "use `num_images`",
    "callback_on_step_end": "use `callback`; it gets a Progress",
    "scheduler": "the weights of the steps are part of the bundle, so there is no scheduler at run time",
    "timesteps": "the timesteps are part of the bundle; use `steps` to choose how many",
    "sigmas": "the timesteps are part of the bundle; use `steps` to choose how many",
    "eta": "there is no sampling loop at run time that could add noise",
    "image": _FROM_NOISE,
    "mask_image": _FROM_NOISE,
    "strength": _FROM_NOISE,
    "ip_adapter_image": _FROM_NOISE,
    "clip_skip": "the layer of the text encoder was fixed at export",
    "cross_attention_kwargs": "LoRA and attention are fixed at export",
    "return_dict": "a call always returns a Result",
}


@cache
def described(options: type) -> dict[str, Described]:
    """Return the type and the description of every option of a TypedDict in this module."""
    found: dict[str, Described] = {}
    for name, hint in get_type_hints(options, include_extras=True).items():
        kind, option = get_args(hint)
        parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        others = [part for part in parts if part is not NoneType]
        found[name] = Described(others[0] if len(others) == 1 else kind, option, NoneType in parts)
    return found


def complete(options: type, given: Mapping[str, object]) -> dict[str, Any]:
    """Return all options: the given ones, and the defaults of the others.

    Args:
        options: RequestOptions or LoadOptions.
        given: values by name. Integers and booleans of other libraries become Python's.

    Raises:
        TypeError: a name is unknown.
        RequestError: a value is of another type, or a name is one of LESSONS. Ranges are not checked here.
    """
    known = described(options)
    for name in given:
        if name in LESSONS and options is RequestOptions:
            raise RequestError(f"{name}: {LESSONS[name]}")
        if name not in known:
            raise TypeError(f"unexpected option {name!r}; expected some of {', '.join(known)}")
    return {name: _checked(name, known[name], given[name]) if name in given else known[name].option.default
            for name in known}  # fmt: skip


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise RequestError unless a value is one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        raise RequestError(f"{name}: expected one of {', '.join(allowed)}, got {shorten(value)}")


def choices(kind: Any, option: Option) -> tuple[str, ...]:
    """Return the values that an option may take, or () if they are not listed."""
    return option.choices or _literals(kind)


def document(options: type) -> Callable[[Function], Function]:
    """Replace `{options}` in a function's docstring by the options of a TypedDict and their help, one per line."""

    def decorate(function: Function) -> Function:
        if function.__doc__:  # Python removes docstrings with -OO.
            indent = next(line for line in function.__doc__.splitlines() if "{options}" in line).partition("{")[0]
            lines = [f"{name}: {option.help}." for name, (_, option, _) in described(options).items()]
            function.__doc__ = function.__doc__.replace("{options}", f"\n{indent}".join(lines))
        return function

    return decorate


def _literals(kind: Any) -> tuple[str, ...]:
    """Return the strings of a Literal, or of a union of them."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else ()
    return tuple(value for part in parts for value in _literals(part))


def _checked(name: str, described: Described, value: Any) -> Any:
    """Return a value in the plain form of its option's type, or raise RequestError."""
    kind, _, optional = described
    if value is None and optional:
        return None
    if literals := _literals(kind):
        one_of(name, value, literals)
        return value
    plain = _PLAIN.get(kind)
    if plain is None:  # An array, a function or a mapping: its user checks it.
        return value
    expected, convert = plain
    converted = convert(value)
    if converted is None:
        raise RequestError(f"{name}: expected {expected}{' or None' if optional else ''}, got {shorten(value)}")
    return converted


def _integer(value: Any) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except Exception:  # A foreign object's conversion may raise anything.
        return None


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) or _is_numpy(value, "integer", "floating")
    if not is_number or isinstance(value, bool) or _is_numpy(value, "timedelta64"):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _truth(value: Any) -> bool | None:
    return bool(cast(object, value)) if isinstance(value, bool) or _is_numpy(value, "bool_") else None


def _is_numpy(value: Any, *types: str) -> bool:
    """Say whether a value is of one of numpy's types. Without numpy in this process, it is not."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, tuple(getattr(numpy, name) for name in types))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


# For each type: its name in messages, and a function that returns a value's plain form, or None for a wrong value.
_PLAIN: dict[Any, tuple[str, Callable[[Any], object]]] = {
    int: ("an integer", _integer),
    float: ("a number", _number),
    bool: ("True or False", _truth),
    str: ("a string", _text),
}
