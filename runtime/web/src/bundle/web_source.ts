/** A bundle behind a URL: fetched with progress, checked by sha256, kept in the browser, and resumed. */
import { BundleError, Cancelled, clip, firstLine } from "../errors.js";
import type { LoadOptions } from "../options.js";
import type { FileInfo, Source } from "./files.js";
import { MANIFEST, MANIFEST_LIMIT, REMEDY, type Manifest } from "./manifest.js";
import { sha256 } from "./sha256.js";
import { CHUNK, type Store } from "./store.js";

type Bytes = Uint8Array<ArrayBuffer>;

const TRIES = 3; // of a download in a row that bring no new byte
const PAUSE = 500; // milliseconds before the second try; each later pause is twice as long

export class WebSource implements Source {
  readonly where: string;
  readonly #reader: Store | null; // what was kept can be read, even after the store has failed to keep more
  #store: Store | null; // null after the first failure
  #held: Map<string, Bytes> | null = null; // sha256 => a file that only memory keeps; null: not asked for
  #options: Pick<LoadOptions, "signal" | "onProgress" | "onWarning">;
  #manifest: Bytes | null = null; // as fetched
  #loaded = 0;
  #total = 0;

  /**
   * @param url of the folder that holds bundle.json.
   * @param store where files are kept, or null.
   */
  constructor(url: string, options: Pick<LoadOptions, "signal" | "onProgress" | "onWarning">, store: Store | null) {
    this.#options = options;
    this.where = url.replace(/\/+$/, "");
    this.#reader = this.#store = store;
  }

  get canReread(): boolean {
    return this.#store !== null || this.#held !== null;
  }

  hold(): void {
    this.#held ??= new Map();
  }

  /** Return bundle.json as the server has it, or as it was kept, if there is no network. */
  async manifest(): Promise<Bytes> {
    try {
      this.#manifest = await this.#fetchManifest();
      return this.#manifest;
    } catch (error) {
      const kept = error instanceof Offline ? await this.#store?.manifest(this.where).catch(() => null) : null;
      if (!kept) throw error;
      return kept as Bytes;
    }
  }

  async #fetchManifest(): Promise<Bytes> {
    const url = this.#url(MANIFEST);
    const response = await this.#fetch(url);
    if (response.status === 404) {
      throw new BundleError(`${this.where} is not a bundle: expected a file ${MANIFEST} in it, found none.`);
    }
    if (!response.ok) throw new BundleError(`${url}: the server answered ${response.status}`);
    if (Number(response.headers.get("Content-Length")) > MANIFEST_LIMIT) {
      throw new BundleError(`${url}: expected at most ${MANIFEST_LIMIT} bytes`);
    }
    return new Uint8Array(await this.#body(url, () => response.arrayBuffer()));
  }

  /**
   * Note which files this load will keep, and delete those that an interrupted load of an older version has left. Each
   * file is checked when it is read.
   */
  async check(): Promise<void> {
    if (!this.#store || !this.#manifest) return;
    try {
      const left = await this.#store.manifest(this.where, "begun");
      if (equal(left, this.#manifest)) return;
      if (equal(await this.#store.manifest(this.where), this.#manifest)) await this.#store.endLoad(this.where);
      else await this.#store.keepManifest(this.where, this.#manifest, "begun");
      await this.#removeFilesOf(left);
    } catch (error) {
      this.#storeFailed(error);
    }
  }

  expect(infos: FileInfo[]): void {
    this.#total += infos.reduce((sum, { size }) => sum + size, 0);
  }

  async read(name: string, info: FileInfo): Promise<Bytes> {
    const held = this.#held?.get(info.sha256);
    if (held) return this.#done(name, info, held);
    const data = new Uint8Array(info.size);
    let at = await this.#readKept(name, info, data);
    if (at === info.size) {
      if ((await sha256(data)) === info.sha256) return this.#done(name, info, data);
      await this.#removeDamaged(name, info);
      at = 0;
    }
    const pieces = await this.#download(name, info, data, at);
    if ((await sha256(data)) === info.sha256) return this.#done(name, info, data);
    await this.#remove(info);
    // One of several pieces may be of another version of the file. So fetch it whole.
    if (pieces > 1) {
      await this.#download(name, info, data, 0);
      if ((await sha256(data)) === info.sha256) return this.#done(name, info, data);
      await this.#remove(info);
    }
    throw new BundleError(`${this.where}: content differs from ${MANIFEST}: ${clip(name)}. ${REMEDY}`);
  }

  path(): null {
    return null;
  }

  /** Keep bundle.json, now that all files are here, and delete those of its older version that no bundle names now. */
  async complete(): Promise<void> {
    this.#options = { onWarning: this.#options.onWarning }; // Files of later calls are not part of the load.
    if (!this.#store || !this.#manifest) return;
    try {
      const older = await this.#store.manifest(this.where);
      if (!equal(older, this.#manifest)) {
        await this.#store.keepManifest(this.where, this.#manifest);
        await this.#removeFilesOf(older);
      }
      await this.#store.endLoad(this.where);
    } catch (error) {
      this.#storeFailed(error);
    }
  }

  /** Delete the files of a bundle.json that no other one names: bundles share equal files. */
  async #removeFilesOf(older: Uint8Array | null): Promise<void> {
    if (!older || !this.#store) return;
    const needed = new Set((await this.#store.manifests()).flatMap(hashesOf));
    for (const sha256 of new Set(hashesOf(older))) {
      if (!needed.has(sha256)) await this.#store.remove(sha256);
    }
  }

  /** Copy what the browser has of a file. Returns the number of bytes from its beginning. */
  async #readKept(name: string, info: FileInfo, data: Bytes): Promise<number> {
    try {
      return (await this.#reader?.read(info, data)) ?? 0;
    } catch {
      if (this.#store) await this.#removeDamaged(name, info);
      return 0;
    }
  }

  async #removeDamaged(name: string, info: FileInfo): Promise<void> {
    this.#warn(`${name}: the copy that this browser kept is damaged; it is downloaded again`);
    await this.#remove(info);
  }

  async #remove({ sha256 }: FileInfo): Promise<void> {
    try {
      await this.#store?.remove(sha256);
    } catch (error) {
      this.#storeFailed(error);
    }
  }

  #done(name: string, info: FileInfo, data: Bytes): Bytes {
    if (this.#held && !this.#store) {
      if (this.#held.size === 0) this.#warn('memory: "low" keeps files in memory here, because no storage keeps them');
      this.#held.set(info.sha256, data);
    }
    this.#loaded += info.size;
    this.#report(name, 0);
    return data;
  }

  #report(file: string, here: number): void {
    this.#options.onProgress?.({
      file,
      loaded: this.#loaded + here,
      total: Math.max(this.#total, this.#loaded + here),
    });
  }

  /**
   * Fetch a file from byte `at` on into `data`. A broken connection is tried again from where it broke.
   *
   * @returns the number of pieces that the file is made of, the kept beginning included.
   */
  async #download(name: string, info: FileInfo, data: Bytes, at: number): Promise<number> {
    const url = this.#url(name);
    let fruitless = 0;
    let furthest = at;
    let pieces = at > 0 ? 1 : 0;
    while (at < info.size) {
      pieces++;
      try {
        at = await this.#receive(name, url, info, data, at);
      } catch (error) {
        if (!(error instanceof Broken)) throw error;
        fruitless = error.at > furthest ? 1 : fruitless + 1;
        furthest = Math.max(furthest, error.at);
        at = error.at;
        if (fruitless >= TRIES) {
          const kept = this.#store ? "; what has arrived is kept, so load it again later" : "";
          throw new BundleError(`${url}: cannot be fetched: ${error.problem}${kept}`, { cause: error.cause });
        }
        await this.#pause(PAUSE * 2 ** (fruitless - 1));
      }
    }
    return pieces;
  }

  /** Receive one answer of the server. Returns where it ended. Throws Broken, BundleError, Cancelled. */
  async #receive(name: string, url: string, info: FileInfo, data: Bytes, from: number): Promise<number> {
    let response: Response;
    try {
      response = await this.#fetch(url, from > 0 ? { Range: `bytes=${from}-` } : {});
    } catch (error) {
      if (error instanceof Offline) throw new Broken(from, error.problem, error);
      throw error;
    }
    if (response.status >= 500) throw new Broken(from, `the server answered ${response.status}`, undefined);
    if (response.status === 416 && from > 0) return this.#receive(name, url, info, data, 0);
    if (!response.ok || !response.body) throw new BundleError(`${url}: the server answered ${response.status}`);
    const range = response.headers.get("Content-Range");
    const goesOn = response.status === 206 && (range === null || range.startsWith(`bytes ${from}-`));
    let at = goesOn ? from : 0;
    let kept = at; // bytes that the store has
    const keep = async (): Promise<void> => {
      const start = kept;
      kept = at;
      if (at > start) await this.#keep(info, start, data.slice(start, at));
    };
    const reader = response.body.getReader();
    try {
      for (;;) {
        let part;
        try {
          part = await reader.read();
        } catch (error) {
          this.#stopIfAborted(error);
          throw new Broken(at, reasonOf(error), error);
        }
        if (part.done) break;
        if (at + part.value.length > info.size) {
          throw new BundleError(`${url}: expected ${info.size} bytes, and the server sends more. ${REMEDY}`);
        }
        data.set(part.value, at);
        at += part.value.length;
        if (at - kept >= CHUNK || at === info.size) await keep();
        this.#report(name, at);
      }
    } finally {
      await keep(); // The next piece begins at `at`, so nothing before it may be missing.
      await reader.cancel().catch(() => undefined); // It does nothing after the end, and fails if the answer broke.
    }
    if (at < info.size) throw new Broken(at, `the connection ended after ${at} of ${info.size} bytes`, undefined);
    return at;
  }

  async #keep(info: FileInfo, at: number, data: Bytes): Promise<void> {
    const store = this.#store;
    if (!store) return;
    try {
      await store.write(info, at, data);
    } catch (error) {
      this.#storeFailed(error);
      // Parts of a file that does not fit would only take room.
      await store.remove(info.sha256).catch(() => undefined);
    }
  }

  #storeFailed(error: unknown): void {
    this.#store = null;
    const full = error instanceof Error && error.name === "QuotaExceededError";
    const problem = full ? "this browser's storage is full" : `this browser's storage fails: ${firstLine(error)}`;
    this.#warn(`${problem}. The model works, but it is downloaded again next time`);
  }

  /**
   * Fetch a URL. The browser's own cache asks the server first: it may have a file of an older version by this name.
   *
   * Throws Offline if there is no answer, Cancelled.
   */
  async #fetch(url: string, headers: Record<string, string> = {}): Promise<Response> {
    const { signal } = this.#options;
    return this.#body(url, () => fetch(url, { cache: "no-cache", headers, ...(signal ? { signal } : {}) }));
  }

  async #body<T>(url: string, fetching: () => Promise<T>): Promise<T> {
    try {
      return await fetching();
    } catch (error) {
      this.#stopIfAborted(error);
      throw new Offline(url, reasonOf(error), error);
    }
  }

  #stopIfAborted(error: unknown): void {
    if (this.#options.signal?.aborted) throw this.#cancelled(error);
  }

  #cancelled(cause: unknown): Cancelled {
    return new Cancelled("cancelled while files were fetched", { cause });
  }

  #pause(milliseconds: number): Promise<void> {
    const { signal } = this.#options;
    return new Promise((resolve, reject) => {
      const stop = (): void => {
        clearTimeout(timer);
        reject(this.#cancelled(signal?.reason));
      };
      const timer = setTimeout(() => {
        signal?.removeEventListener("abort", stop);
        resolve();
      }, milliseconds);
      signal?.addEventListener("abort", stop, { once: true });
    });
  }

  #url(name: string): string {
    return `${this.where}/${name.split("/").map(encodeURIComponent).join("/")}`;
  }

  #warn(message: string): void {
    this.#options.onWarning?.(message);
  }
}

/** Say why fetch failed. In Node, the error itself says only that it did. */
function reasonOf(error: unknown): string {
  const { message, code } = ((error as Error).cause ?? {}) as { message?: string; code?: string };
  return firstLine(message || code || error);
}

function equal(a: Uint8Array | null, b: Uint8Array): boolean {
  return a?.length === b.length && a.every((byte, i) => byte === b[i]);
}

/** Return the sha256 of each file of a bundle.json, or nothing if it is damaged. */
function hashesOf(manifest: Uint8Array): string[] {
  try {
    const { files } = JSON.parse(new TextDecoder().decode(manifest)) as Manifest;
    return Object.values(files).map(({ sha256 }) => sha256);
  } catch {
    return [];
  }
}

/** There is no answer. */
class Offline extends BundleError {
  constructor(
    url: string,
    readonly problem: string,
    cause: unknown,
  ) {
    super(`${url}: cannot be fetched: ${problem}`, { cause });
  }
}

/** An answer ended early, after byte `at`. */
class Broken extends Error {
  constructor(
    readonly at: number,
    readonly problem: string,
    override readonly cause: unknown,
  ) {
    super(problem);
  }
}
