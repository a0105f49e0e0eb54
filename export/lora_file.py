"""Reading a LoRA: its pairs of factors, under the names of kohya's scripts, diffusers (old and new) and peft.

A pair (A, B) with its scale changes one layer: W + scale * B A. The scale is alpha / rank. kohya writes alpha beside
the factors, diffusers into the file's metadata, and peft into adapter_config.json. Without one, alpha is the rank.

diffusers' own loader was no help here: version 0.37 takes only one alpha where a file has several.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from export.errors import ExportError
from tiue.files import is_directory, is_file, shortened
from tiue.recognize import kind_of_weights
from tiue.weights import WeightsError, read_headers

# The ends of tensors' names, in the order: kohya, peft, diffusers of 2022, diffusers of 2023.
_DOWN = re.compile(r"(.+?)(\.lora_down|\.lora_A(\.default)?|_lora\.down|\.lora(_linear_layer)?\.down)\.weight")
_UP = re.compile(r"(.+?)(\.lora_up|\.lora_B(\.default)?|_lora\.up|\.lora(_linear_layer)?\.up)\.weight")
_ALPHA = re.compile(r"(.+)\.alpha")
# Relatives of LoRA, by their tensors.
_OTHER_KINDS = (
    (r"(.*\.)?hada_", "LoHa"),
    (r"(.*\.)?lokr_", "LoKr"),
    (r"(.*\.)?oft_", "OFT"),
    (r"(.*\.)?(dora_scale|lora_magnitude_vector)", "DoRA"),
    (r"(.*\.)?lora_mid\.", "LoCon with a third factor"),
    (r"lora_te2_|text_encoder_2\.", "LoRA of Stable Diffusion XL"),
    (r"(lora_)?transformer[_.]", "LoRA of a diffusion transformer"),
)
_PEFT = "base_model.model."  # begins the names in a file of peft
_DIFFUSERS_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Pair:
    """The factors that change one layer."""

    down: Tensor  # A: (rank, in), or (rank, in, height, width) of a convolution
    up: Tensor  # B: (out, rank), or (out, rank, 1, 1)
    down_name: str  # in the file
    up_name: str
    scale: float  # of their product


def read_lora(path: Path) -> dict[str, Pair]:
    """Read all pairs of a LoRA file.

    Returns:
        Pairs by the name of their layer, as the file writes it: everything before the factor's own name.

    Raises:
        ExportError: the file is missing, of another kind or damaged, or a tensor in it belongs to no pair.
    """
    if is_directory(path):
        raise ExportError(f"{path} is a directory: expected the .safetensors file of a LoRA in it")
    if not is_file(path):
        raise ExportError(f"no such LoRA: {path}")
    try:
        names = sorted(read_headers(path))
    except WeightsError as error:
        raise ExportError(f"{path} {error}") from error
    for pattern, kind in _OTHER_KINDS:
        if other := next((name for name in names if re.match(pattern, name)), None):
            raise ExportError(f"{path} is a {kind}, which is not supported (it has {other}): expected a plain LoRA")
    down, up, alphas = (_by_layer(names, pattern) for pattern in (_DOWN, _UP, _ALPHA))
    if not down and not up:
        what = kind_of_weights(names) or "is not a LoRA"
        raise ExportError(f"{path} {what}; a LoRA has pairs of tensors such as lora_down and lora_up")
    known = {*down.values(), *up.values(), *alphas.values()}
    refuse_unused(path, [name for name in names if name not in known], "no LoRA has such tensors")
    alone = [down.get(layer) or up[layer] for layer in down.keys() ^ up.keys()]
    refuse_unused(path, [*alone, *(alphas[layer] for layer in alphas.keys() - down.keys())], "the pair is not complete")
    with safe_open(path, "pt") as file:
        scales = _Scales(path, names, file.metadata() or {})
        return {
            layer: _pair(path, layer, file, down[layer], up[layer], alphas.get(layer), scales) for layer in sorted(down)
        }


def refuse_unused(path: Path, names: Iterable[str], reason: str) -> None:
    """Raise ExportError for tensors that a merge would not use, and name the first few."""
    found = sorted(names)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ExportError(f"{path}: {', '.join(found[:3])}{more} would not be used: {reason}")


def _by_layer(names: Iterable[str], pattern: re.Pattern[str]) -> dict[str, str]:
    return {match[1]: name for name in names if (match := pattern.fullmatch(name))}


def _pair(
    path: Path, layer: str, file: Any, down_name: str, up_name: str, alpha: str | None, scales: "_Scales"
) -> Pair:
    down, up = (_floats(path, name, file.get_tensor(name)) for name in (down_name, up_name))
    fits = down.ndim in (2, 4) and up.ndim in (2, 4) and 0 < len(down) == up.shape[1] and up.shape[2:].numel() == 1
    if not fits:
        shapes = f"{down_name} {list(down.shape)} and {up_name} {list(up.shape)}"
        raise ExportError(f"{path}: {shapes} do not fit each other: expected [rank, in] and [out, rank]")
    if alpha is None:
        scale = scales.of(layer, len(down))
    else:
        value = _floats(path, alpha, file.get_tensor(alpha))
        if value.numel() != 1:
            raise ExportError(f"{path}: {alpha} has the shape {list(value.shape)}: expected one number")
        scale = value.item() / len(down)
    return Pair(down, up, down_name, up_name, scale)


def _floats(path: Path, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor as float32. Raises ExportError for values that are not finite."""
    if not tensor.is_floating_point() and tensor.numel() != 1:  # Some files hold alpha as an integer.
        raise ExportError(f"{path} stores {name} as {tensor.dtype}: expected float32, float16 or bfloat16")
    values = tensor.float()
    if not values.isfinite().all():
        raise ExportError(f"{path}: {name} holds infinity or NaN: the file is damaged")
    return values


class _Scales:
    """The scales of pairs whose alpha is not among the tensors."""

    def __init__(self, path: Path, names: Iterable[str], metadata: Mapping[str, str]) -> None:
        self._path, self._settings, self._prefixed = path, {}, False
        if text := metadata.get(_DIFFUSERS_METADATA):
            self._settings, self._prefixed = self._parse(text, "its metadata"), True
        elif any(name.startswith(_PEFT) for name in names):
            beside = path.with_name("adapter_config.json")
            if not is_file(beside):
                raise ExportError(f"{path} is a LoRA of peft: {beside.name}, which has its alpha, must lie beside it")
            try:
                self._settings = self._parse(beside.read_text(encoding="utf-8-sig"), beside.name)
            except (OSError, UnicodeDecodeError) as error:
                raise ExportError(f"{beside} cannot be read: {error}") from error

    def of(self, layer: str, rank: int) -> float:
        """Return alpha / rank of a layer, or alpha / sqrt(rank) of a rank-stabilized LoRA."""
        prefix, _, own = layer.partition(".") if self._prefixed else ("", "", layer.removeprefix(_PEFT))

        def setting(name: str) -> Any:
            return self._settings.get(f"{prefix}.{name}" if prefix else name)

        patterns = setting("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise self._malformed("alpha_pattern", patterns)
        alpha = patterns.get(get_pattern_key(list(patterns), own), setting("lora_alpha"))
        if alpha is None:
            return 1.0
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise self._malformed("lora_alpha", alpha)
        return alpha / (math.sqrt(rank) if setting("use_rslora") else rank)

    def _parse(self, text: str, where: str) -> dict[str, Any]:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ExportError(f"{self._path}: {where} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise ExportError(f"{self._path}: {where} must hold a JSON object")
        return content

    def _malformed(self, name: str, value: Any) -> ExportError:
        return ExportError(f"{self._path}: its configuration has {name} {shortened(repr(value))}")
