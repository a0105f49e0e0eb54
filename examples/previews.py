"""Watch a picture form, step by step, and stop if it takes too long."""

import time

from tiue_runtime import Cancelled, Pipeline

pipe = Pipeline.load()
deadline = time.monotonic() + 10


def show(step, steps, preview):
    """Print a line after each timestep. `preview` holds the latents (B, C, h, w) that are expected so far."""
    print(f"step {step} of {steps}, standard deviation of the latents {preview.std():.2f}")


try:
    result = pipe("a sunflower", seed=3, callback=show, cancel=lambda: time.monotonic() > deadline)
    result.images[0].save("sunflower.png")
except Cancelled:
    print("took too long")
