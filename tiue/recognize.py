"""Recognizing an unexpected file of weights: its kind, and the remedy."""

import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

_PICKLE = (
    "is a pickle of PyTorch, which can run programs and is never loaded: "
    "save it again as .safetensors with a program that you trust"
)
_MESSAGES_BY_SUFFIX = {
    ".ckpt": _PICKLE,
    ".pt": _PICKLE,
    ".pth": _PICKLE,
    ".bin": _PICKLE,
    ".pkl": _PICKLE,
    ".onnx": "is an ONNX graph, which is exported already: give the PyTorch weights that it was made from",
    ".gguf": "is a GGUF file of quantized weights: give the .safetensors that it was made from",
    ".msgpack": "is a file of Flax: save the model again as .safetensors with diffusers (from_flax=True)",
    ".h5": "is a file of TensorFlow: give the .safetensors of the same model",
}
_MESSAGES_BY_HEAD = (
    (b"version https://git-lfs", "is a Git LFS pointer instead of the file: run `git lfs pull` in its folder"),
    (b"GGUF", _MESSAGES_BY_SUFFIX[".gguf"]),
    (b"\x80\x02", _PICKLE),  # from PyTorch before 1.6
    (b"\x80\x03", _PICKLE),
    (b"\x80\x04", _PICKLE),
    (b"\x80\x05", _PICKLE),
    (b"\x89HDF", _MESSAGES_BY_SUFFIX[".h5"]),
    (b"\x1f\x8b", "is a gzip archive: unpack it first"),
    (b"7z\xbc\xaf", "is a 7z archive: unpack it first"),
    (b"Rar!", "is a RAR archive: unpack it first"),
    (b"%PDF", "is a PDF document instead of weights"),
)
_WEB_PAGE = (
    "is a web page that was saved under this name: download the file itself "
    "(on the Hugging Face Hub, addresses of files have /resolve/ in place of /blob/)"
)
_AGAIN = "download or copy it again"
_HEADER = 8  # bytes at the beginning of a safetensors file, which hold the length of its header
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library


def not_safetensors(path: Path) -> str:
    """Say why a file is not a readable safetensors file, and the remedy, in a clause such as "is empty: ..."."""
    size = path.stat().st_size
    if size == 0:
        return f"is empty: {_AGAIN}"
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return _WEB_PAGE
    for start, message in _MESSAGES_BY_HEAD:
        if head.startswith(start):
            return message
    if head.startswith(b"PK\x03\x04"):
        return _zip_archive(path)
    if path.suffix.lower() in _MESSAGES_BY_SUFFIX:
        return _MESSAGES_BY_SUFFIX[path.suffix.lower()]
    if text.startswith(b"{"):
        return f"is a text of JSON instead of weights (perhaps an error of the server): {_AGAIN}"
    if not head.strip(b"\0"):
        return f"holds zeros only, which a broken download leaves: {_AGAIN}"
    return _truncated(path, size, head) or f"is not a safetensors file, or is damaged: {_AGAIN}"


def _zip_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        names = []  # The archive is cut short.
    is_pickle = any(name.endswith("data.pkl") for name in names) or (not names and path.suffix.lower() != ".zip")
    return _PICKLE if is_pickle else "is a zip archive: unpack it first"


def _truncated(path: Path, size: int, head: bytes) -> str | None:
    header = int.from_bytes(head[:_HEADER], "little")
    if size < _HEADER or header > _LONGEST_HEADER or head[_HEADER : _HEADER + 1] not in (b"{", b""):
        return None
    whole = _HEADER + header
    if size >= whole:
        with path.open("rb") as file:
            file.seek(_HEADER)
            try:
                tensors = json.loads(file.read(header))
                whole += max((t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"), default=0)
            except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
                return None
    if size >= whole:
        return None
    return f"is damaged, or cut short: it has {size:,} of at least {whole:,} bytes: {_AGAIN}"


_ORIGINAL_UNET = r"(model\.diffusion_model\.)?(input_blocks|output_blocks|middle_block|time_embed)\."
_ORIGINAL = r"(model\.diffusion_model|first_stage_model|cond_stage_model)\."
_DIFFUSERS_UNET = r"(?!.*(encoder|decoder)\.)(\w+\.)*(down_blocks|up_blocks|mid_block|time_embedding)\."
_FAMILY = "expected the UNet of a Stable Diffusion 1.x or 2.x model"
# Pattern => kind. The first row whose pattern matches a name in the file gives the file's kind.
_KINDS = (
    (
        r"(lora_(unet|te\d?|transformer)_|.*\.lora_(A|B|up|down)\b|.*\.lora\.(up|down)\.|.*_lora\.(up|down)\."
        r"|.*\.(hada_w1_a|lokr_w1|lokr_w1_a|oft_blocks|dora_scale)\b)",
        "is a LoRA (changes to a model, not a model): export its model, and name this file in `lora`; for training, "
        "merge it first, with `load_lora_weights`, `fuse_lora` and `save_pretrained` of diffusers",
    ),
    (
        r"(control_model\.|controlnet_|.*controlnet_cond_embedding|input_hint_block|zero_convs)",
        f"is a ControlNet: {_FAMILY}",
    ),
    (r"(image_proj|ip_adapter)\.", f"is an IP-Adapter: {_FAMILY}"),
    (r".*motion_modules\.", f"is a motion module of AnimateDiff: {_FAMILY}"),
    (r"(emb_params|string_to_param|clip_l|clip_g)$", f"is an embedding (textual inversion): {_FAMILY}"),
    (
        r"(conditioner\.embedders\.|(model\.diffusion_model\.)?label_emb\.|add_embedding\.)",
        f"is a Stable Diffusion XL model: {_FAMILY}",
    ),
    (
        r"(model\.diffusion_model\.)?(joint_blocks|joint_transformer_blocks|pos_embed\.proj)",
        f"is a Stable Diffusion 3 model: {_FAMILY}",
    ),
    (
        r"(model\.diffusion_model\.)?(double_blocks|single_blocks|single_transformer_blocks)\.",
        f"is a Flux model: {_FAMILY}",
    ),
    (r"(adaln_single|caption_projection)\.", f"is a PixArt model (a transformer): {_FAMILY}"),
    (r"transformer_blocks\.", f"is a diffusion transformer: {_FAMILY}"),
    (
        r"(text_model\.|transformer\.text_model\.|cond_stage_model\.|embeddings\.word_embeddings|bert\.|shared\.weight"
        r"|encoder\.block\.|encoder\.layer\.|text_projection|transformer\.resblocks\.|model\.embed_tokens)",
        f"holds a text encoder alone: {_FAMILY}",
    ),
    (
        r"(first_stage_model\.|decoder\.(conv_in|mid|up|layers|mid_block|up_blocks)\b|encoder\.(conv_in|down|layers)\b"
        r"|post_quant_conv|quant_conv|taesd_|vae_)",
        f"holds a VAE alone: {_FAMILY}",
    ),
)


def is_original_layout(names: Iterable[str]) -> bool:
    """Say whether tensors are named as in CompVis's code and A1111's single files."""
    names = list(names)
    return any(re.match(_ORIGINAL_UNET, name) for name in names) and not any(
        re.match(_DIFFUSERS_UNET, name) for name in names
    )


def is_single_file(names: Iterable[str]) -> bool:
    """Say whether a file holds several parts of a model in the original layout."""
    names = list(names)
    return is_original_layout(names) and len({m[1] for name in names if (m := re.match(_ORIGINAL, name))}) > 1


def kind_of_weights(names: Iterable[str]) -> str | None:
    """Recognize, by tensors' names, a file that does not hold the weights of one UNet.

    Returns:
        A clause with the kind and the remedy, for example "is a LoRA ...". None for a UNet and for unknown kinds.
    """
    names = list(names)
    if any(re.match(_DIFFUSERS_UNET, name) for name in names):
        kinds = _KINDS[:7]  # other kinds of UNets, and additions to UNets
    elif is_original_layout(names):
        kinds = _KINDS[:7]
    else:
        kinds = _KINDS
    for pattern, message in kinds:
        if any(re.match(pattern, name) for name in names):
            return message
    return None
