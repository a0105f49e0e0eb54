/** The graphs of a bundle in a worker of the page. */
import { Cancelled, DeviceError, firstLine, fromSent, InferenceError } from "../errors.js";
import type { LoadOptions } from "../options.js";
import type { Request } from "../request.js";
import type { Engine, EngineInfo, Listener, Sampled } from "../sampling/engine.js";
import type { FromWorker, ToWorker } from "./messages.js";

interface Waiting {
  readonly listener: Listener;
  readonly resolve: (sampled: Sampled) => void;
  readonly reject: (error: Error) => void;
}

export class RemoteEngine implements Engine {
  readonly #waiting = new Map<number, Waiting>();
  readonly #running = new Set<Promise<Sampled>>();
  #next = 0;
  #dead: Error | null = null;

  private constructor(
    readonly worker: Worker,
    readonly info: EngineInfo,
    readonly onWarning: ((message: string) => void) | undefined,
  ) {
    worker.onmessage = ({ data }: MessageEvent<FromWorker>) => this.#receive(data);
    worker.onerror = (event) => this.#fail(event.message || "an error without a message");
    worker.onmessageerror = () => this.#fail("a message could not be read");
  }

  /** Start a worker and load a bundle in it. Throws as LocalEngine.load. */
  static load(url: string, options: LoadOptions): Promise<RemoteEngine> {
    const { signal, workerUrl, wasmPaths, device, vae, variant, memory, threads, cache } = options;
    return new Promise((resolve, reject) => {
      let worker: Worker;
      try {
        // Bundlers find the worker by this form.
        worker = workerUrl
          ? new Worker(workerUrl, { type: "module", name: "tiue-runtime" })
          : new Worker(new URL("./worker.js", import.meta.url), { type: "module", name: "tiue-runtime" });
      } catch (error) {
        reject(new DeviceError(`the worker cannot be started: ${firstLine(error)}`, { cause: error }));
        return;
      }
      const fail = (error: Error): void => {
        worker.terminate();
        signal?.removeEventListener("abort", abort);
        reject(error);
      };
      const abort = (): void => fail(new Cancelled("cancelled while the bundle was loaded", { cause: signal?.reason }));
      signal?.addEventListener("abort", abort, { once: true });
      worker.onerror = (event) => {
        event.preventDefault();
        const problem = event.message || "its file cannot be fetched or read; pass workerUrl";
        fail(new DeviceError(`the worker cannot be started: ${problem}`));
      };
      worker.onmessageerror = () => fail(new DeviceError("the worker cannot be started: a message could not be read"));
      const receive = (data: FromWorker): void => {
        if (data.type === "loading") options.onProgress?.(data.progress);
        else if (data.type === "warning") options.onWarning?.(data.message);
        else if (data.type === "failed") fail(fromSent(data.error));
        else if (data.type === "loaded") {
          signal?.removeEventListener("abort", abort);
          resolve(new RemoteEngine(worker, data.info, options.onWarning));
        }
      };
      worker.onmessage = ({ data }: MessageEvent<FromWorker>) => {
        try {
          receive(data);
        } catch (error) {
          fail(error as Error); // of onProgress or onWarning: the caller gets it
        }
      };
      if (signal?.aborted) return abort();
      const sent = { device, vae, variant, memory, threads, cache, wasmPaths: wasmPaths && String(wasmPaths) };
      worker.postMessage({ type: "load", url, options: sent } satisfies ToWorker);
    });
  }

  sample(request: Request, listener: Listener, signal: AbortSignal | undefined): Promise<Sampled> {
    const id = this.#next++;
    const abort = (): void => this.#send({ type: "abort", id });
    const sampling = new Promise<Sampled>((resolve, reject) => {
      if (this.#dead) {
        reject(this.#dead);
        return;
      }
      this.#waiting.set(id, { listener, resolve, reject });
      this.#send({ type: "sample", id, request });
      signal?.addEventListener("abort", abort, { once: true });
      if (signal?.aborted) abort();
    });
    this.#running.add(sampling);
    const end = (): void => {
      this.#running.delete(sampling);
      signal?.removeEventListener("abort", abort);
    };
    sampling.then(end, end);
    return sampling;
  }

  /** Wait for the requests that run, then end the worker. This gives all of its memory back. */
  async dispose(): Promise<void> {
    await Promise.allSettled(this.#running);
    this.worker.terminate();
  }

  #send(message: ToWorker): void {
    this.worker.postMessage(message);
  }

  #receive(message: FromWorker): void {
    if (message.type === "warning" && message.id === null) this.onWarning?.(message.message);
    if (!("id" in message) || message.id === null) return;
    const waiting = this.#waiting.get(message.id);
    if (!waiting) return;
    if (message.type === "warning") waiting.listener.onWarning(message.message);
    else if (message.type === "report") waiting.listener.onReport(message.report);
    else {
      this.#waiting.delete(message.id);
      if (message.type === "sampled") waiting.resolve(message.sampled);
      else waiting.reject(fromSent(message.error));
    }
  }

  /** Give up the worker, which may still live and hold the graphs. */
  #fail(problem: string): void {
    this.worker.terminate();
    this.#dead = new InferenceError(`the worker ended: ${problem}. Load the bundle again`);
    for (const { reject } of this.#waiting.values()) reject(this.#dead);
    this.#waiting.clear();
  }
}
