"""Watch a picture form, and stop when it takes too long."""

import time

from tiue_runtime import Cancelled, Pipeline

deadline = time.monotonic() + 60


def show(progress):
    """Print a line after each part of the work. Returning True cancels the request."""
    preview = progress.preview()  # a soft picture from the latents; None before the first timestep
    color = preview.resize((1, 1)).getpixel((0, 0)) if preview else "none yet"
    print(f"{progress.fraction:4.0%} {progress.stage} {progress.step} of {progress.steps}, mean color {color}")
    return time.monotonic() > deadline


with Pipeline.load() as pipe:
    try:
        pipe("a sunflower", seed=3, callback=show).images[0].save("sunflower.png")
    except Cancelled:
        print("took too long")
