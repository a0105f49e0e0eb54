"""Weights in safetensors files: which of a folder's to read, and filling a module with exactly those it calls for."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn


class WeightsError(ValueError):
    """Weights are missing, damaged or not those of the module; the message says which, but not of which file."""


def choose_weights(part: str, names: Iterable[str]) -> tuple[str | None, list[str]]:
    """Of the files in a part's folder, those to read its weights from.

    Weights stored in full are preferred to the variant "fp16", which is taken where it is all there is, and one file
    to several.

    Args:
        part: the folder's name, e.g. "unet".
        names: of the files in it.

    Returns (variant, names): the variant, None or "fp16", as `from_pretrained` takes it, and the files.
    Raises WeightsError if there is none in safetensors.
    """
    names = sorted(names)
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    for variant, middle, shards in (
        (None, "", rf"{stem}-\d+-of-\d+\.safetensors"),
        ("fp16", ".fp16", rf"{stem}(\.fp16-\d+-of-\d+|-\d+-of-\d+\.fp16)\.safetensors"),  # new and old style
    ):
        single, index = f"{stem}{middle}.safetensors", f"{stem}.safetensors.index{middle}.json"
        if single in names:
            return variant, [single]
        if index in names:
            return variant, [index, *(name for name in names if re.fullmatch(shards, name))]
    found = next((name for name in names if name.endswith((".safetensors", ".bin"))), "none")
    raise WeightsError(f"{part} has no {stem}.safetensors, nor shards or an fp16 variant of it (found: {found})")


def tensor_names(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file. Raises WeightsError if it is damaged, or none."""
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise WeightsError(f"is not a safetensors file, or is damaged: {error}") from error


def fill(module: nn.Module, path: Path, prefix: str = "") -> None:
    """Give a module without weights (see `accelerate.init_empty_weights`) those in a file; set it to evaluation mode.

    Memory holds the weights once: those of the module's own dtype stay mapped to the file, until they are written to;
    others are converted one by one.

    Args:
        path: a safetensors file.
        prefix: of the module's tensors in it; tensors without it are not looked at.

    Raises WeightsError if the file is damaged, or does not hold exactly the tensors that the module calls for.
    """
    expected = module.state_dict()
    try:
        with safe_open(path, "pt") as file:
            given = {name.removeprefix(prefix) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
            shapes = {name: file.get_slice(prefix + name).get_shape() for name in expected.keys() & given}
            wrong = sorted(name for name, shape in shapes.items() if shape != list(expected[name].shape))
            misfits = [
                f"{problem} {prefix}{names[0]} ({len(names)} in all)"
                for problem, names in (
                    ("lacks tensor", sorted(expected.keys() - given)),
                    ("has an unexpected tensor", sorted(given - expected.keys())),
                )
                if names
            ]
            if wrong:
                is_, should = shapes[wrong[0]], list(expected[wrong[0]].shape)
                misfits.append(f"has a wrong shape for {prefix}{wrong[0]}: {is_}, not {should} ({len(wrong)} in all)")
            if misfits:
                raise WeightsError(" and ".join(misfits))
            # The file is unmapped at the end, so what was converted does not stay in memory beside its original.
            module.load_state_dict(
                {name: _as(file.get_tensor(prefix + name), like.dtype, name) for name, like in expected.items()},
                assign=True,
            )
    except SafetensorError as error:
        raise WeightsError(f"is not a safetensors file, or is damaged: {error}") from error
    module.eval()


def _as(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if tensor.is_floating_point() != dtype.is_floating_point:  # quantised weights mean nothing without their scales
        raise WeightsError(f"stores {name} as {tensor.dtype}, which cannot be read as {dtype}")
    return tensor.to(dtype)
