/** Pages, and the renderer of Electron: bundles behind a URL, graphs in a worker. */
import { directoryUrl } from "../bundle/url.js";
import { DeviceError } from "../errors.js";
import type { LoadOptions } from "../options.js";
import type { Engine } from "../sampling/engine.js";
import { RemoteEngine } from "../worker/remote.js";
import { openHere } from "./browser_engine.js";

export async function openEngine(bundle: string, options: LoadOptions): Promise<Engine> {
  const url = directoryUrl(bundle, globalThis.location?.href);
  if (options.worker === false) return openHere(url, options);
  if (!("Worker" in globalThis)) throw new DeviceError("this page has no workers: pass worker: false");
  return RemoteEngine.load(url, options);
}
