"""Distilling text-to-image diffusion models into students that make pictures in one pass. Method: arXiv 2505.21960."""

import logging
import os
import sys

# Libraries that are imported later report their use by default. A value that the user has set stays.
for _name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_name] = os.environ.get(_name) or "1"

# diffusers imports bitsandbytes if it is installed. On some CPUs, bitsandbytes makes the package `kernels` download a
# kernel from the Hugging Face Hub. Nothing here uses one. Programs that need one import `kernels` before this package.
sys.modules.setdefault("kernels", None)  # pyright: ignore[reportArgumentType]
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
