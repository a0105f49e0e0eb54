"""External data of ONNX graphs, found without the onnx package: all places of a name, and hostile files."""

import os
import random
import time
from dataclasses import replace

import pytest
from tiue_runtime import Pipeline
from tiue_runtime.bundle import write_bundle
from tiue_runtime.bundle.external_data import external_data
from tiue_runtime.bundle.manifest import read_manifest
from tiue_runtime.errors import BundleError


def varint(number):
    data = b""
    while number > 127:
        data += bytes([number & 127 | 128])
        number >>= 7
    return data + bytes([number])


def message(field, content):
    """A protobuf field with a length."""
    return varint(field << 3 | 2) + varint(len(content)) + content


def tensor(location, pad=0):
    entry = message(1, b"location") + message(2, location)
    return message(8, b"name") + message(9, b"\0" * pad) + message(13, entry) + varint(14 << 3) + varint(1)


def initializer(inner):
    return message(7, message(5, inner))


def node(attribute):
    return message(7, message(1, message(4, b"Constant") + message(5, attribute)))


WAYS = {
    "an initializer": lambda inner: initializer(inner),
    "a sparse initializer": lambda inner: message(7, message(15, message(1, inner))),
    "its indices": lambda inner: message(7, message(15, message(2, inner))),
    "an attribute": lambda inner: node(message(5, inner)),
    "a list of tensors": lambda inner: node(message(10, inner)),
    "a sparse attribute": lambda inner: node(message(22, message(1, inner))),
    "a list of sparse tensors": lambda inner: node(message(23, message(1, inner))),
    "a branch": lambda inner: node(message(6, message(5, inner))),
    "one of several branches": lambda inner: node(message(11, message(5, inner))),
    "a branch of a branch": lambda inner: node(message(6, message(1, message(5, message(6, message(5, inner)))))),
    "a function": lambda inner: message(25, message(7, message(5, message(5, inner)))),
    "a default of a function": lambda inner: message(25, message(11, message(5, inner))),
    "training": lambda inner: message(20, message(1, message(5, inner))),
    "the second of two graphs": lambda inner: message(7, b"") + initializer(inner),
}


@pytest.mark.parametrize("pad", [0, 100_000])
@pytest.mark.parametrize("wrap", WAYS.values(), ids=WAYS)
def test_every_place_of_a_tensor_is_looked_at(tmp_path, wrap, pad):
    path = tmp_path / "graph.onnx"
    path.write_bytes(varint(1 << 3) + varint(8) + wrap(tensor(b"weights.data", pad)))
    assert external_data(path) == {"weights.data"}


@pytest.mark.parametrize(
    "location",
    [
        b"/etc/passwd",
        b"../weights",
        b"data/../../x",
        b"*/_ORT_MEM_ADDR_/*",
        b"C:\\x",
        b"",
        b"\xff",
        b"README.md\0",
        b"no",
    ],
)
def test_data_that_the_bundle_does_not_list_is_refused(copy, location):
    path = copy / "vae_decoder.onnx"
    path.write_bytes(path.read_bytes() + initializer(tensor(location)))
    bundle = rewritten(copy)
    with pytest.raises(BundleError, match=r"vae_decoder\.onnx: expected external data among the files") as caught:
        bundle.verify()
    assert str(caught.value).replace(str(copy), "").isprintable()
    with pytest.raises(BundleError, match="expected external data among the files"):
        Pipeline.load(copy, device="cpu")


def test_listed_data_is_accepted_and_watched(copy):
    folder = copy / "parts"
    folder.mkdir()
    (folder / "weights.data").write_bytes(b"1234")
    graph = folder / "vae_decoder.onnx"
    graph.write_bytes((copy / "vae_decoder.onnx").read_bytes() + initializer(tensor(b"weights.data")))
    bundle = rewritten(copy, vae_decoder="parts/vae_decoder.onnx")
    bundle.verify()
    bundle.check_graph("vae_decoder")
    (folder / "new").write_bytes(b"1234")
    (folder / "new").replace(folder / "weights.data")
    with pytest.raises(BundleError, match=r"weights\.data changed on disk"):
        bundle.check_graph("vae_decoder")


def test_compiled_graphs_are_refused(copy):
    path = copy / "vae_decoder.onnx"
    path.write_bytes(path.read_bytes() + message(7, message(1, message(4, b"EPContext"))))
    with pytest.raises(BundleError, match="EPContext"):
        rewritten(copy).verify()


HOSTILE = {
    "text": b"not a graph",
    "half a varint": b"\x80",
    "an endless varint": b"\x80" * 20,
    "a field that is cut off": message(7, b"x" * 50)[:20],
    "a length of 2**63": varint(7 << 3 | 2) + varint(2**63),
    "a group": varint(7 << 3 | 3),
    "field 0": varint(2) + b"\0",
    "a long location": initializer(message(13, message(1, b"location") + message(2, b"x" * 100_000))),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_end_in_one_short_line(tmp_path, data):
    path = tmp_path / "graph.onnx"
    path.write_bytes(data)
    with pytest.raises(BundleError, match="not an ONNX graph") as caught:
        external_data(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 200


def test_nesting_has_a_limit(tmp_path):
    inner = tensor(b"x")
    for _ in range(300):
        inner = message(1, message(5, message(6, inner)))
    (tmp_path / "deep.onnx").write_bytes(message(7, inner))
    with pytest.raises(BundleError, match="nested deeper than 100"):
        external_data(tmp_path / "deep.onnx")


def test_many_fields_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("tiue_runtime.bundle.external_data._MOST_FIELDS", 1000)
    (tmp_path / "many.onnx").write_bytes(message(7, b"\x0a\0" * 100_000))
    with pytest.raises(BundleError, match="more than 1,000 fields"):
        external_data(tmp_path / "many.onnx")


def test_damaged_graphs_raise_nothing_else(tiny, tmp_path):
    draw = random.Random(0)
    original = (tiny / "unet_decoder.onnx").read_bytes() + initializer(tensor(b"weights.data"))
    path = tmp_path / "graph.onnx"
    found = refused = 0
    for _ in range(500):
        data = bytearray(original)
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: draw.randint(0, len(data))] if draw.random() < 0.2 else data)
        try:
            found += external_data(path) == {"weights.data"}
        except BundleError:
            refused += 1
    assert found > 50 and refused > 50


def test_weights_are_not_read(tmp_path):
    """A file of 1 GB is searched in well under a second, because the bytes of tensors are skipped."""
    path = tmp_path / "large.onnx"
    size = 10**9
    head = message(5, tensor(b"first"))
    large = varint(5 << 3 | 2) + varint(size + 6) + varint(9 << 3 | 2) + varint(size)
    tail = message(5, tensor(b"last"))
    with path.open("wb") as file:
        file.write(varint(7 << 3 | 2) + varint(len(head) + len(large) + size + len(tail)) + head + large)
        file.seek(size, os.SEEK_CUR)
        file.write(tail)
    begun = time.process_time()
    assert external_data(path) == {"first", "last"}
    assert time.process_time() - begun < 1


def rewritten(directory, **graphs):
    """Write bundle.json again for a directory with changed files. Returns the bundle."""
    manifest = read_manifest((directory / "bundle.json").read_bytes())
    variants = {"portable": {**manifest.variants["portable"], **graphs}}
    return write_bundle(directory, replace(manifest, files={}, variants=variants))
