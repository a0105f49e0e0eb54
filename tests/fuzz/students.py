"""Damaged students and pipelines: headers, metadata, configurations, and the tensors that headers tell of."""

import json
import struct
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import strategies as st

from fuzz.cases import TEXTS, VALUES, Case, Draw, dump, edit_bytes, edit_json, edited_json

NAME = "student.safetensors"
SINGLE = "single.safetensors"
_DTYPES = st.sampled_from(["F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "I8", "U8", "BOOL", "C64", "F4", "x", ""])


@cache
def whole() -> tuple[dict[str, Any], bytes]:
    """Return the header and the bytes of a student's tensors."""
    import tiny

    from tiue.checkpoint import Student, save_student

    student = Student(tiny.sd15(), 751, {1: [751], 4: [751, 501, 251, 1]}, provenance={"data": "none"})
    with TemporaryDirectory() as folder:
        save_student(Path(folder) / NAME, student)
        data = (Path(folder) / NAME).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def written(header: bytes, tensors: bytes, size: int | None = None) -> bytes:
    """Put a safetensors file together."""
    return struct.pack("<Q", (len(header) if size is None else size) % 2**64) + header + tensors


def undamaged() -> dict[str, bytes]:
    """Return a student file of which nothing was changed."""
    header, tensors = whole()
    return {NAME: written(json.dumps(header).encode(), tensors)}


@cache
def pipeline() -> dict[str, bytes]:
    """Return the files of a pipeline directory, and beside it those of a single file in the original layout."""
    import tiny
    from safetensors.torch import save_file

    with TemporaryDirectory() as folder:
        root = tiny.save_pipeline(tiny.sd15(), Path(folder) / "base")
        tiny.save_clip_tokenizer(root / "tokenizer", "<|endoftext|>")
        tiny.edit_json(root / "model_index.json", tokenizer=["transformers", "CLIPTokenizer"])
        tiny.edit_json(root / "text_encoder" / "config.json", vocab_size=520)
        embedding = "text_model.embeddings.token_embedding.weight"
        _widen(root / "text_encoder" / "model.safetensors", embedding, 520)
        (root / "README.md").write_text("---\nlicense: mit\n---\n")
        save_file(tiny.original_layout(tiny.sd15()), Path(folder) / SINGLE)
        _widen(Path(folder) / SINGLE, f"cond_stage_model.transformer.{embedding}", 520)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _widen(path: Path, name: str, rows: int) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors[name] = tensors[name].repeat(1 + rows // len(tensors[name]), 1)[:rows].contiguous()
    save_file(tensors, path, {"format": "pt"})


@st.composite
def pipelines(draw: Draw) -> Case:
    """A pipeline directory, or a single file with one as its base, with something wrong."""
    files = dict(pipeline())
    single = draw(st.sampled_from([False, False, True]))
    edits: list[str] = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        name = SINGLE if single and draw(st.booleans()) else draw(st.sampled_from(sorted(set(files) - {SINGLE})))
        files[name], said = _damaged(draw, name, files[name])
        edits.append(f"{name}: {said}")
        if said == "missing":
            del files[name]
            break
    return Case(files, tuple(edits), {"source": SINGLE if single else "base"})


def _damaged(draw: Draw, name: str, data: bytes) -> tuple[bytes, str]:
    kind = draw(st.sampled_from(["content"] * 8 + ["bytes", "bytes", "missing"]))
    if kind == "missing":
        return data, kind
    if kind == "bytes" or name.endswith((".txt", ".md")):
        return edit_bytes(draw, data)
    if name.endswith(".json"):
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            return data, "was changed before"
        data, edits = edited_json(draw, content)
        return data, "; ".join(edits)
    try:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        edit = _other_tensor(draw, header)
    except (ValueError, RecursionError, struct.error):
        return data, "was changed before"
    return written(dump(header).encode(errors="replace"), data[8 + size :]), edit


@st.composite
def student_files(draw: Draw) -> Case:
    """A student file with something wrong."""
    header, tensors = whole()
    header = dict(header)
    kind = draw(st.sampled_from(["metadata", "metadata", "metadata", "tensor", "tensor", "header", "bytes", "size"]))
    if kind == "metadata":
        return _other_metadata(draw, header, tensors)
    if kind == "tensor":
        edits = [_other_tensor(draw, header) for _ in range(draw(st.integers(1, 2)))]
        data = written(dump(header).encode(), tensors)
        return Case({NAME: data}, tuple(edits))
    if kind == "header":
        text, edits = edited_json(draw, header)
        return Case({NAME: written(text, tensors)}, edits)
    data = written(dump(header).encode(), tensors)
    if kind == "bytes":
        data, said = edit_bytes(draw, data)
        return Case({NAME: data}, (said,))
    size = draw(st.sampled_from([0, 1, 7, 8, 100, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]))
    return Case({NAME: written(dump(header).encode(), tensors, size)}, (f"header of {size} bytes",))


def _other_metadata(draw: Draw, header: dict[str, Any], tensors: bytes) -> Case:
    metadata = dict(header["__metadata__"])
    key = draw(st.sampled_from([*sorted(metadata), "aliases", "licence", "new"]))
    how = draw(st.sampled_from(["inside", "inside", "inside", "text", "drop", "value"]))
    said: tuple[str, ...] = ()
    if how == "inside" and key in metadata:
        content = json.loads(metadata[key])
        if isinstance(content, dict | list):
            for _ in range(draw(st.integers(1, 2))):
                if isinstance(content, dict):
                    content, one = edit_json(draw, content, VALUES)
                    said = (*said, one)
        else:
            content = draw(VALUES)
        metadata[key] = dump(content)
    elif how == "text":
        metadata[key] = draw(st.one_of(TEXTS, st.sampled_from(sorted(metadata.values()))))
    elif how == "drop":
        metadata.pop(key, None)
    else:
        metadata[key] = dump(draw(st.one_of(VALUES, _ALIASES)))
    said = said or (str(metadata.get(key))[:60],)
    header["__metadata__"] = metadata
    return Case({NAME: written(dump(header).encode(errors="replace"), tensors)}, (f"{key} {how}", *said))


_ALIASES = st.dictionaries(
    st.sampled_from(["unet.a", "unet.conv_in.weight", "vae.x", "a", ""]), st.one_of(TEXTS, VALUES)
)


def _other_tensor(draw: Draw, header: dict[str, Any]) -> str:
    """Change what the header says of one tensor; most changes keep the number of bytes."""
    names = sorted(name for name in header if name != "__metadata__")
    name = draw(st.sampled_from(names))
    if not isinstance(header[name], dict) or not isinstance(header[name].get("shape"), list):
        return f"{name} was changed before"
    own = dict(header[name])
    kind = draw(st.sampled_from(["shape", "type", "rename", "drop", "offsets", "swap", "same", "json", "add"]))
    if kind == "shape":
        size = 1
        for side in own["shape"]:
            size *= side if isinstance(side, int) else 1
        own["shape"] = draw(
            st.sampled_from([[], [size], [1, size], [size, 1, 1, 1], [0], [2**40], [2**32, 2**32], [-1]])
        )
    elif kind == "type":
        own["dtype"] = draw(_DTYPES)
        if own["dtype"] in ("F16", "BF16") and draw(st.booleans()):
            own["shape"] = [*own["shape"], 2]
    elif kind in ("rename", "drop"):
        del header[name]
        if kind == "rename":
            new = draw(
                st.sampled_from(
                    [
                        f"module.{name}",
                        f"_orig_mod.{name}",
                        f"{name}.weight_scale",
                        name[1:],
                        "unet.",
                        "x",
                        "other.weight",
                    ]
                )
            )
            header[new] = own
            return f"rename {name} => {new}"
        return f"drop {name}"
    elif kind == "offsets":
        own["data_offsets"] = draw(
            st.one_of(
                st.lists(st.integers(-1, 2**64), max_size=3),
                st.sampled_from([[0, 0], [4, 0], [0, 2**63], own["data_offsets"][::-1]]),
            )
        )
    elif kind == "swap":
        other = draw(st.sampled_from(names))
        if other in header:
            header[other], own = own, header[other]
    elif kind == "same":
        own = dict(own | header[draw(st.sampled_from([n for n in names if isinstance(header.get(n), dict)]))])
    elif kind == "json":
        own, _ = edit_json(draw, own, VALUES)
    else:
        header[draw(TEXTS)] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header[name] = own
    return f"{kind} {name} => {str(own)[:60]}"
