/** The state of a running request, as `onProgress` receives it. */
import type { Manifest } from "./bundle/manifest.js";
import { RequestError, shorten } from "./errors.js";
import { preview } from "./picture/preview.js";
import type { Picture } from "./picture/picture.js";

export const STAGES = ["text_encoder", "unet_encoder", "unet_decoder", "vae_decoder"] as const;
export type Stage = (typeof STAGES)[number];

// Rough parts of a request's time on a CPU.
const SHARES: Record<Stage, number> = { text_encoder: 0.05, unet_encoder: 0.2, unet_decoder: 0.45, vae_decoder: 0.3 };

/** A finished part of the work, as plain data. */
export interface Report {
  stage: Stage;
  step: number;
  steps: number;
  seconds: number;
  /** An estimate of z_0, float32 (B, C, h, w). Undefined: the last estimate stays. */
  estimate: Float32Array | undefined;
}

/** What a request has done. */
export class Progress {
  constructor(
    /** The graph that ran. */
    readonly stage: Stage,
    /** Finished parts of the stage: timesteps of unet_decoder. */
    readonly step: number,
    /** Parts of the stage. */
    readonly steps: number,
    /** Of the whole request, from 0 to 1, by rough shares of the stages. It never falls. */
    readonly fraction: number,
    /** Seconds since the request began. */
    readonly seconds: number,
    /** The z_0 to expect, float32 (B, C, h, w). It is exact after the last timestep, and null before the first. */
    readonly latents: Float32Array | null,
    readonly shape: readonly [number, number, number, number],
    readonly manifest: Manifest,
  ) {}

  /**
   * Make a soft picture of `latents` by the bundle's matrix, in about a millisecond.
   *
   * @param index which picture of the request, in the order of the result.
   * @returns a picture of full size, or null before the first timestep.
   * @throws RequestError if there is no such picture, or the bundle has no matrix.
   */
  preview(index = 0): Picture | null {
    if (!this.latents) return null;
    const [count, channels, height, width] = this.shape;
    if (!Number.isInteger(index) || index < 0 || index >= count) {
      throw new RequestError(`index: expected 0 to ${count - 1}, got ${shorten(index)}`);
    }
    const size = channels * height * width;
    return preview(this.manifest, this.latents.subarray(index * size, (index + 1) * size), height, width);
  }
}

/** Turns reports into Progress: it keeps the last estimate, and a fraction that never falls. */
export class ProgressMaker {
  #fraction = 0;
  #estimate: Float32Array | null = null;

  constructor(
    readonly shape: readonly [number, number, number, number],
    readonly manifest: Manifest,
  ) {}

  make({ stage, step, steps, seconds, estimate }: Report): Progress {
    this.#estimate = estimate ?? this.#estimate;
    const before = STAGES.slice(0, STAGES.indexOf(stage)).reduce((sum, name) => sum + SHARES[name], 0);
    this.#fraction = Math.max(this.#fraction, Math.min(before + (SHARES[stage] * step) / steps, 1));
    return new Progress(stage, step, steps, this.#fraction, seconds, this.#estimate, this.shape, this.manifest);
  }
}
