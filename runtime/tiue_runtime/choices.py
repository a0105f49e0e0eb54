"""Values that options choose from. They stand here so that reading them loads nothing else."""

from typing import Literal

Algorithm = Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"]  # of content credentials
OutputType = Literal["pil", "np", "latent"]
Precision = Literal["bf16", "fp32"]  # of OpenVINO's arithmetic
Vae = Literal["kl", "tiny"]  # bundle.VAE_KINDS
Variant = Literal["portable", "cpu", "cuda", "web"]  # bundle.VARIANTS
