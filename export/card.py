"""The model card of a bundle."""

from tiue_runtime import bundle

_CARD = """\
---
license: {licence}
tags: [text-to-image, onnx, tiue]
---
# {name}

A text-to-image model in four ONNX graphs, for tiue-runtime: one pass of the UNet's encoder, then its decoder
at {steps} timesteps in parallel. No sampling loop, no PyTorch.

- Made from: {base_model}
- Licence: {licence}
- Default size: {width} x {height} pixels; sides are multiples of {multiple}
- Steps: {all_steps}
- Computes in {precision}; weights stored as {weights}, text encoder as {text_encoder}
- Variants: {variants}. Image decoders: {vaes}

```python
from tiue_runtime import Pipeline

pipeline = Pipeline.load("path/to/this/directory")
pipeline("a red heart", seed=1).images[0].save("heart.png")
```

`pip install "tiue-runtime[cpu]"`, or `[cuda]` for NVIDIA GPUs.
"""


def model_card(manifest: bundle.Manifest) -> str:
    """README.md for a bundle: what it is, where it is from, under what licence, and how to use it."""
    return _CARD.format(
        name=manifest.name,
        licence=manifest.licence,
        base_model=manifest.created_from["base_model"],
        precision=manifest.created_from["precision"],
        variants=", ".join(manifest.variants),
        vaes=", ".join(manifest.vaes),
        weights=manifest.created_from["weights"],
        text_encoder=manifest.created_from["text_encoder"],
        steps=manifest.default_steps,
        all_steps=", ".join(map(str, manifest.schedules)),
        width=manifest.default_width,
        height=manifest.default_height,
        multiple=manifest.size_multiple,
    )
