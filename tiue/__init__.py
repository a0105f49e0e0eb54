"""Distilling text-to-image diffusion models into students that make pictures in one pass. Method: arXiv 2505.21960.

    unet            the student: a diffusers UNet whose encoder runs once and whose decoder runs at N timesteps
    schedule        the N timesteps, and the weights of the sum that is the picture
    losses          VSD, KL and the fake score's loss, as pure functions
    hoist           the two halves for export: all work that does not depend on the timestep moves into the encoder
    components      UNet, text encoder, VAE, tokenizer and noise schedule of a model; sizes: those that must fit
    checkpoint      student.safetensors, written and read
    loading, pipeline_directory, recognize, plausible, weights, hub    checkpoints as people have them
    tokenization, text_encoder, prompts                                captions to text embeddings
    files, settings                                                    whole files; settings that become flags

`distill` trains students. This root never imports it.
"""

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
