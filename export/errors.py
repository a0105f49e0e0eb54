"""The exporter's own exceptions."""

from tiue.files import OneLineError


class ExportError(OneLineError):
    """The export cannot be done as asked; the message says why."""


class ParityError(ExportError):
    """The ONNX graphs do not compute what PyTorch computes."""
