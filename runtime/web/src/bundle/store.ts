/**
 * Files of bundles in a browser's Cache Storage. A file lies there in chunks under its sha256, so that an interrupted
 * download goes on where it ended, and equal files of several bundles are kept once.
 */
import type { FileInfo } from "./files.js";

export const CACHE = "tiue-runtime-1";
export const CHUNK = 4 * 2 ** 20; // bytes that are lost at most when a download is interrupted

// Keys of Cache Storage are URLs. Nothing is ever fetched from these.
const KEYS = "https://tiue-runtime.invalid";
// The bundle.json of loads that ended, and of those that began: it names the files that an interrupted load has left.
const MANIFESTS = { kept: `${KEYS}/manifest?url=`, begun: `${KEYS}/begun?url=` };
type Of = keyof typeof MANIFESTS;

export class Store {
  private constructor(readonly cache: Cache) {}

  /** Open the store, or return null where a browser has none: without https, or where a setting forbids it. */
  static async open(): Promise<Store | null> {
    if (!("caches" in globalThis)) return null;
    try {
      return new Store(await caches.open(CACHE));
    } catch {
      return null;
    }
  }

  /** Copy the chunks of a file that follow each other from its beginning. Returns the number of bytes. */
  async read(info: FileInfo, into: Uint8Array): Promise<number> {
    let at = 0;
    while (at < info.size) {
      const chunk = await this.cache.match(chunkKey(info, at));
      const data = chunk && new Uint8Array(await chunk.arrayBuffer());
      if (!data || data.length === 0 || at + data.length > info.size) break;
      into.set(data, at);
      at += data.length;
    }
    return at;
  }

  /** Keep a chunk that begins at byte `at` of a file. Throws QuotaExceededError if the storage is full. */
  async write(info: FileInfo, at: number, data: Uint8Array<ArrayBuffer>): Promise<void> {
    await this.cache.put(chunkKey(info, at), new Response(data));
  }

  /** Delete all chunks of a file. */
  async remove(sha256: string): Promise<void> {
    const keys = await this.cache.keys();
    const own = keys.filter(({ url }) => url.startsWith(`${KEYS}/${sha256}/`));
    await Promise.all(own.map((key) => this.cache.delete(key)));
  }

  /** Return the bundle.json that was kept for a URL, or null. */
  async manifest(url: string, of: Of = "kept"): Promise<Uint8Array | null> {
    const kept = await this.cache.match(manifestKey(url, of));
    return kept ? new Uint8Array(await kept.arrayBuffer()) : null;
  }

  /** Return every bundle.json, also those of loads that only began. */
  async manifests(): Promise<Uint8Array[]> {
    const keys = (await this.cache.keys()).filter(({ url }) =>
      Object.values(MANIFESTS).some((key) => url.startsWith(key)),
    );
    const kept = await Promise.all(keys.map((key) => this.cache.match(key)));
    const files = kept.filter((file) => file !== undefined); // another tab may have deleted one
    return Promise.all(files.map(async (file) => new Uint8Array(await file.arrayBuffer())));
  }

  async keepManifest(url: string, data: Uint8Array<ArrayBuffer>, of: Of = "kept"): Promise<void> {
    await this.cache.put(manifestKey(url, of), new Response(data));
  }

  /** Forget that a load began. */
  async endLoad(url: string): Promise<void> {
    await this.cache.delete(manifestKey(url, "begun"));
  }
}

function chunkKey({ sha256 }: FileInfo, at: number): string {
  return `${KEYS}/${sha256}/${at}`;
}

function manifestKey(url: string, of: Of): string {
  return `${MANIFESTS[of]}${encodeURIComponent(url)}`;
}
