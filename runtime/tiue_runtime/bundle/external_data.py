"""The names of the files that hold the weights of an ONNX graph, read without the onnx package.

An ONNX file is a protobuf message. A tensor whose bytes lie in another file names it in its field `external_data`,
under the key "location". Tensors occur in graphs, in attributes of nodes, and in graphs that are attributes. This
module walks through all messages that can hold a tensor. The bytes of tensors are skipped, not read.

ONNX Runtime also opens files that EPContext nodes name. The exporter writes none, and they are refused.
"""

import os
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from tiue_runtime.errors import BundleError

# Message => field number => message of the field, from onnx.proto. Fields without tensors are left out.
_MESSAGES = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {4: "op_type", 5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
    "StringStringEntryProto": {1: "key", 2: "value"},
}
_DEEPEST = 100  # messages inside one another, as in protobuf's own reader
_MOST_FIELDS = 3_000_000  # hundreds of times the fields of SD 2.1's decoder
_LONGEST_TEXT = 4096  # bytes of a key, a location or an operator's name
_WHOLE = 65_536  # bytes of a message that is searched at once


def external_data(path: Path) -> set[str]:
    """Return the locations that the tensors of an ONNX file name, relative to its folder.

    Raises:
        BundleError: the file is not an ONNX graph, or has an EPContext node.
    """
    try:
        with path.open("rb") as file:
            return _Walk(file).locations
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _Damaged as error:
        raise BundleError(f"{path}: not an ONNX graph that can be read: {error}") from error


class _Damaged(Exception):
    pass


class _Walk:
    """One pass over a file."""

    def __init__(self, file: BinaryIO) -> None:
        self.locations: set[str] = set()
        self._file = file
        self._fields = 0
        self._message("ModelProto", os.fstat(file.fileno()).st_size, 0)

    def _message(self, kind: str, end: int, depth: int) -> None:
        """Read the message that begins here and ends at `end`."""
        if depth > _DEEPEST:
            raise _Damaged(f"messages are nested deeper than {_DEEPEST}")
        texts: dict[str, str] = {}
        for number, start, stop in self._lengths(end):
            inner = _MESSAGES[kind].get(number)
            if inner in _MESSAGES:
                if self._may_name_files(stop - start):
                    self._message(inner, stop, depth + 1)
            elif inner is not None:
                texts[inner] = self._text(stop - start)
                if inner == "op_type" and texts[inner] == "EPContext":
                    raise _Damaged("it has an EPContext node, which is compiled for one device")
            self._file.seek(stop)
        if texts.get("key") == "location":
            self.locations.add(texts.get("value", ""))

    def _may_name_files(self, length: int) -> bool:
        """Say whether the message here is large or contains a relevant word. This avoids reading most nodes."""
        if length > _WHOLE:
            return True
        start = self._file.tell()
        data = self._file.read(length)
        self._file.seek(start)
        return b"location" in data or b"EPContext" in data

    def _text(self, length: int) -> str:
        if length > _LONGEST_TEXT:
            raise _Damaged(f"a name has {length:,} bytes")
        return self._file.read(length).decode("utf-8", "replace")

    def _lengths(self, end: int) -> Generator[tuple[int, int, int]]:
        """Yield (field number, start, end) of every field that has a length. Skip the others."""
        while (position := self._file.tell()) < end:
            self._fields += 1
            if self._fields > _MOST_FIELDS:
                raise _Damaged(f"it has more than {_MOST_FIELDS:,} fields")
            tag = self._varint()
            size = {0: 0, 1: 8, 5: 4}.get(tag & 7)
            if tag & 7 == 0:
                self._varint()
            elif tag & 7 == 2:
                size = self._varint()
            if size is None or tag >> 3 == 0:
                raise _Damaged(f"no field begins at byte {position}")
            start = self._file.tell()
            if start + size > end:
                raise _Damaged(f"the field at byte {position} is cut off")
            if tag & 7 == 2:
                yield tag >> 3, start, start + size
            else:
                self._file.seek(start + size)

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._file.read(1)
            if not byte:
                raise _Damaged("it ends too early")
            value |= (byte[0] & 127) << shift
            if byte[0] < 128:
                return value
        raise _Damaged("a number has more than 10 bytes")
