/** Node, and the main process of Electron: bundles on disk, onnxruntime-node. */
import { existsSync } from "node:fs";
import { readFile, stat } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import type { FileInfo, Source } from "../bundle/files.js";
import { MANIFEST, REMEDY, type Manifest } from "../bundle/manifest.js";
import { directoryUrl } from "../bundle/url.js";
import { WebSource } from "../bundle/web_source.js";
import { BundleError, DeviceError, RequestError, clip, firstLine } from "../errors.js";
import type { Device, LoadOptions } from "../options.js";
import { LocalEngine, type Engine } from "../sampling/engine.js";
import { probe, startThreads, type Runtime } from "../sampling/runtime.js";

const FOR_PAGES = ["worker", "workerUrl", "wasmPaths", "cache"] as const;

/** Load a bundle into this process. */
export async function openEngine(bundle: string, options: LoadOptions): Promise<Engine> {
  for (const name of FOR_PAGES) {
    if (options[name]) options.onWarning?.(`${name}: only pages take this option, and Node goes on without it`);
  }
  const remote = /^https?:/i.test(bundle);
  const source = remote ? new WebSource(directoryUrl(bundle), options, null) : new Directory(bundle);
  return LocalEngine.load(source, await openRuntime(options), options);
}

/** A bundle's directory. */
class Directory implements Source {
  readonly where: string;
  readonly canReread = true;

  constructor(path: string) {
    try {
      this.where = path.startsWith("file:") ? fileURLToPath(path) : path;
    } catch (error) {
      throw new RequestError(`bundle: expected the path of a directory, got '${clip(path)}': ${firstLine(error)}`, {
        cause: error,
      });
    }
  }

  async manifest(): Promise<Uint8Array> {
    const path = join(this.where, MANIFEST);
    if (!existsSync(path)) {
      throw new BundleError(`${clip(this.where, 300)} is not a bundle: expected a file ${MANIFEST} in it, found none.`);
    }
    return this.#read(MANIFEST);
  }

  async check(manifest: Manifest): Promise<void> {
    for (const [name, { size }] of Object.entries(manifest.files)) {
      let found;
      try {
        found = await stat(join(this.where, name));
      } catch (error) {
        throw new BundleError(`${this.where}: ${clip(name)} is missing. ${REMEDY}`, { cause: error });
      }
      if (!found.isFile())
        throw new BundleError(`${this.where}: expected ${clip(name)} to be a regular file. ${REMEDY}`);
      if (found.size !== size) {
        throw new BundleError(`${join(this.where, name)}: expected ${size} bytes, found ${found.size}. ${REMEDY}`);
      }
    }
  }

  async read(name: string, info: FileInfo): Promise<Uint8Array<ArrayBuffer>> {
    const data = await this.#read(name);
    if (data.length !== info.size) {
      throw new BundleError(`${join(this.where, name)} changed on disk since the bundle was loaded: load it again`);
    }
    return data;
  }

  path(name: string): string {
    return join(this.where, name);
  }

  async #read(name: string): Promise<Uint8Array<ArrayBuffer>> {
    try {
      return new Uint8Array(await readFile(join(this.where, name)));
    } catch (error) {
      throw new BundleError(`${join(this.where, name)}: cannot be read: ${firstLine(error)}`, { cause: error });
    }
  }
}

async function openRuntime(options: LoadOptions): Promise<Runtime> {
  const { device = "auto", threads } = options;
  if (device !== "auto") return working(device, threads);
  const mayHaveGpu = process.platform === "linux" && existsSync("/dev/nvidiactl");
  const devices: Device[] = mayHaveGpu ? ["cuda", "cpu", "wasm"] : ["cpu", "wasm"];
  const problems: string[] = [];
  for (const one of devices) {
    try {
      return await working(one, threads);
    } catch (error) {
      if (!(error instanceof DeviceError)) throw error;
      problems.push(error.message);
    }
  }
  throw new DeviceError(`device: none works here. ${problems.join("; ")}`);
}

const PROVIDERS: Record<Device, string> = {
  cpu: "CPUExecutionProvider",
  cuda: "CUDAExecutionProvider",
  wasm: "CPUExecutionProvider",
  webgpu: "WebGpuExecutionProvider",
};

/** Return ONNX Runtime for a device on which a session really starts. Throws DeviceError. */
async function working(device: Device, threads: number | undefined): Promise<Runtime> {
  const name = device === "wasm" ? "onnxruntime-web" : "onnxruntime-node";
  let ort;
  try {
    ort = device === "wasm" ? await import("onnxruntime-web") : await import("onnxruntime-node");
  } catch (error) {
    const missing = (error as { code?: string }).code === "ERR_MODULE_NOT_FOUND";
    const problem = missing ? "is not installed" : `cannot be loaded: ${firstLine(error)}`;
    throw new DeviceError(`device: ${device} needs ${name}, which ${problem}. Install it: npm install ${name}`, {
      cause: error,
    });
  }
  ort.env.logLevel = "fatal"; // errors are thrown anyway
  const running = device === "wasm" ? startThreads(ort.env.wasm, threads, 1) : threads;
  const version = (ort.env.versions as { common: string; web?: string; node?: string })[
    device === "wasm" ? "web" : "node"
  ];
  const runtime: Runtime = {
    ort,
    device,
    package: name,
    version: version ?? ort.env.versions.common,
    provider: PROVIDERS[device],
    threads: running,
    opensFiles: device !== "wasm",
  };
  await probe(runtime);
  return runtime;
}
