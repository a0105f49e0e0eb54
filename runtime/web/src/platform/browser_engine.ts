/** The graphs of a bundle in this thread of a browser, with onnxruntime-web. */
import { subtleCrypto } from "../bundle/sha256.js";
import { Store } from "../bundle/store.js";
import { WebSource } from "../bundle/web_source.js";
import { DeviceError, firstLine } from "../errors.js";
import type { Device, LoadOptions } from "../options.js";
import { LocalEngine, type Engine } from "../sampling/engine.js";
import { probe, startThreads, type Runtime } from "../sampling/runtime.js";

const MOST_THREADS = 4; // unless the caller asks for more

/** Load a bundle. Throws as LocalEngine.load. */
export async function openHere(url: string, options: LoadOptions): Promise<Engine> {
  subtleCrypto(); // an early error, before anything is fetched
  const store = options.cache === false ? null : await Store.open();
  if (!store && options.cache !== false) {
    options.onWarning?.("this browser keeps no files for this page; the model is downloaded again next time");
  }
  const source = new WebSource(url, options, store);
  return LocalEngine.load(source, await openRuntime(options), options);
}

async function openRuntime(options: LoadOptions): Promise<Runtime> {
  const { device = "auto" } = options;
  if (device === "cpu" || device === "cuda") {
    throw new DeviceError(`device: pages run webgpu and wasm, got ${device}`);
  }
  const standard = standardThreads(options.threads);
  if (device !== "auto") return working(device, standard, options);
  try {
    return await working("webgpu", standard, options);
  } catch (error) {
    if (!(error instanceof DeviceError)) throw error;
    return working("wasm", standard, options);
  }
}

/**
 * Return how many threads to run if nobody asks for a number. Only pages that are isolated from other origins have
 * memory that threads share. Throws DeviceError if more threads are asked for than can run.
 */
function standardThreads(asked: number | undefined): number {
  const isolated = globalThis.crossOriginIsolated && "SharedArrayBuffer" in globalThis;
  if (asked !== undefined && asked > 1 && !isolated) {
    throw new DeviceError(
      `threads: ${asked} threads need SharedArrayBuffer, which only pages with cross-origin isolation have. Send the ` +
        "headers Cross-Origin-Opener-Policy: same-origin and Cross-Origin-Embedder-Policy: require-corp, or load with threads: 1",
    );
  }
  return isolated ? Math.min(navigator.hardwareConcurrency, MOST_THREADS) : 1;
}

/** Return ONNX Runtime for a device on which a session really starts. Throws DeviceError. */
async function working(
  device: Extract<Device, "webgpu" | "wasm">,
  standard: number,
  options: LoadOptions,
): Promise<Runtime> {
  if (device === "webgpu") await checkGpu();
  let ort;
  try {
    ort = device === "webgpu" ? await import("onnxruntime-web/webgpu") : await import("onnxruntime-web/wasm");
  } catch (error) {
    throw new DeviceError(`device: ${device} needs onnxruntime-web, which cannot be loaded: ${firstLine(error)}`, {
      cause: error,
    });
  }
  ort.env.logLevel = "fatal"; // errors are thrown anyway
  if (options.wasmPaths) ort.env.wasm.wasmPaths = String(options.wasmPaths).replace(/\/*$/, "/");
  const threads = startThreads(ort.env.wasm, options.threads, standard);
  const versions = ort.env.versions as { common: string; web?: string };
  const runtime: Runtime = {
    ort,
    device,
    package: "onnxruntime-web",
    version: versions.web ?? versions.common,
    provider: device === "webgpu" ? "WebGpuExecutionProvider" : "CPUExecutionProvider",
    threads,
    opensFiles: false,
  };
  await probe(runtime);
  return runtime;
}

interface Gpu {
  requestAdapter(): Promise<object | null>;
}

async function checkGpu(): Promise<void> {
  const gpu = (navigator as unknown as { gpu?: Gpu }).gpu;
  if (!gpu) throw new DeviceError('device: this browser has no WebGPU here; load with device: "wasm"');
  if (!(await gpu.requestAdapter())) throw new DeviceError('device: WebGPU finds no GPU; load with device: "wasm"');
}
