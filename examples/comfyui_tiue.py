"""A node for ComfyUI. Copy this file to its custom_nodes, and install tiue-runtime where ComfyUI runs."""

from functools import lru_cache

import comfy.model_management
import comfy.utils
import torch
from tiue_runtime import Cancelled, Pipeline

MOST_PICTURES = 64


@lru_cache(1)
def load(bundle):
    """Load a bundle, and keep it until another one is asked for."""
    load.cache_clear()  # The one before frees its memory first.
    return Pipeline.load(bundle)


class TiuePicture:
    """Draws pictures of a prompt, with previews in the node, until the user interrupts."""

    CATEGORY, FUNCTION, RETURN_TYPES = "image", "draw", ("IMAGE",)
    DESCRIPTION = "Draws pictures with a TiUE bundle: text to image in one pass."

    @classmethod
    def INPUT_TYPES(cls):
        """Return the inputs, as ComfyUI wants them. For steps and sizes, 0 is the bundle's own."""
        seeds = {"default": 0, "min": 0, "max": 2**64 - MOST_PICTURES, "control_after_generate": True}
        return {
            "required": {
                "prompt": ("STRING", {"default": "a red heart", "multiline": True}),
                "seed": ("INT", seeds),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": MOST_PICTURES}),
                "bundle": ("STRING", {"default": "emoji", "tooltip": "an installed bundle's name, or a directory"}),
            },
            "optional": {name: ("INT", {"default": 0, "min": 0, "max": 8192}) for name in ("steps", "width", "height")},
        }

    def draw(self, prompt, seed, batch_size, bundle, **optional):
        """Return floats (B, H, W, 3) in [0, 1]."""
        pipe, bar = load(bundle), comfy.utils.ProgressBar(100)
        options = {"seed": seed, "num_images": batch_size, "cancel": comfy.model_management.processing_interrupted}
        options |= {name: value or None for name, value in optional.items()}

        def show(progress):
            preview = progress.preview() if pipe.bundle.manifest.preview else None
            bar.update_absolute(round(100 * progress.fraction), 100, preview and ("JPEG", preview, 512))

        try:
            result = pipe(prompt, output_type="np", callback=show, **options)
        except Cancelled:
            comfy.model_management.throw_exception_if_processing_interrupted()
            raise
        return (torch.from_numpy(result.images),)


NODE_CLASS_MAPPINGS = {"TiuePicture": TiuePicture}
NODE_DISPLAY_NAME_MAPPINGS = {"TiuePicture": "TiUE picture"}
