/**
 * Latent noise from a seed: Philox 4x32-10, as in PyTorch's CUDA generator.
 *
 * The bits are those of runtime/tiue_runtime/noise.py on every machine. Philox is exact arithmetic on integers. Sums,
 * products and roots are rounded to float32 after each operation. Logarithm and sine are computed in float64 and rounded
 * to float32 once, so that the last bits in which libraries differ are lost.
 */
import { RequestError, shorten } from "./errors.js";

const LIMIT = 2n ** 64n;
const WORD = 0xffffffff;
const ROUNDS = 10;

/** Return the seed of the first of `count` pictures. Throws RequestError unless all are integers in [0, 2**64). */
export function checkSeed(seed: unknown, count = 1): bigint {
  const integer = typeof seed === "bigint" || (typeof seed === "number" && Number.isInteger(seed));
  if (!integer)
    throw new RequestError(`seed: expected an integer in [0, 2**64), got ${shorten(seed)} (${typeof seed})`);
  if (typeof seed === "number" && !Number.isSafeInteger(seed)) {
    throw new RequestError(`seed: expected a bigint for seeds of 2**53 and more, for example 2n ** 60n, got ${seed}`);
  }
  const first = BigInt(seed);
  if (first < 0n || first > LIMIT - BigInt(count)) {
    const last = count > 1 ? `, with seed + ${count - 1} the seed of the last image` : "";
    throw new RequestError(`seed: expected an integer in [0, 2**64)${last}, got ${shorten(first)}`);
  }
  return first;
}

/**
 * Draw standard normal noise. An element depends only on the seed and its index.
 *
 * @param seed 0 <= seed < 2**64.
 * @param count elements, fewer than 2**32.
 * @throws RequestError if an argument is wrong.
 */
export function gaussian(seed: bigint | number, count: number): Float32Array {
  const first = checkSeed(seed);
  if (!Number.isInteger(count) || count < 0 || count > WORD) {
    throw new RequestError(`count: expected an integer in [0, 2**32), got ${shorten(count)}`);
  }
  const low = Number(first & 0xffffffffn);
  const high = Number(first >> 32n);
  const values = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    const [g0, g1] = philox(low, high, i);
    values[i] = boxMuller(g0, g1);
  }
  return values;
}

/** Return the first two output words for the counter (0, 0, i, 0). */
function philox(low: number, high: number, i: number): [number, number] {
  let [c0, c1, c2, c3] = [0, 0, i, 0];
  let [k0, k1] = [low, high];
  for (let round = 0; round < ROUNDS; round++) {
    const high0 = multiplyHigh(c0, 0xd2511f53);
    const low0 = Math.imul(c0, 0xd2511f53) >>> 0;
    const high1 = multiplyHigh(c2, 0xcd9e8d57);
    const low1 = Math.imul(c2, 0xcd9e8d57) >>> 0;
    c0 = (high1 ^ c1 ^ k0) >>> 0;
    c2 = (high0 ^ c3 ^ k1) >>> 0;
    c1 = low1;
    c3 = low0;
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  return [c0, c1];
}

/** Return the upper 32 bits of the product of two unsigned 32-bit integers. */
function multiplyHigh(a: number, b: number): number {
  const [a0, a1, b0, b1] = [a & 0xffff, a >>> 16, b & 0xffff, b >>> 16];
  // Every sum below is smaller than 2**53, so it is exact.
  const middle = a1 * b0 + Math.floor((a0 * b0) / 0x10000) + a0 * b1;
  return a1 * b1 + Math.floor(middle / 0x10000);
}

const round = Math.fround;
const SCALE = 2 ** -32;
const HALF = 2 ** -33;
const TWO_PI = round(2 * Math.PI);
const TURN = round(SCALE * TWO_PI);
const HALF_TURN = round(HALF * TWO_PI);

/** Turn two words into a normal number, in float32 with the constants of cuRAND. Its first output is the sine. */
function boxMuller(g0: number, g1: number): number {
  const u = round(round(round(g0) * SCALE) + HALF);
  const v = round(round(round(g1) * TURN) + HALF_TURN);
  const radius = round(Math.sqrt(round(-2 * round(Math.log(u)))));
  return round(radius * round(Math.sin(v)));
}
