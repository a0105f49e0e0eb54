/** Downloads and kept copies that fail in unusual ways, and URLs that are none. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { getEventListeners } from "node:events";
import { readFile } from "node:fs/promises";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { afterEach, beforeEach, test, vi } from "vitest";
import {
  MANIFEST,
  readManifest,
  TEXT_ENCODER,
  TOKENIZER,
  UNET_DECODER,
  UNET_ENCODER,
  VAE_DECODER,
} from "../src/bundle/manifest.js";
import { Store } from "../src/bundle/store.js";
import { directoryUrl } from "../src/bundle/url.js";
import { WebSource } from "../src/bundle/web_source.js";
import { BundleError, Cancelled, Pipeline, RequestError, type Memory } from "../src/index.js";
import { TINY, UPSCALED } from "./shared.js";

type Answer = (request: IncomingMessage, response: ServerResponse) => void;

let server: Server;
let url: string;
let answer: Answer;
let asked: string[]; // paths
const files: Answer = (request, response) =>
  void readFile(join(TINY, request.url ?? "")).then((data) => response.end(data));

beforeEach(async () => {
  answer = files;
  asked = [];
  server = createServer((request, response) => {
    asked.push(request.url ?? "");
    answer(request, response);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/`;
});
afterEach(() => {
  vi.unstubAllGlobals();
  server.closeAllConnections();
  server.close();
});

/** A browser's storage in which some operations fail. */
function failing(...operations: (keyof Store)[]): Store {
  const store = {
    read: () => Promise.resolve(0),
    write: () => Promise.resolve(),
    remove: () => Promise.resolve(),
    manifest: () => Promise.resolve(null),
    manifests: () => Promise.resolve([]),
    keepManifest: () => Promise.resolve(),
    endLoad: () => Promise.resolve(),
  };
  const broken = () => Promise.reject(new DOMException("the disk is broken", "UnknownError"));
  return Object.assign(store, Object.fromEntries(operations.map((name) => [name, broken]))) as unknown as Store;
}

async function fetched(store: Store | null): Promise<{ bytes: number; warnings: string[] }> {
  const warnings: string[] = [];
  const source = new WebSource(url, { onWarning: (message) => warnings.push(message) }, store);
  const manifest = readManifest(await source.manifest());
  const info = manifest.files[TOKENIZER];
  assert.ok(info);
  const { length } = await source.read(TOKENIZER, info);
  assert.equal(length, info.size);
  await source.complete();
  return { bytes: length, warnings };
}

const FAILING: [(keyof Store)[], RegExp[]][] = [
  [["read"], [/^tokenizer\.json: the copy that this browser kept is damaged; it is downloaded again$/]],
  [["write"], [/^this browser's storage fails: the disk is broken\. The model works/]],
  [
    ["read", "remove"],
    [/is damaged; it is downloaded again$/, /^this browser's storage fails/],
  ],
  [["manifest"], [/^this browser's storage fails/]],
  [["keepManifest"], [/^this browser's storage fails/]],
];

for (const [operations, expected] of FAILING) {
  test(`a storage whose ${operations.join(" and ")} fails costs a warning, and the file arrives`, async () => {
    const { warnings } = await fetched(failing(...operations));
    assert.equal(warnings.length, expected.length, warnings.join("; "));
    expected.forEach((pattern, i) => assert.match(warnings[i] ?? "", pattern));
  });
}

test("a kept bundle.json that is damaged is replaced", async () => {
  const store = Object.assign(failing(), { manifest: () => Promise.resolve(new TextEncoder().encode("{")) });
  assert.deepEqual((await fetched(store)).warnings, []);
});

test("without an answer and with a storage that fails, the missing answer is reported", async () => {
  answer = (_, response) => response.destroy();
  await assert.rejects(new WebSource(url, {}, failing("manifest")).manifest(), /^BundleError: .*: cannot be fetched: /);
});

for (const status of [301, 403, 404, 416, 429]) {
  test(`status ${status} for a file is an error that names the file`, async () => {
    answer = (request, response) => {
      if (request.url === "/bundle.json") return files(request, response);
      response.writeHead(status).end();
    };
    await assert.rejects(fetched(null), (error) => {
      assert.ok(error instanceof BundleError);
      return /tokenizer\.json: .*(the server answered \d+|cannot be fetched)/.test(error.message);
    });
  });
}

test("a page in place of bundle.json is named", async () => {
  answer = (_, response) => response.end("<!doctype html>");
  const source = new WebSource(url, {}, null);
  const data = await source.manifest();
  assert.throws(() => readManifest(data), /^BundleError: expected JSON, but /);
});

/** Cache Storage, which Node lacks, with room for so many entries. */
function cacheStorage(room = Infinity): { kept: Map<string, Uint8Array>; caches: unknown } {
  const kept = new Map<string, Uint8Array>();
  const cache = {
    match: (key: string | { url: string }) => {
      const data = kept.get(typeof key === "string" ? key : key.url);
      return Promise.resolve(data && new Response(new Uint8Array(data)));
    },
    put: async (key: string, response: Response) => {
      if (kept.size >= room) throw new DOMException("no room", "QuotaExceededError");
      kept.set(key, new Uint8Array(await response.arrayBuffer()));
    },
    keys: () => Promise.resolve([...kept.keys()].map((url) => ({ url }))),
    delete: (key: string | { url: string }) => Promise.resolve(kept.delete(typeof key === "string" ? key : key.url)),
  };
  return { kept, caches: { open: () => Promise.resolve(cache) } };
}

const gone: Answer = (_, response) => response.destroy();

/** Return the files of the tiny bundle, some of them with other contents, and a bundle.json that fits. */
async function changed(contents: Record<string, string>): Promise<Map<string, Buffer>> {
  const manifest = JSON.parse(await readFile(join(TINY, MANIFEST), "utf8"));
  const found = new Map<string, Buffer>();
  for (const name of Object.keys(manifest.files)) {
    const data = contents[name] === undefined ? await readFile(join(TINY, name)) : Buffer.from(contents[name]);
    found.set(name, data);
    manifest.files[name] = { sha256: createHash("sha256").update(data).digest("hex"), size: data.length };
  }
  return found.set(MANIFEST, Buffer.from(JSON.stringify(manifest)));
}

/** Fetch some files of a bundle, as loading would. */
async function fetchFrom(folder: string, names = ["README.md", TOKENIZER]): Promise<string[]> {
  const source = new WebSource(`${url}${folder}`, {}, await Store.open());
  const manifest = readManifest(await source.manifest());
  await source.check();
  const read: string[] = [];
  for (const name of names) {
    const info = manifest.files[name];
    assert.ok(info);
    read.push(Buffer.from(await source.read(name, info)).toString());
  }
  await source.complete();
  return read;
}

test("an update of one bundle keeps the files that another bundle shares", async () => {
  const { kept, caches } = cacheStorage();
  vi.stubGlobal("caches", caches);
  const tokenizer = await readFile(join(TINY, TOKENIZER), "utf8");
  const folders = { a: await changed({ "README.md": "old" }), b: await changed({ "README.md": "other" }) };
  answer = (request, response) => {
    const [, folder, name] = (request.url ?? "").split("/");
    response.end(folders[folder as "a" | "b"].get(name ?? ""));
  };
  await fetchFrom("a");
  await fetchFrom("b");
  assert.deepEqual(
    asked.filter((path) => path.endsWith(TOKENIZER)),
    [`/a/${TOKENIZER}`],
  );
  folders.a = await changed({ "README.md": "new", [TOKENIZER]: `${tokenizer}\n` });
  assert.deepEqual(await fetchFrom("a"), ["new", `${tokenizer}\n`]);
  assert.equal(kept.size, 6, "two of bundle.json, two of README.md, two of tokenizer.json");
  answer = gone;
  assert.deepEqual(await fetchFrom("b"), ["other", tokenizer]);
  assert.deepEqual(await fetchFrom("a"), ["new", `${tokenizer}\n`]);
});

test("files that an interrupted load of an older version has left are deleted", async () => {
  const { kept, caches } = cacheStorage();
  vi.stubGlobal("caches", caches);
  let files = await changed({ "README.md": "first" });
  answer = (request, response) => {
    const data = files.get(request.url?.split("/").at(-1) ?? "");
    if (data) response.end(data);
    else response.writeHead(404).end();
  };
  await fetchFrom("a");
  files = await changed({ "README.md": "second", [TOKENIZER]: "{}" });
  files.delete(TOKENIZER);
  await assert.rejects(fetchFrom("a"), BundleError);
  assert.equal(kept.size, 5, "bundle.json of both versions, README.md of both, tokenizer.json of the first");
  files = await changed({ "README.md": "third" });
  await fetchFrom("a");
  assert.equal(kept.size, 3, "bundle.json, README.md and tokenizer.json of the third version");
});

/** Stand in for the network: each request gets the next answer. Returns the requests. */
function answering(...answers: (() => Response | Promise<Response>)[]): RequestInit[] {
  const requests: RequestInit[] = [];
  vi.stubGlobal("fetch", (_: string, init: RequestInit) => {
    requests.push(init);
    const next = answers[requests.length - 1];
    return next ? next() : Promise.reject(new TypeError("gone"));
  });
  return requests;
}

/** Answer with data, and then break. */
function broken(data: Uint8Array, status = 200): () => Response {
  const parts = [new Uint8Array(data)];
  return () => {
    const pull = (controller: ReadableStreamDefaultController): void => {
      const part = parts.shift();
      if (part) controller.enqueue(part);
      else controller.error(new TypeError("broken"));
    };
    return new Response(new ReadableStream({ pull }, { highWaterMark: 0 }), { status });
  };
}

const FILE = Uint8Array.from({ length: 1000 }, (_, i) => i % 251);
const ABOUT = { size: FILE.length, sha256: createHash("sha256").update(FILE).digest("hex") };

test("what came before a break is kept, and the signal keeps no listener", async () => {
  const { caches } = cacheStorage();
  vi.stubGlobal("caches", caches);
  const requests = answering(broken(FILE.subarray(0, 300)), () => new Response(FILE.subarray(300), { status: 206 }));
  const { signal } = new AbortController();
  const source = new WebSource(url, { signal }, await Store.open());
  assert.deepEqual(await source.read("file", ABOUT), FILE);
  assert.equal(new Headers(requests[1]?.headers).get("Range"), "bytes=300-");
  assert.ok(requests.every(({ cache }) => cache === "no-cache"));
  assert.equal(getEventListeners(signal, "abort").length, 0);
  assert.deepEqual(await source.read("file", ABOUT), FILE);
  assert.equal(requests.length, 2, "the second read asks nobody");
});

test("an error of onProgress ends the download", async () => {
  let cancelled = false;
  const pull = (controller: ReadableStreamDefaultController): void => controller.enqueue(FILE.slice(0, 1));
  const cancel = (): void => void (cancelled = true);
  answering(() => new Response(new ReadableStream({ pull, cancel })));
  const onProgress = (): void => {
    throw new RangeError("mine");
  };
  await assert.rejects(new WebSource(url, { onProgress }, null).read("file", ABOUT), RangeError);
  assert.ok(cancelled);
});

test("answers without ranges that never bring a new byte end in an error", async () => {
  vi.stubGlobal("setTimeout", (act: () => void) => setImmediate(act));
  const pieces = [500, 200, 400, 200, 400].map((size) => broken(FILE.subarray(0, size)));
  const requests = answering(...pieces);
  await assert.rejects(new WebSource(url, {}, null).read("file", ABOUT), /file: cannot be fetched: broken$/);
  assert.equal(requests.length, 3);
});

test("a signal cancels the pause after a break with its reason", async () => {
  answering();
  const controller = new AbortController();
  const reading = new WebSource(url, { signal: controller.signal }, null).read("file", ABOUT);
  await vi.waitFor(() => assert.equal(getEventListeners(controller.signal, "abort").length, 1));
  controller.abort("enough");
  await assert.rejects(reading, (error) => error instanceof Cancelled && error.cause === "enough");
});

test("a kept bundle.json stands in for one whose answer breaks", async () => {
  const { caches } = cacheStorage();
  vi.stubGlobal("caches", caches);
  const store = await Store.open();
  const source = new WebSource(url, {}, store);
  await store?.keepManifest(source.where, new Uint8Array(FILE));
  answering(broken(FILE.subarray(0, 300)));
  assert.deepEqual(await source.manifest(), FILE);
});

for (const memory of ["auto", "low"] as Memory[]) {
  test(`a safety checker and an upscaler are not downloaded, memory ${memory}`, async () => {
    answer = (request, response) => void readFile(join(UPSCALED, request.url ?? "")).then((data) => response.end(data));
    const pipe = await Pipeline.load(url, { memory, onWarning: () => undefined });
    await pipe("a red heart");
    const graphs = [TEXT_ENCODER, UNET_ENCODER, UNET_DECODER, VAE_DECODER].map((graph) => `${graph}.onnx`);
    assert.deepEqual(asked.sort(), [MANIFEST, TOKENIZER, ...graphs].map((name) => `/${name}`).sort());
  });
}

test("low memory without a storage fetches each file once, and draws without a network", async () => {
  const local = await Pipeline.load(TINY);
  const expected = await local("a red heart", { seed: 1, memory: "sequential" });
  const warnings: string[] = [];
  const pipe = await Pipeline.load(url, { memory: "low", onWarning: (message) => warnings.push(message) });
  answer = gone;
  for (let i = 0; i < 2; i++) {
    assert.deepEqual((await pipe("a red heart", { seed: 1 })).latents, expected.latents);
  }
  await pipe("a red heart", { memory: "parallel" });
  assert.equal(new Set(asked).size, asked.length, asked.join(", "));
  assert.deepEqual(warnings, ['memory: "low" keeps files in memory here, because no storage keeps them']);
});

test("after a load, its signal and its onProgress do not concern the files of calls", async () => {
  const loading = new AbortController();
  const loaded: number[] = [];
  const onProgress = ({ loaded: bytes }: { loaded: number }): unknown => loaded.push(bytes);
  const source = new WebSource(url, { signal: loading.signal, onProgress }, null);
  const manifest = readManifest(await source.manifest());
  const info = manifest.files[TOKENIZER];
  assert.ok(info);
  await source.read(TOKENIZER, info);
  await source.complete();
  const before = loaded.length;
  loading.abort();
  await source.read(TOKENIZER, info);
  assert.ok(before > 0);
  assert.equal(loaded.length, before);
});

test("a call with low memory keeps graphs whose files only the network has, with a warning", async () => {
  const local = await Pipeline.load(TINY);
  const expected = await local("a red heart", { seed: 1, memory: "sequential" });
  const pipe = await Pipeline.load(url, { onWarning: () => undefined });
  const before = asked.length;
  answer = gone;
  const made = await pipe("a red heart", { seed: 1, memory: "low" });
  assert.deepEqual(made.latents, expected.latents);
  assert.equal(made.memory, "sequential");
  assert.match(made.warnings.join(), /^memory: "low" frees no graph here, .*: load with memory: "low"$/);
  assert.deepEqual((await pipe("a red heart", { seed: 1 })).warnings, []);
  assert.equal(asked.length, before);
});

test("files that a full storage does not take are read again without a network, and so are those it took", async () => {
  const { kept, caches } = cacheStorage(1);
  vi.stubGlobal("caches", caches);
  const warnings: string[] = [];
  const source = new WebSource(url, { onWarning: (message) => warnings.push(message) }, await Store.open());
  const { files } = readManifest(await source.manifest());
  source.hold();
  const read = async (): Promise<Uint8Array[]> => {
    const found: Uint8Array[] = [];
    for (const name of [TOKENIZER, `${UNET_ENCODER}.onnx`, `${VAE_DECODER}.onnx`]) {
      const info = files[name];
      assert.ok(info);
      found.push(await source.read(name, info));
    }
    return found;
  };
  const first = await read();
  assert.equal(kept.size, 1);
  answer = gone;
  assert.deepEqual(await read(), first);
  assert.ok(source.canReread);
  assert.deepEqual(warnings, [
    "this browser's storage is full. The model works, but it is downloaded again next time",
    'memory: "low" keeps files in memory here, because no storage keeps them',
  ]);
});

test("URLs of directories are made absolute", () => {
  assert.equal(directoryUrl("bundle", "https://example.org/page/index.html"), "https://example.org/page/bundle");
  assert.equal(directoryUrl("https://example.org/heart/?#"), "https://example.org/heart/");
});

for (const [given, message] of [
  ["https://[", /got 'https:\/\/\['$/],
  ["bundle", /got 'bundle'$/],
  ["https://anna:secret@example.org/", /got one with a user name or a password, which fetch refuses$/],
  ["https://anna:secret@[", /got 'https:\/\/\.\.\.@\['$/],
  ["https://example.org/?token=1", /got one with a query \(\?\): 'https:\/\/example\.org\/\?token=1'$/],
  ["https://example.org/#part", /got one with a fragment \(#\)/],
] as const) {
  test(`refuses ${given} as the URL of a bundle`, () => {
    assert.throws(
      () => directoryUrl(given),
      (error) => {
        assert.ok(error instanceof RequestError);
        assert.match(error.message, /^bundle: expected the URL of a bundle's directory, /);
        assert.match(error.message, message);
        return !error.message.includes("secret");
      },
    );
  });
}
