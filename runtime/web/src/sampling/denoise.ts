/**
 * The method: the encoder runs once, the decoder at N timesteps, and a weighted sum is the picture.
 *
 *     F     = encoder(z_T, c)                     once, at the timestep that is folded into its graph
 *     eps_i = decoder(F, t_i, c)                  for N timesteps t_i
 *     z_0   = w_0 z_T + sum_i w_i eps_i
 *
 * z_T is noise, c the text, z_0 the latents of the picture. There is no sampling loop: no eps_i depends on another. One
 * run of the decoder's graph takes k of the N timesteps, and returns their part of the sum.
 */
import type { Schedule } from "../bundle/manifest.js";
import { OutOfMemoryError } from "../errors.js";
import { MODES, type Mode } from "../options.js";

const AT_ONCE: Record<Mode, number> = { parallel: Infinity, partial: 2, sequential: 1 };

export interface Halves {
  /** Run the decoder at k timesteps. Returns sum_i w_i eps_i over them, float32 (B, C, h, w). */
  decode(rows: number[], weights: number[]): Promise<Float32Array>;
  /** Hear of finished timesteps, with an estimate of z_0 where one is known. */
  report(step: number, estimate: (() => Float32Array) | undefined): void;
  warn(message: string): void;
}

/**
 * Sum up the decoder's predictions.
 *
 * @param halves runs the decoder.
 * @param schedule weights and timesteps.
 * @param noise z_T, float32 (B, C, h, w).
 * @param mode the memory mode to begin with. After a run that did not fit into memory, the next lower one follows.
 * @returns z_0, float32 (B, C, h, w), and the mode of the last run.
 */
export async function denoise(
  halves: Halves,
  schedule: Schedule,
  noise: Float32Array,
  mode: Mode,
): Promise<[Float32Array, Mode]> {
  const w = schedule.stepWeights.map(Math.fround);
  const steps = w.length;
  const z = noise.map((value) => Math.fround(schedule.noiseWeight) * value);
  for (let first = 0; first < steps;) {
    const stop = Math.min(first + AT_ONCE[mode], steps);
    // With one timestep per run, ask for eps_i itself (weight 1), so that a preview can use it.
    const alone = mode === "sequential";
    let contribution: Float32Array;
    try {
      contribution = await halves.decode(schedule.rows.slice(first, stop), alone ? [1] : w.slice(first, stop));
    } catch (error) {
      const lower = lowerMode(mode, steps);
      if (!(error instanceof OutOfMemoryError) || lower === null) throw error;
      halves.warn(`${error.message} in ${mode} mode: continuing in ${lower} mode`);
      mode = lower;
      continue;
    }
    // As if eps were right for all timesteps that are left.
    const left = Math.fround(w.slice(first).reduce((sum, one) => sum + one, 0));
    const estimate = alone ? added(z, contribution, left) : undefined;
    const weight = alone ? (w[first] ?? 0) : 1;
    for (let i = 0; i < z.length; i++) z[i] = (z[i] ?? 0) + Math.fround(weight * (contribution[i] ?? 0));
    first = stop;
    halves.report(stop, stop === steps ? () => z.slice() : estimate);
  }
  return [z, mode];
}

/** Return a function that computes z + weight * eps. z is copied now, because it changes. */
function added(z: Float32Array, eps: Float32Array, weight: number): () => Float32Array {
  const before = z.slice();
  return () => before.map((value, i) => value + weight * (eps[i] ?? 0));
}

/** Return the next mode that takes fewer timesteps at once, or null at the end. */
function lowerMode(mode: Mode, steps: number): Mode | null {
  const now = Math.min(AT_ONCE[mode], steps);
  return MODES.slice(MODES.indexOf(mode)).find((one) => Math.min(AT_ONCE[one], steps) < now) ?? null;
}
