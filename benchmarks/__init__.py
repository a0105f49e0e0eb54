"""Full-size pipelines with random weights, and measurements of their speed and memory. Their pictures are noise."""

import os

# Before anything imports ONNX Runtime. Child processes inherit it.
os.environ["ORT_DISABLE_TELEMETRY"] = os.environ.get("ORT_DISABLE_TELEMETRY") or "1"
