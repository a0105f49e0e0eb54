"""Damaged bundles: bundle.json, tokenizer.json beside it, graphs, and files with the weights of graphs."""

import hashlib
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzz import graphs, tokenizers
from fuzz.cases import VALUES, Case, Draw, edit_bytes, edited_json

DATA = Path(__file__).parents[2] / "runtime/tests/data"
OUTSIDE = "outside.data"  # a file beside the bundle's directory, with weights that would fit


def read(name: str) -> dict[str, bytes]:
    """Read the files of a bundle of the runtime's tests."""
    return {path.name: path.read_bytes() for path in sorted((DATA / name).iterdir())}


BUNDLES = {name: read(name) for name in ("tiny", "heavy")}


def listed(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files of a bundle with a bundle.json that lists them as they are."""
    content = json.loads(files["bundle.json"])
    content["files"] = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in files.items()
        if name != "bundle.json" and not name.startswith("..")
    }
    return {**files, "bundle.json": json.dumps(content).encode()}


@st.composite
def manifests(draw: Draw) -> Case:
    """A bundle with another bundle.json."""
    files = BUNDLES[draw(st.sampled_from(["tiny", "tiny", "heavy"]))]
    content = json.loads(files["bundle.json"])
    data, edits = edited_json(draw, content, st.one_of(VALUES, st.sampled_from(list(content.values()))))
    return Case({**files, "bundle.json": data}, edits)


@st.composite
def tokenizer_files(draw: Draw) -> Case:
    """A bundle with another tokenizer.json."""
    data, edits = tokenizers.damaged(draw)
    return Case(listed({**BUNDLES["tiny"], "tokenizer.json": data}), edits, {"prompt": draw(tokenizers.PROMPTS)})


@st.composite
def graph_files(draw: Draw) -> Case:
    """A bundle with another graph."""
    files = BUNDLES[draw(st.sampled_from(["tiny", "tiny", "tiny", "heavy"]))]
    name = draw(st.sampled_from(sorted(name for name in files if name.endswith(".onnx"))))
    data, edits = graphs.damaged(draw, files[name])
    return Case(listed({**files, name: data}), (name, *edits))


@st.composite
def external_files(draw: Draw) -> Case:
    """A bundle whose graphs keep weights in other files, and something about these that is wrong."""
    files = dict(BUNDLES["tiny"])
    name = draw(st.sampled_from(sorted(name for name in files if name.endswith(".onnx"))))
    kind = draw(st.sampled_from(["location", "location", "offset", "content", "size", "stale", "graph"]))
    if kind == "location":
        location = draw(LOCATIONS)
        files[name], data = graphs.with_external(files[name], location)
        files["weights.data"] = files[f"../{OUTSIDE}"] = data
        # A location that the bundle does not list must be refused, wherever it leads.
        known = location == "weights.data"
        return Case(listed(files), (name, f"location {location[:60]!r}"), {"refuse": not known})
    files[name], files["weights.data"] = graphs.with_external(files[name], "weights.data")
    whole = listed(files)
    about: dict[str, Any] = {}
    if kind == "offset":
        keys = draw(st.lists(st.tuples(st.sampled_from(["offset", "length", "checksum", "x"]), OFFSETS), min_size=1))
        whole[name], _ = graphs.with_external(BUNDLES["tiny"][name], "weights.data", tuple(keys))
        whole, edits = listed(whole), (str(keys),)
    elif kind == "content":
        whole["weights.data"], said = edit_bytes(draw, whole["weights.data"])
        whole, edits = listed(whole), (said,)
    elif kind == "size":  # bundle.json tells the truth about files that do not suffice
        whole["weights.data"] = whole["weights.data"][: draw(st.integers(0, len(whole["weights.data"])))]
        whole, edits = listed(whole), (f"truncated to {len(whole['weights.data'])}",)
    elif kind == "stale":  # bundle.json tells of other files than these
        changed = draw(st.sampled_from(sorted(set(whole) - {"bundle.json"})))
        before = whole[changed]
        whole[changed], said = edit_bytes(draw, before)
        about["stale"] = whole[changed] != before
        edits = (f"{changed}: {said}",)
    else:
        whole[name], edits = graphs.damaged(draw, whole[name])
        whole = listed(whole)
    return Case(whole, (name, kind, *edits), about)


LOCATIONS = st.one_of(
    st.sampled_from(
        [
            "weights.data",
            "./weights.data",
            f"../{OUTSIDE}",
            f"parts/../../{OUTSIDE}",
            "/etc/passwd",
            "/dev/zero",
            "/dev/stdin",
            "/proc/self/mem",
            ".",
            "..",
            "",
            "nothing.data",
            "bundle.json",
            "weights.data\0",
            "*/_ORT_MEM_ADDR_/*",
            "x" * 5000,
            "C:\\weights.data",
            "file:///etc/passwd",
            "WEIGHTS.DATA",
            "weights.data ",
        ]
    ),
    st.text(max_size=12),
)
OFFSETS = st.one_of(
    st.sampled_from(
        ["0", "-1", "1", "3", "4096", "9223372036854775807", "18446744073709551615", "1e3", "", "x", "0x10"]
    ),
    st.integers(-(2**66), 2**66).map(str),
)
