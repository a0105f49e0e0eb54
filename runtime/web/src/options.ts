/** The options of a request and of loading: their types, defaults and checks of types. */
import { RequestError, shorten } from "./errors.js";
import { LESSONS } from "./generated/lessons.js";
import type { LoadProgress } from "./bundle/files.js";
import type { PngOptions } from "./picture/picture.js";
import type { Progress } from "./progress.js";

export const MODES = ["parallel", "partial", "sequential"] as const;
/** How many timesteps one run of the decoder takes, from the fastest mode to the smallest. */
export type Mode = (typeof MODES)[number];

export const MEMORY = ["auto", "low", ...MODES] as const;
export type Memory = (typeof MEMORY)[number];

export const MOST_THREADS = 4096; // of a graph, as in Python

export const DEVICES = ["auto", "webgpu", "wasm", "cpu", "cuda"] as const;
export type DeviceName = (typeof DEVICES)[number];
export type Device = Exclude<DeviceName, "auto">;

/** Options of one request, besides the prompt. */
export interface RequestOptions {
  /** 0 <= seed < 2**64; the same seed gives the same picture. Default: a new one. */
  seed?: number | bigint | undefined;
  /** A step count of the bundle. Default: the bundle's. */
  steps?: number | undefined;
  /** Pictures of each prompt; image j of all uses seed + j. Default: 1. */
  numImages?: number | undefined;
  /** Pixels, a multiple of the bundle's size_multiple. Default: the bundle's. */
  height?: number | undefined;
  /** Pixels, a multiple of the bundle's size_multiple. Default: the bundle's. */
  width?: number | undefined;
  /**
   * parallel: all timesteps in one run of the decoder; partial: two at once; sequential: one by one, in about 1/steps of
   * the memory; auto: parallel, or sequential if there is an `onProgress`, because only that mode has a preview of every
   * step; low: one by one, and each graph is loaded only for its turn. Default: that of the pipeline.
   * If no disk or storage has the files, a call with low frees graphs only in a pipeline that was loaded with low.
   */
  memory?: Memory | undefined;
  /** Called with a Progress after each graph and timestep. */
  onProgress?: ((progress: Progress) => void) | undefined;
  /** Cancels the request. The call then rejects with Cancelled at once. A graph that runs ends first in the background. */
  signal?: AbortSignal | undefined;
}

/** Options of loading a pipeline, besides the bundle. */
export interface LoadOptions {
  /**
   * webgpu and wasm run in browsers, cpu and cuda in Node (wasm, too). auto is the first of webgpu and wasm, or of cuda,
   * cpu and wasm, that works here. A device requested by name is never replaced. Default: auto.
   */
  device?: DeviceName | undefined;
  /** kl: the full image decoder; tiny: a small, fast one. Default: the bundle's. */
  vae?: "kl" | "tiny" | undefined;
  /** The bundle's graphs to run. Default: the best for the device. */
  variant?: string | undefined;
  /**
   * The default of calls. With "low", no graph is loaded now. The files then stay in memory, unless a disk or the
   * browser's storage has them. Default: auto.
   */
  memory?: Memory | undefined;
  /**
   * Threads of a graph. In a page, more than one needs cross-origin isolation.
   * Default: all cores; at most four in a page; one in a page without isolation, and for "wasm" in Node.
   * Without a worker, ONNX Runtime for WebAssembly keeps the threads of the first load. Another number is refused.
   */
  threads?: number | undefined;
  /** Called while files are fetched. */
  onProgress?: ((progress: LoadProgress) => void) | undefined;
  /** Called with each warning. Default: console.warn. */
  onWarning?: ((message: string) => void) | undefined;
  /** Cancels loading. What was fetched is kept. */
  signal?: AbortSignal | undefined;
  /** In a browser: whether graphs run in a worker of their own, so that the page never freezes. Default: true. */
  worker?: boolean | undefined;
  /** In a browser: the URL of this package's worker, if a bundler did not place it. */
  workerUrl?: string | URL | undefined;
  /** In a browser: the folder of onnxruntime-web's .wasm and .mjs files. Default: beside the worker. */
  wasmPaths?: string | URL | undefined;
  /** In a browser: whether fetched files are kept in Cache Storage. Default: true. */
  cache?: boolean | undefined;
}

type Kind = "integer" | "boolean" | "function" | "signal" | "seed" | "url" | "string" | readonly string[];

const REQUEST: Record<keyof RequestOptions, Kind> = {
  seed: "seed",
  steps: "integer",
  numImages: "integer",
  height: "integer",
  width: "integer",
  memory: MEMORY,
  onProgress: "function",
  signal: "signal",
};

const LOAD: Record<keyof LoadOptions, Kind> = {
  device: DEVICES,
  vae: ["kl", "tiny"],
  variant: "string",
  memory: MEMORY,
  threads: "integer",
  onProgress: "function",
  onWarning: "function",
  signal: "signal",
  worker: "boolean",
  workerUrl: "url",
  wasmPaths: "url",
  cache: "boolean",
};

const PNG: Record<keyof PngOptions, Kind> = { metadata: "boolean", aiMark: "boolean" };

/** Return the options of a PNG file if their names and types are right. Throws RequestError. */
export function checkPngOptions(given: unknown): PngOptions {
  return check<PngOptions>(given, PNG, false);
}

/** Return the options of a request if their names and types are right. Throws RequestError. */
export function checkRequestOptions(given: unknown): RequestOptions {
  return check<RequestOptions>(given, REQUEST, true);
}

/** Return the options of loading if their names and types are right. Throws RequestError. */
export function checkLoadOptions(given: unknown): LoadOptions {
  return check<LoadOptions>(given, LOAD, false);
}

function check<Options extends object>(given: unknown, kinds: Record<string, Kind>, teach: boolean): Options {
  if (given === undefined) return {} as Options;
  if (typeof given !== "object" || given === null || Array.isArray(given)) {
    throw new RequestError(`options: expected an object such as {seed: 1}, got ${shorten(given)}`);
  }
  for (const [name, value] of Object.entries(given)) {
    const kind = Object.hasOwn(kinds, name) ? kinds[name] : undefined;
    const lesson = lessonFor(name);
    if (!kind && teach && lesson) throw new RequestError(`${name}: ${lesson}`);
    if (!kind) throw new RequestError(`unexpected option '${name}'; expected some of ${Object.keys(kinds).join(", ")}`);
    const expected = value === undefined ? null : wrong(kind, value);
    if (expected) throw new RequestError(`${name}: expected ${expected}, got ${shorten(value)}`);
  }
  return given as Options;
}

/** Return what was expected instead of a value of the wrong type, or null. */
function wrong(kind: Kind, value: unknown): string | null {
  if (typeof kind !== "string") {
    return typeof value === "string" && kind.includes(value) ? null : `one of ${kind.join(", ")}`;
  }
  const fits: Record<typeof kind, [boolean, string]> = {
    integer: [Number.isInteger(value), "an integer"],
    boolean: [typeof value === "boolean", "true or false"],
    function: [typeof value === "function", "a function"],
    string: [typeof value === "string", "a string"],
    signal: [value instanceof AbortSignal, "an AbortSignal"],
    seed: [true, ""], // checked with its range
    url: [typeof value === "string" || value instanceof URL, "a URL"],
  };
  const [right, expected] = fits[kind];
  return right ? null : expected;
}

/** Return the sentence for an argument of another library, or undefined. */
export function lessonFor(name: string): string | undefined {
  return Object.hasOwn(LESSONS, camel(name)) ? LESSONS[camel(name)] : undefined;
}

/** Turn num_images into numImages. */
export function camel(name: string): string {
  return name.replace(/_([a-z0-9])/g, (_, letter: string) => letter.toUpperCase());
}
