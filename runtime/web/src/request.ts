/** One request: its options are checked and completed before any graph runs. */
import { scheduleOf, type Manifest, type Schedule } from "./bundle/manifest.js";
import { clip, RequestError, shorten } from "./errors.js";
import { checkSeed } from "./noise.js";
import type { Memory, RequestOptions } from "./options.js";
import { inStyle } from "./text/styles.js";

const LARGEST = 2 ** 20; // pictures of a prompt, and pixels of a side

/** A complete request for B pictures, prompt-major. It is plain data. */
export interface Request {
  prompts: string[]; // one per picture, with its style
  numImages: number; // per prompt
  seeds: bigint[]; // one per picture
  steps: number;
  schedule: Schedule;
  shape: [number, number, number, number]; // of z_T, (B, C, h, w)
  memory: Memory;
  estimates: boolean; // whether somebody wants estimates of z_0 on the way
}

/** Check the arguments of a call and complete them. Throws RequestError; the message begins with the option's name. */
export function makeRequest(
  manifest: Manifest,
  prompt: string | readonly string[],
  options: RequestOptions,
  defaultMemory: Memory,
): Request {
  const numImages = options.numImages ?? 1;
  if (numImages < 1 || numImages > LARGEST) {
    throw new RequestError(`numImages: expected an integer from 1 to ${LARGEST}, got ${shorten(numImages)}`);
  }
  const steps = options.steps ?? manifest.default_steps;
  if (!Object.hasOwn(manifest.schedules, String(steps))) {
    const known = Object.keys(manifest.schedules).join(", ");
    throw new RequestError(`steps: this bundle was trained for ${known}, got ${shorten(steps)}`);
  }
  const multiple = manifest.size_multiple;
  const height = size("height", options.height, multiple) ?? manifest.default_height;
  const width = size("width", options.width, multiple) ?? manifest.default_width;
  const prompts = checkPrompts(prompt);
  const count = numImages * prompts.length;
  const first = options.seed === undefined ? BigInt(newSeed()) : checkSeed(options.seed, count);
  const scale = manifest.pixels_per_latent;
  let memory = options.memory ?? defaultMemory;
  // Only this mode has a preview of every step.
  if (memory === "auto" && options.onProgress) memory = "sequential";
  const seeds = Array.from({ length: count }, (_, i) => first + BigInt(i));
  return {
    prompts: seeds.map((seed, i) => inStyle(manifest.prompts, prompts[Math.floor(i / numImages)] ?? "", seed)),
    numImages,
    seeds,
    steps,
    schedule: scheduleOf(manifest, steps),
    shape: [count, manifest.latent_channels, height / scale, width / scale],
    memory,
    estimates: options.onProgress !== undefined,
  };
}

function newSeed(): number {
  return globalThis.crypto.getRandomValues(new Uint32Array(1))[0] ?? 0;
}

/** Return prompts as a list of at least one string. Throws RequestError. */
function checkPrompts(prompt: unknown): string[] {
  const prompts: unknown = typeof prompt === "string" ? [prompt] : prompt;
  if (!Array.isArray(prompts)) {
    const kind = prompt === undefined ? "nothing" : prompt === null ? "null" : typeof prompt;
    throw new RequestError(`prompt: expected a string or a list of strings, got ${kind}`);
  }
  if (prompts.length === 0) throw new RequestError("prompt: expected at least one prompt, got an empty list");
  prompts.forEach((one: unknown, i) => {
    if (typeof one !== "string") throw new RequestError(`prompt[${i}]: expected a string, got ${typeof one}`);
    if (!one.isWellFormed()) {
      throw new RequestError(`prompt[${i}]: expected whole characters, got half of one in ${clip(one)}`);
    }
  });
  return [...(prompts as string[])];
}

/** Return a number of pixels that the bundle allows for a side, or undefined. Throws RequestError. */
function size(name: string, value: number | undefined, multiple: number): number | undefined {
  if (value !== undefined && value > LARGEST) {
    throw new RequestError(`${name}: expected at most ${LARGEST} pixels, got ${shorten(value)}`);
  }
  if (value !== undefined && (value < multiple || value % multiple !== 0)) {
    const below = Math.max(Math.floor(value / multiple), 0) * multiple;
    const near = below ? `${below} or ${below + multiple}` : `${multiple}`;
    throw new RequestError(
      `${name}: expected a multiple of ${multiple} in pixels, for example ${near}, got ${shorten(value)}`,
    );
  }
  return value;
}
