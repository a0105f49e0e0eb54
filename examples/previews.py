"""Watch a picture form, step by step, and stop if it takes too long."""

import time

from tiue_runtime import Cancelled, Pipeline

pipe = Pipeline.load()
deadline = time.monotonic() + 10


def show(step, steps, preview):
    """Print progress after each timestep. preview: an estimate of the final latents (B, C, h, w)."""
    print(f"step {step} of {steps}, latents' spread {preview.std():.2f}")


try:
    result = pipe("a sunflower", seed=3, callback=show, cancel=lambda: time.monotonic() > deadline)
    result.images[0].save("sunflower.png")
except Cancelled:
    print("took too long")
