/**
 * From a request to pixels, on loaded graphs.
 *
 *     prompt -> text_encoder -> text
 *     z_T, text -> denoise: unet_encoder once, unet_decoder at N timesteps -> z_0
 *     z_0 -> vae_decoder -> image
 */
import { Bundle, type Source } from "../bundle/files.js";
import { TEXT_ENCODER, TOKENIZER, UNET_DECODER, UNET_ENCODER, vaeGraphs, type Manifest } from "../bundle/manifest.js";
import { asOutOfMemory, Cancelled, clip, RequestError } from "../errors.js";
import { gaussian } from "../noise.js";
import type { Device, LoadOptions, Mode } from "../options.js";
import { toLevel } from "../picture/picture.js";
import type { Report, Stage } from "../progress.js";
import type { Request } from "../request.js";
import { PromptTokenizer, type Tokens } from "../text/tokenizer.js";
import { denoise } from "./denoise.js";
import { Graphs, type Tensors } from "./graphs.js";
import { chooseVariant, type Runtime } from "./runtime.js";

/** What is known about loaded graphs. It is plain data. */
export interface EngineInfo {
  where: string;
  manifest: Manifest;
  bundleSha256: string;
  device: Device;
  variant: string;
  vae: string;
  provider: string;
  versions: { [name: string]: string };
  /** Threads of a graph, as far as this package decides. */
  threads: number | undefined;
}

/** What a request made, as plain data. */
export interface Sampled {
  /** RGBA bytes of each picture, prompt-major. */
  pixels: Uint8ClampedArray<ArrayBuffer>[];
  /** z_0, float32 (B, C, h, w). */
  latents: Float32Array;
  mode: Mode;
  /** Seconds of each graph. */
  timings: { [stage: string]: number };
}

/** Hears of a request while it runs. */
export interface Listener {
  onReport(report: Report): void;
  onWarning(message: string): void;
}

/** The graphs of a bundle in this thread, or in a worker. */
export interface Engine {
  readonly info: EngineInfo;
  sample(request: Request, listener: Listener, signal: AbortSignal | undefined): Promise<Sampled>;
  dispose(): Promise<void>;
}

/** The graphs of a bundle in this thread. Requests run one after another. */
export class LocalEngine implements Engine {
  #last: Promise<unknown> = Promise.resolve();

  private constructor(
    readonly info: EngineInfo,
    readonly graphs: Graphs,
    readonly tokenizer: PromptTokenizer,
  ) {}

  /** Load a bundle. Throws BundleError, DeviceError, RequestError, OutOfMemoryError, Cancelled. */
  static async load(source: Source, runtime: Runtime, options: LoadOptions): Promise<LocalEngine> {
    const bundle = await Bundle.load(source);
    const { manifest } = bundle;
    const decoders = vaeGraphs(manifest);
    const vae = options.vae ?? Object.keys(decoders)[0] ?? "kl";
    const vaeGraph = decoders[vae];
    if (vaeGraph === undefined) {
      throw new RequestError(`vae: bundle ${manifest.name} has ${Object.keys(decoders).join(", ")}, got ${vae}`);
    }
    const variant = chooseVariant(manifest.variants, runtime.device, options.variant);
    const graphFiles = manifest.variants[variant] ?? {};
    const needed = [TEXT_ENCODER, UNET_ENCODER, UNET_DECODER, vaeGraph].flatMap((graph) => graphFiles[graph] ?? []);
    bundle.expect([TOKENIZER, ...needed]);
    const graphs = new Graphs(bundle, runtime, variant, vaeGraph);
    let tokenizer: PromptTokenizer;
    try {
      tokenizer = new PromptTokenizer(await bundle.read(TOKENIZER), manifest.text_length);
      if (options.memory !== "low") await graphs.load(options.signal);
      else if (source.hold) {
        source.hold();
        for (const file of needed) await bundle.graph(file, false); // fetch it once, now
      }
      await source.complete?.();
      if (options.signal?.aborted) {
        throw new Cancelled("cancelled while the bundle was loaded", { cause: options.signal.reason });
      }
    } catch (error) {
      await graphs.free();
      throw asOutOfMemory(error, `the files of bundle ${manifest.name} do not fit into memory`);
    }
    const info: EngineInfo = {
      where: source.where,
      manifest,
      bundleSha256: bundle.sha256,
      device: runtime.device,
      variant,
      vae,
      provider: runtime.provider,
      versions: { [runtime.package]: runtime.version },
      threads: runtime.threads,
    };
    return new LocalEngine(info, graphs, tokenizer);
  }

  sample(request: Request, listener: Listener, signal: AbortSignal | undefined): Promise<Sampled> {
    const turn = this.#last.then(() => new Sampling(this, request, listener, signal).sample());
    this.#last = turn.catch(() => undefined);
    return turn;
  }

  async dispose(): Promise<void> {
    await this.#last;
    await this.graphs.free();
  }
}

const BUSY = 20; // milliseconds after which messages get a chance

/** One request while it runs. */
class Sampling {
  readonly #begun = performance.now();
  readonly #timings: { [stage: string]: number } = {};
  readonly #low: boolean;
  #gaveWay = performance.now();

  constructor(
    readonly engine: LocalEngine,
    readonly request: Request,
    readonly listener: Listener,
    readonly signal: AbortSignal | undefined,
  ) {
    this.#low = request.memory === "low" && engine.graphs.bundle.source.canReread;
  }

  async sample(): Promise<Sampled> {
    this.#check("before it began");
    const { request, engine } = this;
    const [count, channels, height, width] = request.shape;
    if (request.memory === "low" && !this.#low) {
      this.listener.onWarning(
        'memory: "low" frees no graph here, because its files would be downloaded again: load with memory: "low"',
      );
    }
    try {
      const size = channels * height * width;
      const noise = new Float32Array(count * size);
      for (const [i, seed] of request.seeds.entries()) {
        noise.set(gaussian(seed, size), i * size);
        await this.#giveWay("while the noise was drawn");
      }
      const { ort } = engine.graphs.runtime;
      const text = await this.#encode();
      const z_T = new ort.Tensor("float32", noise, request.shape);
      const given = { latents: z_T, text };
      const features = await this.#run("unet_encoder", given);
      this.#report("unet_encoder", 1, 1);
      const [latents, mode] = await denoise(
        {
          decode: async (rows, weights) => {
            const step = {
              step_index: new ort.Tensor("int64", BigInt64Array.from(rows, BigInt), [rows.length]),
              step_weight: new ort.Tensor("float32", Float32Array.from(weights), [rows.length]),
            };
            const outputs = await this.#run("unet_decoder", { ...given, ...features, ...step });
            return engine.graphs.output("unet_decoder", outputs, "contribution", request.shape);
          },
          report: (step, estimate) => this.#report("unet_decoder", step, request.steps, estimate),
          warn: (message) => this.listener.onWarning(message),
        },
        request.schedule,
        noise,
        firstMode(request),
      );
      const pixels = await this.#decode(latents);
      return { pixels, latents, mode, timings: this.#timings };
    } catch (error) {
      throw asOutOfMemory(error, "the request does not fit into memory: ask for fewer or smaller pictures");
    } finally {
      if (this.#low) await engine.graphs.free();
    }
  }

  /** Encode the prompts => text, one row per picture. Equal prompts are encoded once. */
  async #encode(): Promise<Tensors[string]> {
    const { request, engine } = this;
    const { ort } = engine.graphs.runtime;
    const length = engine.info.manifest.text_length;
    const prompts = [...new Set(request.prompts)];
    const tokens: Tokens = engine.tokenizer.encode(prompts);
    for (const cut of tokens.cut.filter(Boolean)) {
      this.listener.onWarning(`prompt longer than ${length} tokens; this part was cut off: '${clip(cut)}'`);
    }
    const size = [prompts.length, length];
    const outputs = await this.#run("text_encoder", {
      input_ids: new ort.Tensor("int64", tokens.inputIds, size),
      attention_mask: new ort.Tensor("int64", tokens.attentionMask, size),
    });
    const text = engine.graphs.output("text_encoder", outputs, "text", [...size, null]);
    this.#report("text_encoder", 1, 1);
    const row = text.length / prompts.length;
    const repeated = new Float32Array(row * request.shape[0]);
    request.prompts.forEach((prompt, i) => {
      const from = prompts.indexOf(prompt) * row;
      repeated.set(text.subarray(from, from + row), i * row);
    });
    return new ort.Tensor("float32", repeated, [request.shape[0], length, row / length]);
  }

  /** Decode latents => RGBA bytes of each picture. */
  async #decode(latents: Float32Array): Promise<Uint8ClampedArray<ArrayBuffer>[]> {
    const { graphs, info } = this.engine;
    const [count, , h, w] = this.request.shape;
    const [height, width] = [h * info.manifest.pixels_per_latent, w * info.manifest.pixels_per_latent];
    const tensor = new graphs.runtime.ort.Tensor("float32", latents, this.request.shape);
    const outputs = await this.#run("vae_decoder", { latents: tensor });
    const image = graphs.output("vae_decoder", outputs, "image", [count, 3, height, width]);
    this.#report("vae_decoder", 1, 1);
    const area = height * width;
    return Array.from({ length: count }, (_, i) => {
      const pixels = new Uint8ClampedArray(4 * area).fill(255);
      for (let color = 0; color < 3; color++) {
        const plane = image.subarray((3 * i + color) * area, (3 * i + color + 1) * area);
        plane.forEach((value, at) => {
          pixels[4 * at + color] = toLevel(Math.fround(Math.fround(value * 0.5) + 0.5));
        });
      }
      return pixels;
    });
  }

  async #run(stage: Stage, values: Tensors): Promise<Tensors> {
    this.#check(`before ${stage} ran`);
    const begun = performance.now();
    const outputs = await this.engine.graphs.run(stage, values, this.#low);
    this.#timings[stage] = (this.#timings[stage] ?? 0) + (performance.now() - begun) / 1000;
    await this.#giveWay(`after ${stage} ran`);
    return outputs;
  }

  /** Let messages and signals arrive, unless they just could. ONNX Runtime for WebAssembly does not give way to them. */
  async #giveWay(when: string): Promise<void> {
    if (performance.now() - this.#gaveWay > BUSY) {
      await new Promise((resolve) => setTimeout(resolve));
      this.#gaveWay = performance.now();
    }
    this.#check(when);
  }

  #check(when: string): void {
    if (this.signal?.aborted) throw new Cancelled(`cancelled ${when}`, { cause: this.signal.reason });
  }

  #report(stage: Stage, step: number, steps: number, estimate?: () => Float32Array): void {
    const seconds = (performance.now() - this.#begun) / 1000;
    this.listener.onReport({
      stage,
      step,
      steps,
      seconds,
      estimate: this.request.estimates ? estimate?.() : undefined,
    });
  }
}

function firstMode({ memory }: Request): Mode {
  return memory === "auto" ? "parallel" : memory === "low" ? "sequential" : memory;
}
