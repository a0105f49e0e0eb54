"""The method: the encoder runs once, the decoder at N timesteps, and a weighted sum is the picture.

    F     = encoder(z_T, c)                     once, at the timestep that is folded into its graph
    eps_i = decoder(F, t_i, c)                  for N timesteps t_i
    z_0   = w_0 z_T + sum_i w_i eps_i

z_T is noise, c the text, z_0 the latents of the picture. There is no sampling loop: no eps_i depends on another. One
run of the decoder's graph takes k of the N timesteps, and returns their part of the sum. A model that predicts v has
v_i in the place of eps_i, and other weights. Source: arXiv 2505.21960; docs/method.md derives the sum.
"""

from functools import partial

import numpy as np

from tiue_runtime.bundle import UNET_DECODER, UNET_ENCODER, Manifest
from tiue_runtime.graphs import Halves
from tiue_runtime.modes import Ladder
from tiue_runtime.ort.graph import Float32
from tiue_runtime.run import Run


def denoise(halves: Halves, manifest: Manifest, z_T: Float32, text: Float32, ladder: Ladder, run: Run) -> Float32:
    """Turn noise into latents.

    Args:
        halves: encoder and decoder.
        manifest: holds the weights of the sum for the ladder's number of timesteps.
        z_T: noise, float32 (B, C, h, w).
        text: text embeddings, float32 (B, L, D).
        ladder: says how many timesteps one run of the decoder takes.
        run: hears of the encoder and of every run of the decoder. Estimates of z_0 come with runs of one timestep and
            with the last run.

    Returns:
        z_0, float32 (B, C, h, w).
    """
    steps, schedule = ladder.steps, manifest.schedules[ladder.steps]
    timestep_rows = np.array(manifest.step_rows(steps), dtype=np.int64)  # the graph knows timesteps by number
    w = np.array(schedule.step_weights, dtype=np.float32)

    features = halves.encode(z_T, text)
    run.report(UNET_ENCODER, 1, 1)

    def decode(now: slice) -> Float32:
        # With one timestep per run, ask for eps_i itself (weight 1), so that a preview can use it.
        weights = np.ones(1, np.float32) if ladder.one_by_one else w[now]
        return halves.decode(features, timestep_rows[now], weights)

    z = np.float32(schedule.noise_weight) * z_T
    for now, contribution in ladder.runs(decode):
        estimate = None
        if ladder.one_by_one:
            # The estimate is z + eps * (sum of the weights from now on), as if eps were right for them all.
            estimate = partial(_ahead, z, w[now.start :].sum(), contribution)
            contribution = w[now] * contribution
        z = z + contribution
        run.report(UNET_DECODER, now.stop, steps, z.copy if now.stop == steps else estimate)
    return z


def _ahead(z: Float32, weight: np.float32, eps: Float32) -> Float32:
    return np.add(z, weight * eps, dtype=np.float32)
