"""Values that options choose from. They stand here so that reading them loads nothing else."""

from typing import Literal

OutputType = Literal["pil", "np", "latent"]
Precision = Literal["bf16", "fp32"]  # of OpenVINO's arithmetic
Vae = Literal["kl", "tiny"]  # bundle.VAE_KINDS
Variant = Literal["portable", "cpu", "cuda"]  # bundle.VARIANTS
