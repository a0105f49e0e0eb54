"""The bundle: the directory of graphs and settings that the exporter writes and the runtime reads.

    manifest        the content of bundle.json: frozen dataclasses that check themselves
    directory       a bundle on disk: load, verify, write
    find            a bundle by its path, or by the name of an installed package or of a pulled bundle
    pulled          bundles in the user's cache: their directory and names
    external_data   the files that an ONNX graph names
    tokenizer_json  reading and checking tokenizer.json
    fields          typed reading of JSON; every error names the exact field
    replacing       writing a file under another name, then renaming it

This package imports the standard library and `tiue_runtime.errors` only, so that any tool can read a bundle.
"""

from tiue_runtime.bundle.directory import Bundle, write_bundle
from tiue_runtime.bundle.manifest import (
    ATTENTION_MASK,
    CONTRIBUTION,
    CPU,
    CUDA,
    ENLARGED,
    FORMAT,
    GRAPH_FILES,
    GRAPHS,
    IMAGE,
    INPUT_IDS,
    KL,
    LATENTS,
    MANIFEST,
    PORTABLE,
    PRECISIONS,
    SAFETY_CHECKER,
    SCORE,
    STEP_INDEX,
    STEP_WEIGHT,
    TENSORS,
    TEXT,
    TEXT_ENCODER,
    TINY,
    TOKENIZER,
    UNET_DECODER,
    UNET_ENCODER,
    UPSCALER,
    VAE_DECODER,
    VAE_KINDS,
    VARIANTS,
    WEB,
    FileInfo,
    Manifest,
    MemoryUse,
    Preview,
    Prompts,
    SafetyChecker,
    Schedule,
    Upscaler,
    vae_graphs,
)

__all__ = [
    "ATTENTION_MASK",
    "CONTRIBUTION",
    "CPU",
    "CUDA",
    "ENLARGED",
    "FORMAT",
    "GRAPHS",
    "GRAPH_FILES",
    "IMAGE",
    "INPUT_IDS",
    "KL",
    "LATENTS",
    "MANIFEST",
    "PORTABLE",
    "PRECISIONS",
    "SAFETY_CHECKER",
    "SCORE",
    "STEP_INDEX",
    "STEP_WEIGHT",
    "TENSORS",
    "TEXT",
    "TEXT_ENCODER",
    "TINY",
    "TOKENIZER",
    "UNET_DECODER",
    "UNET_ENCODER",
    "UPSCALER",
    "VAE_DECODER",
    "VAE_KINDS",
    "VARIANTS",
    "WEB",
    "Bundle",
    "FileInfo",
    "Manifest",
    "MemoryUse",
    "Preview",
    "Prompts",
    "SafetyChecker",
    "Schedule",
    "Upscaler",
    "vae_graphs",
    "write_bundle",
]
