/** A bundle behind a URL. */
import { BundleError, Cancelled, clip, firstLine } from "../errors.js";
import type { LoadOptions } from "../options.js";
import type { FileInfo, Source } from "./files.js";
import { MANIFEST, REMEDY } from "./manifest.js";
import { sha256 } from "./sha256.js";

export class WebSource implements Source {
  readonly where: string;

  constructor(
    url: string,
    readonly options: LoadOptions,
    readonly store: null,
  ) {
    this.where = url.replace(/\/+$/, "");
  }

  manifest(): Promise<Uint8Array> {
    return this.#fetch(MANIFEST);
  }

  async check(): Promise<void> {}

  async read(name: string, info: FileInfo): Promise<Uint8Array<ArrayBuffer>> {
    const data = await this.#fetch(name);
    if ((await sha256(data)) !== info.sha256) {
      throw new BundleError(`${this.where}: content differs from ${MANIFEST}: ${clip(name)}. ${REMEDY}`);
    }
    return data;
  }

  path(): null {
    return null;
  }

  async #fetch(name: string): Promise<Uint8Array<ArrayBuffer>> {
    const url = `${this.where}/${name}`;
    const { signal } = this.options;
    try {
      const response = await fetch(url, signal ? { signal } : {});
      if (!response.ok) throw new BundleError(`${url}: the server answered ${response.status}`);
      return new Uint8Array(await response.arrayBuffer());
    } catch (error) {
      if (signal?.aborted) throw new Cancelled("cancelled while files were fetched", { cause: signal.reason });
      if (error instanceof BundleError) throw error;
      throw new BundleError(`${url}: cannot be fetched: ${firstLine(error)}`, { cause: error });
    }
  }
}
