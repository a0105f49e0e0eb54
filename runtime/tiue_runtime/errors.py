"""The exceptions of this package, for problems that the caller can fix. All are ValueErrors."""

import errno
import reprlib

SHOWN = 100  # characters of a value in a message
_LONGEST = 1000  # characters of a message


class TiueError(ValueError):
    """Base of every error that tiue_runtime raises on purpose. Its message is always one line."""

    def __init__(self, message: str = "") -> None:
        """Take a message. Characters that a terminal cannot print, control codes among them, become escapes."""
        super().__init__(_cut(_escaped(message[: _LONGEST + 1]), _LONGEST))


class BundleError(TiueError):
    """A bundle is missing, damaged, of another format, or breaks its contract."""


class DeviceError(TiueError):
    """The requested device, or ONNX Runtime itself, cannot be used as installed."""


class RequestError(TiueError):
    """An argument of a generation request is wrong."""


class Cancelled(TiueError):
    """The request was asked to stop, or took longer than its timeout."""


class InferenceError(TiueError):
    """A graph failed while running, or computed values that are not finite."""


class OutOfMemoryError(InferenceError):
    """There was not enough memory to load a graph, or to run it on the smallest part of the request."""


class LoadingError(OutOfMemoryError):
    """There was not enough memory to load a graph. Smaller runs of it do not help."""


# Phrases of exhausted allocators, in lower case. They come from the C++ library, operating systems, ONNX Runtime's
# arena, OpenVINO ("Failed to allocate 123 bytes of memory"), CUDA, cuBLAS and cuDNN. Version 9 of cuDNN puts more words
# between INTERNAL_ERROR and ALLOCATION_FAILED.
_EXHAUSTED = (
    "bad_alloc",
    "bad allocation",
    "cannot allocate memory",
    "failed to allocate memory",
    "smaller than requested bytes",
    "bfcarena",
    "bytes of memory",
    "out of memory",
    "can't start new thread",
    "cudaerrormemoryallocation",
    "_alloc_failed",
    "allocation_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an exception of Python or ONNX Runtime means that memory ran out."""
    said = str(error).lower()
    return isinstance(error, MemoryError | OutOfMemoryError) or any(phrase in said for phrase in _EXHAUSTED)


# What to do about an error of the operating system.
_REMEDIES = {
    errno.ENOENT: "make the folder first, or choose another one",
    errno.ENOTDIR: "choose another folder",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder on another disk",
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "free some space, or choose a folder on another disk",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def remedy(error: Exception) -> str:
    """Say what to do about an error of writing a file. Returns "" if that is not known."""
    return _REMEDIES.get(getattr(error, "errno", 0), "")


def reason(error: Exception) -> str:
    """Return the operating system's words for an error, or the error's own."""
    return getattr(error, "strerror", "") or str(error)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxlong = _repr.maxother = 4 * SHOWN
_repr.maxlist = _repr.maxtuple = _repr.maxdict = _repr.maxset = _repr.maxfrozenset = _repr.maxdeque = SHOWN


def shorten(value: object) -> str:
    """Return the repr of a value for a message: one line of at most SHOWN characters."""
    try:
        return clip(_repr.repr(value[: 4 * SHOWN] if isinstance(value, str | bytes) else value))
    except Exception:  # Python refuses to print integers of thousands of digits, and a foreign repr may fail.
        return f"a {type(value).__name__} that cannot be shown"


def clip(text: str, most: int = SHOWN) -> str:
    """Return text for a message: one line of at most `most` printable characters."""
    return _cut(_escaped(" ".join(text[: 4 * most].split())), most)


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
