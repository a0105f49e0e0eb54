"""Distilling text-to-image diffusion models into students that draw in one pass. Method: arXiv 2505.21960."""

import logging
import os
import sys

# Libraries that are imported later report their use unless told otherwise. A value that the user has set stays.
for _name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_name] = os.environ.get(_name) or "1"

# Where it is installed, diffusers imports bitsandbytes, which on some CPUs asks the package `kernels` for a kernel of
# the Hugging Face Hub. Nothing here uses one. A program that does imports `kernels` before this package.
sys.modules.setdefault("kernels", None)  # pyright: ignore[reportArgumentType]
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
