"""Make images from a TiUE bundle with ONNX Runtime: no torch, no sampling loop."""

__version__ = "0.1.0"
