"""Distilling text-to-image diffusion models into students that draw in one pass. Method: arXiv 2505.21960."""

import os

# Libraries that are imported later report their use unless told otherwise. A value that the user has set stays.
for _name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_name] = os.environ.get(_name) or "1"
