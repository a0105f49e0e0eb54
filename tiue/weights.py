"""Weights in safetensors files: choosing the files of a folder, and filling a module with exactly its weights."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tiue.files import OneLineError, is_file
from tiue.recognize import kind_of_weights, not_safetensors


class WeightsError(OneLineError):
    """Weights are missing, damaged or not those of the module. The message names the tensor, but not the file."""


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    name: str  # in the file
    dtype: str  # safetensors' name, for example "F16"
    shape: list[int]


# Tensors that no picture depends on, by part, with the reason. All other tensors without a place in a module are
# refused.
_HARMLESS = {
    "unet": re.compile(r"(.*\.)?(num_updates|decay|optimization_step)$"),  # counters of an average
    "vae": re.compile(r"(.*\.)?(num_updates|decay|optimization_step)$"),
    "safety_checker": re.compile(r"(.*\.)?position_ids$"),
    "clip": re.compile(r"(.*\.)?position_ids$"),
    "text_encoder": re.compile(
        r"(.*\.)?position_ids$"  # the numbers 0 to L - 1, which the model computes itself
        r"|(.*\.)?(num_updates|decay|optimization_step)$"
        r"|text_projection(\.weight)?$|logit_scale$|visual_projection\.weight$|vision_model\."  # the rest of CLIP
        r"|(pooler|cls|lm_head)\."  # heads for other tasks
        r"|decoder\."  # the other half of T5
    ),
}
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Tensors that accompany quantized weights: scales, zero points and tables, under the names of several libraries.
_QUANTIZED = re.compile(
    r"(.*[.:])?("
    r"weight_scale\w*|scale_weight|input_scale\w*|scale_input|output_scale|[kv]_scale|scaled_fp8|comfy_quant|"
    r"SCB|CB|weight_format|(nested_)?absmax|(nested_)?quant_map|quant_state\b.*|quant_state__.*|"
    r"qweight|qzeros|scales|zeros|wscales|wzeros|g_idx|zero_point|weight_zero_point|weight_packed|weight_shape|"
    r"[wW]_q|_packed_params\b.*|_data|_scale|_shift|int_data|qdata|weight_qdata|tensor_impl\b.*|\w*_quantizer\b.*"
    r")"
)
# Segments that torch.compile, FSDP and activation checkpointing insert into names.
_INSIDE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")


def choose_weights(part: str, names: Iterable[str]) -> tuple[str | None, list[str]]:
    """Choose the files of a part's weights.

    Full weights are preferred to the variant "fp16", and one file to several.

    Args:
        part: the folder's name, for example "unet".
        names: the files in it.

    Returns:
        (variant, names): the variant for `from_pretrained`, None or "fp16", and the files.

    Raises:
        WeightsError: there are no weights in safetensors.
    """
    names = sorted(names)
    stem = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"  # of diffusers, and of transformers
    for variant, middle, shards in (
        (None, "", rf"{stem}-\d+-of-\d+\.safetensors"),
        ("fp16", ".fp16", rf"{stem}(\.fp16-\d+-of-\d+|-\d+-of-\d+\.fp16)\.safetensors"),  # new and old style
    ):
        single, index = f"{stem}{middle}.safetensors", f"{stem}.safetensors.index{middle}.json"
        if single in names:
            return variant, [single]
        if index in names:
            return variant, [index, *(name for name in names if re.fullmatch(shards, name))]
    lacks = f"{part} has no {stem}.safetensors, nor shards or an fp16 variant of it"
    if pickle := next((name for name in names if name.endswith((".bin", ".ckpt", ".pt", ".pth"))), None):
        remedy = "save the model again with save_pretrained and safe_serialization=True"
        raise WeightsError(f"{lacks} (found: {pickle}, a pickle, which is never loaded: {remedy})")
    found = next((name for name in names if name.endswith((".safetensors", ".msgpack", ".h5", ".onnx"))), "none")
    raise WeightsError(f"{lacks} (found: {found})")


def read_headers(path: Path) -> dict[str, Stored]:
    """Return the tensors in a safetensors file by name, without their values.

    Raises:
        WeightsError: the file is of another kind, or damaged. The message begins with a verb.
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Stored(path, name, s.get_dtype(), s.get_shape()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(not_safetensors(path) if is_file(path) else f"cannot be read: {error}") from error


def check_stored(found: Mapping[str, Stored], part: str) -> None:
    """Raise WeightsError for quantized weights, because their numbers mean nothing without scales."""
    remedy = "expected float32, float16 or bfloat16: take the weights that it was quantized from"
    own = [name for name in found if not is_harmless(part, name)]
    if scales := sorted(name for name in own if _QUANTIZED.fullmatch(name)):
        raise WeightsError(f"is quantized: it has {scales[0]} ({len(scales)} such tensors in all); {remedy}")
    for name in own:
        if found[name].dtype not in _FLOATS and name.endswith(("weight", "bias")):
            raise WeightsError(f"stores {name} as {found[name].dtype}; {remedy}")


def is_harmless(part: str, name: str) -> bool:
    """Say whether a tensor without a place in a part's module may be ignored."""
    pattern = _HARMLESS.get(part)
    return pattern is not None and pattern.match(name) is not None


def has_wrappers(found: Collection[str]) -> bool:
    """Say whether names hold segments of compilers or wrappers, or all have the same first segment."""
    return any(_INSIDE.search(name) for name in found) or len(_firsts(found)) == 1


def without_wrappers(found: Mapping[str, Stored], expected: Collection[str]) -> tuple[dict[str, Stored], str]:
    """Remove the prefixes of compiled and wrapped modules from names.

    A first segment that all names share, but no expected name has, is removed if the rest are expected names.

    Args:
        found: tensors by their names in files.
        expected: the names of the module's tensors.

    Returns:
        (found, taken): tensors by their clean names, and the removed prefixes as text, "" if there were none.

    Raises:
        WeightsError: two tensors have the same name without their prefixes.
    """
    taken = dict.fromkeys(m for name in found for m in _INSIDE.findall(name))
    names = {name: _INSIDE.sub("", name) for name in found}
    bare, firsts = dict(names), dict[str, None]()
    while len(common := _firsts(bare.values())) == 1 and not common & _firsts(expected):
        (first,) = common
        firsts[f"{first}."] = None
        bare = {name: _INSIDE.sub("", own.removeprefix(f"{first}.")) for name, own in bare.items()}
    if not {*expected} & {*bare.values()}:
        bare, firsts = names, {}  # These are weights of another kind. Their names identify them.
    taken |= firsts
    clean: dict[str, Stored] = {}
    for name, own in bare.items():
        if own in clean:
            raise WeightsError(f"is ambiguous: {clean[own].name} and {name} are the same without prefixes; keep one")
        clean[own] = found[name]
    return clean, ", ".join(taken)


def _firsts(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names if "." in name}


def fill(module: nn.Module, found: Mapping[str, Stored], prefix: str = "", part: str = "") -> None:
    """Fill a module without weights (see `accelerate.init_empty_weights`) from files. Set it to evaluation mode.

    Memory holds the weights once. Weights of the module's own dtype stay mapped to the file until they are written to.
    Others are converted one by one.

    Args:
        module: a module whose parameters are on the meta device.
        found: its tensors in files, by their names in the module.
        prefix: of these names in messages.
        part: "unet", "text_encoder" or "vae", for which some superfluous tensors are ignored.

    Raises:
        WeightsError: the tensors are not exactly those of the module.
    """
    expected = module.state_dict()
    found = {name: stored for name, stored in found.items() if name in expected or not is_harmless(part, name)}
    wrong = sorted(n for n, t in expected.items() if n in found and found[n].shape != list(t.shape))
    misfits = [
        f"{problem} {prefix}{names[0]} ({len(names)} in all)"
        for problem, names in (
            ("lacks tensor", sorted(expected.keys() - found.keys())),
            ("has an unexpected tensor", sorted(found.keys() - expected.keys())),
        )
        if names
    ]
    if wrong:
        is_, should = found[wrong[0]].shape, list(expected[wrong[0]].shape)
        misfits.append(f"has a wrong shape for {prefix}{wrong[0]}: {is_}, not {should} ({len(wrong)} in all)")
    if misfits:
        check_stored(found, part)
        kind = kind_of_weights(found) if len(expected.keys() & found.keys()) == 0 else None
        raise WeightsError(kind or " and ".join(misfits))
    values: dict[str, torch.Tensor] = {}
    for path in {stored.path for stored in found.values()}:
        try:
            # The file is unmapped at the end, so that originals of converted weights do not stay in memory.
            with safe_open(path, "pt") as file:
                for name, stored in found.items():
                    if stored.path == path:
                        values[name] = _converted(file.get_tensor(stored.name), expected[name].dtype, name)
        except SafetensorError as error:
            raise WeightsError(not_safetensors(path)) from error
    module.load_state_dict(values, assign=True)
    module.eval()


def _converted(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if tensor.is_floating_point() != dtype.is_floating_point:  # Quantized weights mean nothing without scales.
        raise WeightsError(f"stores {name} as {tensor.dtype}, which cannot be read as {dtype}")
    return tensor.to(dtype)
