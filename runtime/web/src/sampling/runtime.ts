/** ONNX Runtime: where it comes from, which devices it has, and sessions on them. */
import type * as Ort from "onnxruntime-common";
import type { GraphFiles } from "../bundle/files.js";
import { BundleError, DeviceError, firstLine, isOutOfMemory, OutOfMemoryError } from "../errors.js";
import type { Device } from "../options.js";

/** ONNX Runtime for one device. */
export interface Runtime {
  ort: typeof Ort;
  device: Device;
  /** The npm package, for records. */
  package: string;
  version: string;
  /** ONNX Runtime's name of the provider, for records. */
  provider: string;
  /** Threads of a graph. Undefined: ONNX Runtime decides. */
  threads: number | undefined;
  /** Whether it opens files by their paths, and the external data beside them. */
  opensFiles: boolean;
}

// The variants that a device can run, the best one first.
const VARIANTS: Record<Device, string[]> = {
  webgpu: ["web", "portable"],
  wasm: ["web", "portable"],
  cpu: ["cpu", "portable", "web"],
  cuda: ["cuda", "portable", "web"],
};

/** Return the variant to run. Throws DeviceError if the bundle has none for the device, or not the demanded one. */
export function chooseVariant(variants: Record<string, unknown>, device: Device, demanded: string | undefined): string {
  const found = Object.keys(variants);
  const runs = VARIANTS[device].filter((name) => found.includes(name));
  if (demanded !== undefined && !found.includes(demanded)) {
    throw new DeviceError(`variant: the bundle has ${found.join(", ")}, got ${demanded}`);
  }
  if (demanded !== undefined && !runs.includes(demanded)) {
    throw new DeviceError(`variant: ${device} runs ${VARIANTS[device].join(", ")}, got ${demanded}`);
  }
  const chosen = demanded ?? runs[0];
  if (chosen === undefined) {
    throw new DeviceError(
      `device: ${device} runs ${VARIANTS[device].join(", ")}, and the bundle has ${found.join(", ")}`,
    );
  }
  return chosen;
}

// A graph of one node, y = -x, to see whether a device really starts.
const PROBE = "CAg6MgoLCgF4EgF5IgNOZWcSAXBaDwoBeBIKCggIARIECgIIAWIPCgF5EgoKCAgBEgQKAggBQgQKABAN";

/** Run a tiny graph on a device. Throws DeviceError if the device does not work here. */
export async function probe(runtime: Runtime): Promise<void> {
  const model = Uint8Array.from(atob(PROBE), (one) => one.charCodeAt(0));
  try {
    const session = await runtime.ort.InferenceSession.create(model, sessionOptions(runtime));
    const { y } = await session.run({ x: new runtime.ort.Tensor("float32", [2], [1]) });
    await session.release();
    if (y?.data[0] !== -2) throw new Error(`the probe computed ${String(y?.data[0])} in place of -2`);
  } catch (error) {
    throw new DeviceError(`device: ${runtime.device} does not work here: ${firstLine(error)}`, { cause: error });
  }
}

// ONNX Runtime's settings of WebAssembly, an object for each of its builds => threads
const started = new WeakMap<object, number>();

/**
 * Set the threads of ONNX Runtime for WebAssembly. It takes them once: those of the first load stay.
 *
 * @param asked undefined: as many as run already, or else `standard`.
 * @returns the number that runs.
 * @throws DeviceError if another number runs already.
 */
export function startThreads(wasm: { numThreads?: number }, asked: number | undefined, standard: number): number {
  const running = started.get(wasm);
  if (running !== undefined && asked !== undefined && asked !== running) {
    throw new DeviceError(
      `threads: ONNX Runtime for WebAssembly runs with ${running} here since the first load, and cannot change to ` +
        `${asked}: load with threads: ${running}, or in another worker or process`,
    );
  }
  const threads = running ?? asked ?? standard;
  started.set(wasm, threads);
  wasm.numThreads = threads;
  return threads;
}

/** Create a session of a graph. Throws BundleError, OutOfMemoryError. */
export async function createSession(runtime: Runtime, name: string, files: GraphFiles): Promise<Ort.InferenceSession> {
  const options = sessionOptions(runtime);
  if (files.externalData.length > 0) options.externalData = files.externalData;
  const { InferenceSession } = runtime.ort;
  try {
    const { model } = files;
    return await (typeof model === "string"
      ? InferenceSession.create(model, options)
      : InferenceSession.create(model, options));
  } catch (error) {
    if (isOutOfMemory(error)) {
      throw new OutOfMemoryError(
        `${name} ran out of memory while it was loaded on ${runtime.device}: load with memory: "low"`,
        { cause: error },
      );
    }
    throw new BundleError(`${name} cannot be loaded on ${runtime.device}: ${firstLine(error)}`, { cause: error });
  }
}

function sessionOptions({ device, threads }: Runtime): Ort.InferenceSession.SessionOptions {
  return {
    executionProviders: [device],
    ...(threads === undefined ? {} : { intraOpNumThreads: threads }),
    // ONNX Runtime keeps a memory layout for each XOR of all dimensions of the inputs. Small runs would get the memory
    // of large ones.
    enableMemPattern: false,
    logSeverityLevel: 4, // log nothing: errors are thrown anyway
    // Idle threads would spin, and take the cores from the application.
    extra: { session: { intra_op: { allow_spinning: "0" } } },
  };
}
