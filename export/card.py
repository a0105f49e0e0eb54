"""The model card of a bundle."""

from tiue_runtime import bundle

_CARD = """\
---
license: {license}
tags: [text-to-image, onnx, tiue]
---
# {name}

A text-to-image model in ONNX graphs, for tiue-runtime: one pass of the UNet's encoder, then its decoder
at {steps} timesteps in parallel. No sampling loop, no PyTorch.

- Made from: {made_from}
- License: {license}
- Default size: {width} x {height} pixels; sides are multiples of {multiple}
- Steps: {all_steps}
- Computes in {precision}; weights stored as {weights}, text encoder as {text_encoder}
- Variants: {variants}. Image decoders: {vaes}
- Safety checker: {safety_checker}
- Upscaler: {upscaler}

```python
from tiue_runtime import Pipeline

pipeline = Pipeline.load("path/to/this/directory")
pipeline("a red heart", seed=1).images[0].save("heart.png")
```

Install tiue-runtime from a checkout of tiue: `pip install "./runtime[cpu]"`, or `[cuda]` for NVIDIA GPUs.
"""


def model_card(manifest: bundle.Manifest, made_from: str, text_encoder: str) -> str:
    """Write README.md for a bundle: its model, origin and license, and how to use it.

    Args:
        manifest: of the bundle.
        made_from: the model that the student was made from, and LoRAs.
        text_encoder: how the file of the text encoder stores weights.

    Returns:
        Markdown with a YAML header, as model hubs read it.
    """
    return _CARD.format(
        name=manifest.name,
        license=manifest.license,
        made_from=made_from,
        precision=manifest.precision,
        variants=", ".join(manifest.variants),
        vaes=", ".join(manifest.vaes),
        safety_checker="flagged pictures are blurred" if manifest.safety_checker else "none, pictures are not checked",
        upscaler=f"enlarges by {manifest.upscaler.scale}" if manifest.upscaler else "none",
        weights=manifest.weights,
        text_encoder=text_encoder,
        steps=manifest.default_steps,
        all_steps=", ".join(map(str, manifest.schedules)),
        width=manifest.default_width,
        height=manifest.default_height,
        multiple=manifest.size_multiple,
    )
