/** Browsers, and the renderer of Electron. */
import type { LoadOptions } from "../options.js";
import type { Engine } from "../sampling/engine.js";

export async function openEngine(_bundle: string, _options: LoadOptions): Promise<Engine> {
  throw new Error("not yet");
}
