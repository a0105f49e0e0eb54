"""The options of a request and of loading, each written once: type, default, help, and whether it is a flag.

`Pipeline.__call__`, `warmup`, `generate`, `bench` and the command line all take their options from here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

from tiue_runtime.bundle import VAE_KINDS, VARIANTS
from tiue_runtime.modes import Memory
from tiue_runtime.ort.devices import Precision
from tiue_runtime.run import Callback, Cancel

Vae = Literal["kl", "tiny"]  # bundle.VAE_KINDS
OutputType = Literal["pil", "np", "latent"]


@dataclass(frozen=True)
class Option:
    """What an option is, beyond its type."""

    help: str
    default: object = None
    choices: tuple[str, ...] = ()
    flag: bool = True  # whether the command line has it
    metavar: str | None = None


class RequestOptions(TypedDict, total=False):
    """Options of one request, besides prompt and output type."""

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
    memory: Annotated[
        Memory | None,
        Option(
            "parallel: all timesteps in one run of the decoder; partial: two at once; sequential: one by one, in about "
            "1/steps of the memory; auto: the first of them that fits into free memory, or sequential where previews "
            "are asked for; low: one by one, and each graph is loaded only for its turn (default: auto)"
        ),
    ]
    vae_tiling: Annotated[
        bool | None,
        Option(
            "decode pictures larger than the bundle's default in overlapping tiles, in less memory; the pictures "
            "differ a little (default: where memory is short)"
        ),
    ]
    timeout: Annotated[
        float | None, Option("seconds after which the request is cancelled, also while a graph runs", metavar="SECONDS")
    ]
    callback: Annotated[
        Callback | None,
        Option(
            "called as callback(step, steps, preview): after each timestep in sequential mode, else once at the end. "
            "preview is the z_0 (B, C, h, w) that results if the noise predicted last is right for all timesteps left",
            flag=False,
        ),
    ]
    cancel: Annotated[
        Cancel | None,
        Option("a threading.Event, or a function that says whether to stop; asked while graphs run", flag=False),
    ]


class LoadOptions(TypedDict, total=False):
    """Options of loading a pipeline, besides the bundle."""

    device: Annotated[
        str,
        Option(
            "auto, cpu, openvino, cuda, tensorrt or tensorrt-rtx, or cuda:1 and so on; a device asked for by name is "
            "never replaced",
            "auto",
        ),
    ]
    vae: Annotated[
        Vae | None,
        Option("kl: the full image decoder; tiny: a small, fast one (default: the bundle's)", choices=VAE_KINDS),
    ]
    variant: Annotated[
        str | None, Option("the bundle's graphs to run (default: the best for the device)", choices=VARIANTS)
    ]
    cuda_graphs: Annotated[bool, Option("record the kernels once and replay them (cuda)", False, flag=False)]
    provider_options: Annotated[
        Mapping[str, object] | None, Option("options of ONNX Runtime's provider for the device", flag=False)
    ]
    precision: Annotated[
        Precision | None,
        Option("what openvino computes in (default: bf16 where the CPU multiplies in it, else fp32)"),
    ]
    threads: Annotated[int | None, Option("CPU threads of a graph (default: all that the process may use)")]


@cache
def described(options: type) -> dict[str, tuple[Any, Option]]:
    """Return the type and the description of every option of a TypedDict in this module."""
    found: dict[str, tuple[Any, Option]] = {}
    for name, hint in get_type_hints(options, include_extras=True).items():
        kind, option = get_args(hint)
        found[name] = _without_none(kind), option
    return found


def complete(options: type, given: Mapping[str, object]) -> dict[str, Any]:
    """Return all options with their defaults where they are not given. Raises TypeError for unknown ones."""
    known = described(options)
    for name in given:
        if name not in known:
            raise TypeError(f"unexpected option {name!r}; expected some of {', '.join(known)}")
    return {name: given.get(name, option.default) for name, (_, option) in known.items()}


def choices(kind: Any, option: Option) -> tuple[str, ...]:
    """Return the values that an option may take, if they are listed."""
    if option.choices:
        return option.choices
    values: list[str] = []
    for value in get_args(kind) if get_origin(kind) in (Literal, Union, UnionType) else ():
        values += [value] if isinstance(value, str) else get_args(value)
    return tuple(values)


def _without_none(kind: Any) -> Any:
    parts = [part for part in get_args(kind) if part is not type(None)]
    return parts[0] if get_origin(kind) in (Union, UnionType) and len(parts) == 1 else kind
