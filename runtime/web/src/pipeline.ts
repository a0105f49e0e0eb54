/** The public face of the package: a loaded bundle that makes pictures. */
import { sha256 } from "./bundle/sha256.js";
import type { Manifest } from "./bundle/manifest.js";
import { Cancelled, clip, RequestError } from "./errors.js";
import { VERSION } from "./generated/version.js";
import {
  checkLoadOptions,
  checkRequestOptions,
  MOST_THREADS,
  type Device,
  type LoadOptions,
  type Mode,
  type RequestOptions,
} from "./options.js";
import { Picture, rgbOf } from "./picture/picture.js";
import type { Record } from "./picture/record.js";
import { openEngine } from "#platform";
import { ProgressMaker } from "./progress.js";
import { makeRequest, type Request } from "./request.js";
import type { Engine, Sampled } from "./sampling/engine.js";
import { Vocabulary } from "./text/vocabulary.js";

/** The result of a request. */
export interface Result {
  /** The pictures, prompt-major. */
  images: Picture[];
  /** One per picture. */
  seeds: bigint[];
  /** z_0, float32 (B, C, h, w), and its shape. */
  latents: Float32Array;
  shape: readonly [number, number, number, number];
  /** Seconds: each graph that ran, and "total". */
  timings: { [stage: string]: number };
  device: Device;
  steps: number;
  /** The mode in which the decoder ran; after running out of memory, the last one. */
  memory: Mode;
  vae: string;
  /** What a person should know: words that were cut off, or that the model does not know. */
  warnings: string[];
}

/** A loaded bundle. Call it to make pictures. */
export interface Pipeline {
  /**
   * Make pictures of a prompt.
   *
   * @param prompt a string or a list of strings. A style that the seed chooses is added, if the bundle has styles and the
   *   prompt names none. The part that exceeds the bundle's text length is cut, with a warning.
   * @throws RequestError if an argument is wrong; Cancelled if `signal` ended the request; InferenceError if a graph
   *   failed, of which OutOfMemoryError is a subclass.
   */
  (prompt: string | readonly string[], options?: RequestOptions): Promise<Result>;
  readonly manifest: Manifest;
  readonly device: Device;
  /** The bundle's graphs that were loaded. */
  readonly variant: string;
  /** The kind of image decoder that was loaded. */
  readonly vae: string;
  /** Threads of a graph, as far as this package decides. */
  readonly threads: number | undefined;
  /** Free the graphs and their memory. Requests that run end first. Later calls are refused. */
  dispose(): Promise<void>;
}

export const Pipeline = {
  /**
   * Find, validate and load a bundle.
   *
   * @param bundle a directory or a URL of one that holds bundle.json. Pages take URLs only.
   * @throws BundleError if there is no such bundle or it is damaged; DeviceError if the device is not available;
   *   OutOfMemoryError if the graphs do not fit; RequestError if an option is wrong; Cancelled.
   */
  async load(bundle: string | URL, options?: LoadOptions): Promise<Pipeline> {
    const checked = checkLoadOptions(options);
    if ((typeof bundle !== "string" && !(bundle instanceof URL)) || bundle === "") {
      throw new RequestError("bundle: expected the path or the URL of a bundle's directory");
    }
    const { threads = 1, onWarning = warnOnConsole, signal } = checked;
    if (threads < 1 || threads > MOST_THREADS) {
      throw new RequestError(`threads: expected an integer from 1 to ${MOST_THREADS}, got ${threads}`);
    }
    if (signal?.aborted) throw new Cancelled("cancelled before it began", { cause: signal.reason });
    const heard = { ...checked, onWarning };
    return callable(new Loaded(await openEngine(String(bundle), heard), heard));
  },
};

function warnOnConsole(message: string): void {
  console.warn(`tiue-runtime: ${message}`);
}

function callable(loaded: Loaded): Pipeline {
  const { manifest, device, variant, vae, threads } = loaded.engine.info;
  return Object.assign((prompt: string | readonly string[], options?: RequestOptions) => loaded.call(prompt, options), {
    manifest,
    device,
    variant,
    vae,
    threads,
    dispose: () => loaded.dispose(),
  });
}

class Loaded {
  readonly #vocabulary: Vocabulary;
  readonly #sizes: Set<string>; // "widthxheight" that need no warning: those of the model, and those that had one
  #open = true;

  constructor(
    readonly engine: Engine,
    readonly options: LoadOptions & { onWarning: (message: string) => void },
  ) {
    const { manifest } = engine.info;
    this.#vocabulary = new Vocabulary(manifest.prompts, manifest.text_length);
    this.#sizes = new Set(madeFor(manifest));
    if (Object.values(manifest.variants).some((graphs) => "safety_checker" in graphs)) {
      options.onWarning(
        `bundle ${manifest.name} has a safety checker, which this version of tiue-runtime does not run: ` +
          "pictures are not checked",
      );
    }
  }

  async call(prompt: string | readonly string[], options?: RequestOptions): Promise<Result> {
    const begun = performance.now();
    const checked = checkRequestOptions(options);
    if (!this.#open) throw new RequestError("this pipeline is closed: load the bundle again with Pipeline.load");
    const { info } = this.engine;
    const request = makeRequest(info.manifest, prompt, checked, this.options.memory ?? "auto");
    const { signal, onProgress } = checked;
    if (signal?.aborted) throw new Cancelled("cancelled before it began", { cause: signal.reason });
    const warnings: string[] = [];
    const warn = (message: string): void => {
      warnings.push(message);
      this.options.onWarning(message);
    };
    for (const one of new Set(request.prompts)) {
      const complaint = this.#vocabulary.complaint(one);
      if (complaint !== null) warn(complaint);
    }
    this.#warnOfSize(request, warn);
    const maker = new ProgressMaker(request.shape, info.manifest);
    const stopped = new AbortController();
    // An error of onProgress or onWarning ends the request, and the caller gets that error.
    let failure: { error: unknown } | undefined;
    const tell = (listener: () => void): void => {
      if (stopped.signal.aborted) return;
      try {
        listener();
      } catch (error) {
        failure ??= { error };
        stopped.abort(error);
      }
    };
    const sampling = this.engine.sample(
      request,
      {
        onReport: (report) => tell(() => onProgress?.(maker.make(report))),
        onWarning: (message) => tell(() => warn(message)),
      },
      signal ? AbortSignal.any([signal, stopped.signal]) : stopped.signal,
    );
    let sampled: Sampled;
    let images: Picture[];
    try {
      sampled = await untilAborted(sampling, signal);
      images = await untilAborted(this.#pictures(request, sampled), signal);
    } catch (error) {
      stopped.abort();
      throw failure ? failure.error : error;
    }
    if (failure) throw failure.error;
    return {
      images,
      seeds: request.seeds,
      latents: sampled.latents,
      shape: request.shape,
      timings: { ...sampled.timings, total: (performance.now() - begun) / 1000 },
      device: info.device,
      steps: request.steps,
      memory: sampled.mode,
      vae: info.vae,
      warnings,
    };
  }

  /** Warn once of each size that the model was not made for. */
  #warnOfSize({ shape: [, , h, w] }: Request, warn: (message: string) => void): void {
    const { manifest } = this.engine.info;
    const size = `${w * manifest.pixels_per_latent}x${h * manifest.pixels_per_latent}`;
    if (this.#sizes.has(size)) return;
    this.#sizes.add(size);
    const known = clip(madeFor(manifest).join(", "));
    warn(
      `width, height: the model was made for pictures of ${known}; at ${size} it may draw nothing that one recognizes`,
    );
  }

  async dispose(): Promise<void> {
    this.#open = false;
    await this.engine.dispose();
  }

  #pictures(request: Request, { pixels, mode }: Sampled): Promise<Picture[]> {
    const { info } = this.engine;
    const [, , h, w] = request.shape;
    const [height, width] = [h * info.manifest.pixels_per_latent, w * info.manifest.pixels_per_latent];
    const pictures = pixels.map(async (data, i) => {
      const record: Record = {
        bundle: info.manifest.name,
        bundle_sha256: info.bundleSha256,
        steps: request.steps,
        height,
        width,
        memory: mode,
        vae: info.vae,
        variant: info.variant,
        device: info.device,
        provider: info.provider,
        versions: { "tiue-runtime": VERSION, ...info.versions },
        prompt: request.prompts[i] ?? "",
        seed: request.seeds[i] ?? 0n,
        ...(this.options.threads === undefined ? {} : { threads: this.options.threads }),
        prompts: request.prompts.length / request.numImages,
        num_images: request.numImages,
        index: i,
        pixels_sha256: await sha256(rgbOf({ data })),
      };
      return new Picture(width, height, data, record);
    });
    return Promise.all(pictures);
  }
}

/** Return the sizes that the model was made for, as "widthxheight". */
function madeFor({ default_width: width, default_height: height, sizes = [] }: Manifest): string[] {
  return [`${width}x${height}`, ...sizes.map(([rows, columns]) => `${columns}x${rows}`)];
}

/** Wait for a result, but no longer than until a signal is aborted. */
function untilAborted<T>(result: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (!signal) return result;
  return new Promise((resolve, reject) => {
    const stop = (): void => reject(new Cancelled("cancelled", { cause: signal.reason }));
    signal.addEventListener("abort", stop, { once: true });
    result.then(resolve, reject).finally(() => signal.removeEventListener("abort", stop));
    if (signal.aborted) stop();
  });
}
