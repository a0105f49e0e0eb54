/** What several tests need: the golden vectors, and pipelines of the checkout's bundles. */
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";

/** The folder of the package. Tests run in tests and in dist/tests. */
export const PACKAGE = dirname(createRequire(import.meta.url).resolve("tiue-runtime/package.json"));
/** The root of the checkout. */
export const ROOT = join(PACKAGE, "../../");
export const TINY = join(ROOT, "runtime/tests/data/tiny");
export const UPSCALED = join(ROOT, "runtime/tests/data/upscaled");
export const HEAVY = join(ROOT, "runtime/tests/data/heavy");
export const EMOJI = join(ROOT, "models/emoji/tiue_emoji");

/** Read a file of golden vectors, which runtime/tests/make_vectors.py wrote. */
export function vectors<Case>(name: string): Case[] {
  return JSON.parse(readFileSync(join(ROOT, "runtime/tests/data/vectors", name), "utf8")) as Case[];
}

/** Return the bits of float32 values. */
export function bits(values: Iterable<number>): number[] {
  return Array.from(new Uint32Array(Float32Array.from(values).buffer));
}

export function floats(words: number[]): Float32Array {
  return new Float32Array(Uint32Array.from(words).buffer);
}

/** How close z_0 is to a reference, in dB: 20 log10 of the reference's root mean square over that of the difference. */
export function decibels(values: Float32Array, reference: Float32Array): number {
  let [signal, noise] = [0, 0];
  reference.forEach((one, i) => {
    signal += one ** 2;
    noise += (one - (values[i] ?? NaN)) ** 2;
  });
  return 10 * Math.log10(signal / noise);
}

export function largestDifference(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) return Infinity;
  let largest = 0;
  for (let i = 0; i < a.length; i++) largest = Math.max(largest, Math.abs((a[i] ?? NaN) - (b[i] ?? NaN)));
  return largest;
}
