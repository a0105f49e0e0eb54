"""The exporter's own exceptions."""


class ExportError(ValueError):
    """The export cannot be done as asked; the message is one line that says why."""


class ParityError(ExportError):
    """The ONNX graphs do not compute what PyTorch computes."""
