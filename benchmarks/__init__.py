"""Full-size pipelines with random weights, and how fast they run: for measuring, not for pictures."""

import os

# Before anything imports ONNX Runtime. Child processes inherit it.
os.environ["ORT_DISABLE_TELEMETRY"] = os.environ.get("ORT_DISABLE_TELEMETRY") or "1"
