"""Keep latents instead of pictures, and decode them later."""

import numpy as np
from tiue_runtime import Pipeline

with Pipeline.load() as pipe:
    latents = pipe("a red heart", num_images=2, seed=1, output_type="latent").images
    np.save("heart.npy", latents)
    print(f"heart.npy: latents {latents.shape}")

    kept = np.load("heart.npy")
    pipe.decode(kept[:1])[0].save("heart.png")
