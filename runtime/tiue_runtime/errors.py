"""What this package raises for problems that its caller can fix. All are ValueErrors."""


class TiueError(ValueError):
    """Base of every error that tiue_runtime raises on purpose."""


class BundleError(TiueError):
    """A bundle is missing, damaged, of another format, or breaks its contract."""


class DeviceError(TiueError):
    """The device that was asked for, or ONNX Runtime itself, cannot be used as installed."""


class RequestError(TiueError):
    """An argument of a generation request is wrong."""


class Cancelled(TiueError):
    """The caller's `cancel` asked the request to stop."""


class InferenceError(TiueError):
    """A graph failed while running (out of memory, most often) or computed values that are not finite."""
