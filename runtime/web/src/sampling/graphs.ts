/** The graphs of a pipeline: loading, running and freeing them. */
import type * as Ort from "onnxruntime-common";
import type { Bundle } from "../bundle/files.js";
import { TEXT_ENCODER, UNET_DECODER, UNET_ENCODER, VAE_DECODER } from "../bundle/manifest.js";
import { BundleError, Cancelled, firstLine, InferenceError, isOutOfMemory, OutOfMemoryError } from "../errors.js";
import type { Stage } from "../progress.js";
import { createSession, type Runtime } from "./runtime.js";

export type Tensors = Record<string, Ort.Tensor>;

/** Text encoder, UNet encoder, UNet decoder and image decoder of a bundle. */
export class Graphs {
  readonly #sessions = new Map<string, Promise<Ort.InferenceSession>>();

  constructor(
    readonly bundle: Bundle,
    readonly runtime: Runtime,
    readonly variant: string,
    readonly vaeGraph: string,
  ) {}

  /** Load all graphs, one after another, so that no two of them are in the making at once. Throws Cancelled. */
  async load(signal: AbortSignal | undefined): Promise<void> {
    for (const name of [TEXT_ENCODER, UNET_ENCODER, UNET_DECODER, this.vaeGraph]) {
      await this.#session(name);
      if (signal?.aborted) throw new Cancelled("cancelled while the bundle was loaded", { cause: signal.reason });
    }
  }

  /** Free graphs: all of them, or all but one. */
  async free(except?: string): Promise<void> {
    for (const [name, session] of [...this.#sessions]) {
      if (name === except) continue;
      this.#sessions.delete(name);
      await session.then((loaded) => loaded.release());
    }
  }

  /**
   * Run a graph.
   *
   * @param stage its name; vae_decoder stands for the chosen image decoder.
   * @param values by name. Those that the graph does not take are left out.
   * @param low free all other graphs first.
   * @throws BundleError, InferenceError, OutOfMemoryError
   */
  async run(stage: Stage, values: Tensors, low: boolean): Promise<Tensors> {
    const name = stage === VAE_DECODER ? this.vaeGraph : stage;
    if (low) await this.free(name);
    const session = await this.#session(name);
    const missing = session.inputNames.filter((input) => !(input in values));
    if (missing.length > 0)
      throw new BundleError(`${name}: it takes ${missing.join(", ")}, which no other graph makes`);
    const feeds = Object.fromEntries(session.inputNames.map((input) => [input, values[input] as Ort.Tensor]));
    try {
      return { ...(await session.run(feeds)) } as Tensors;
    } catch (error) {
      if (isOutOfMemory(error))
        throw new OutOfMemoryError(`${name} ran out of memory on ${this.runtime.device}`, { cause: error });
      throw new InferenceError(`${name} failed on ${this.runtime.device}: ${firstLine(error)}`, { cause: error });
    }
  }

  #session(name: string): Promise<Ort.InferenceSession> {
    const known = this.#sessions.get(name);
    if (known) return known;
    const session = this.#load(name);
    this.#sessions.set(name, session);
    session.catch(() => this.#sessions.delete(name)); // so that a later call can try again
    return session;
  }

  async #load(name: string): Promise<Ort.InferenceSession> {
    const file = this.bundle.manifest.variants[this.variant]?.[name];
    if (file === undefined) throw new BundleError(`variants.${this.variant}: expected the graph ${name}`);
    return createSession(this.runtime, file, await this.bundle.graph(file, this.runtime.opensFiles));
  }

  /** Return an output as float32 of the expected shape, with finite values. Throws BundleError, InferenceError. */
  output(stage: Stage, tensors: Tensors, name: string, shape: (number | null)[]): Float32Array {
    const tensor = tensors[name];
    const fits =
      tensor?.type === "float32" &&
      tensor.dims.length === shape.length &&
      tensor.dims.every((size, i) => shape[i] === null || size === shape[i]);
    if (!fits) {
      const got = tensor ? `${tensor.type} [${tensor.dims.join(", ")}]` : Object.keys(tensors).join(", ");
      throw new BundleError(
        `${stage}: expected ${name} of shape [${shape.map((size) => size ?? "any").join(", ")}], got ${got}`,
      );
    }
    const values = tensor.data as Float32Array;
    if (!values.every(Number.isFinite)) {
      throw new InferenceError(`${stage}: ${name} has NaN or infinity on ${this.runtime.device}. ${this.#remedy()}`);
    }
    return values;
  }

  #remedy(): string {
    const { precision, variants } = this.bundle.manifest;
    if (this.variant !== "portable" && "portable" in variants) return 'Load with variant: "portable"';
    if (precision !== "fp32") return `${precision} overflowed: export the bundle again in fp32`;
    return "Look for damaged weights";
  }
}
