/** Pipelines whose graphs are in a worker: what becomes of calls if the worker ends, and of signals. */
import assert from "node:assert/strict";
import { getEventListeners } from "node:events";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { MANIFEST, readManifest } from "../src/bundle/manifest.js";
import type { LoadOptions } from "../src/index.js";
import { Cancelled, DeviceError, InferenceError, Pipeline } from "../src/index.js";
import type { FromWorker, ToWorker } from "../src/worker/messages.js";
import { RemoteEngine } from "../src/worker/remote.js";
import { TINY } from "./shared.js";

vi.mock("#platform", () => ({
  openEngine: (url: string, options: LoadOptions) => RemoteEngine.load(url, options),
}));

const INFO = {
  where: "",
  manifest: readManifest(readFileSync(join(TINY, MANIFEST))),
  bundleSha256: "",
  device: "wasm",
  variant: "portable",
  vae: "kl",
  provider: "CPUExecutionProvider",
  versions: {},
  threads: 1,
} as const;

/** Stands in for a browser's worker: it loads at once, and then says what a test lets it say. */
class FakeWorker {
  heard: ToWorker[] = [];
  terminated = false;
  onmessage: ((event: { data: FromWorker }) => void) | null = null;
  onerror: ((event: { message?: string; preventDefault: () => void }) => void) | null = null;
  onmessageerror: (() => void) | null = null;

  constructor() {
    worker = this;
  }

  postMessage(message: ToWorker): void {
    this.heard.push(message);
    if (message.type === "load" && loads) queueMicrotask(() => this.say({ type: "loaded", info: INFO }));
  }

  say(data: FromWorker): void {
    this.onmessage?.({ data });
  }

  terminate(): void {
    this.terminated = true;
  }
}

let worker: FakeWorker;
let loads: boolean;
beforeEach(() => {
  loads = true;
  vi.stubGlobal("Worker", FakeWorker);
});
afterEach(() => vi.unstubAllGlobals());

const QUIET: LoadOptions = { onWarning: () => undefined };
const sampled = (id: number): FromWorker => ({
  type: "sampled",
  id,
  sampled: {
    pixels: [new Uint8ClampedArray(12 * 8 * 4)],
    latents: new Float32Array(),
    mode: "parallel",
    timings: {},
  },
});

for (const [end, problem] of [
  [
    () => worker.onerror?.({ message: "Uncaught RangeError: mine", preventDefault: vi.fn() }),
    "Uncaught RangeError: mine",
  ],
  [() => worker.onerror?.({ preventDefault: vi.fn() }), "an error without a message"],
  [() => worker.onmessageerror?.(), "a message could not be read"],
] as const) {
  test(`a worker that ends with '${problem}' fails all calls, and its memory is given back`, async () => {
    const pipe = await Pipeline.load("/tiny", QUIET);
    const calls = [pipe("a red heart"), pipe("a red heart")];
    end();
    for (const call of [...calls, pipe("a red heart")]) {
      await assert.rejects(call, (error) => {
        assert.ok(error instanceof InferenceError);
        return error.message === `the worker ended: ${problem}. Load the bundle again`;
      });
    }
    assert.ok(worker.terminated);
    await pipe.dispose();
  });
}

test("a message that cannot be read ends the load", async () => {
  loads = false;
  const loading = Pipeline.load("/tiny", QUIET);
  worker.onmessageerror?.();
  await assert.rejects(loading, DeviceError);
  assert.ok(worker.terminated);
});

test("a signal keeps no listeners of calls and loads that ended, and ends its own call only", async () => {
  const { signal } = new AbortController();
  const pipe = await Pipeline.load("/tiny", { ...QUIET, signal });
  const own = new AbortController();
  const [first, second] = [pipe("a red heart", { signal }), pipe("a red heart", { signal: own.signal })];
  own.abort(new Error("enough"));
  await assert.rejects(second, (error) => error instanceof Cancelled && (error.cause as Error).message === "enough");
  worker.say({ type: "stopped", id: 1, error: { kind: "Cancelled", message: "", stack: undefined } });
  worker.say(sampled(0));
  assert.equal((await first).images.length, 1);
  assert.deepEqual(
    worker.heard.filter(({ type }) => type === "abort"),
    [{ type: "abort", id: 1 }],
  );
  assert.equal(getEventListeners(signal, "abort").length, 0);
});

test("the worker keeps no listener on the signal of a call that ended", async () => {
  const engine = await RemoteEngine.load("/tiny", QUIET);
  const { signal } = new AbortController();
  const listener = { onReport: vi.fn(), onWarning: vi.fn() };
  const call = engine.sample({} as Parameters<typeof engine.sample>[0], listener, signal);
  assert.equal(getEventListeners(signal, "abort").length, 1);
  worker.say(sampled(0));
  await call;
  await vi.waitFor(() => assert.equal(getEventListeners(signal, "abort").length, 0));
});

test("a signal that is aborted by the first warning of a call cancels it", async () => {
  const controller = new AbortController();
  const pipe = await Pipeline.load("/tiny", { onWarning: () => controller.abort() });
  await assert.rejects(pipe("zebras", { signal: controller.signal }), Cancelled);
  assert.deepEqual(
    worker.heard.map(({ type }) => type),
    ["load", "sample", "abort"],
  );
});

test("an error of onWarning ends the request and reaches the caller", async () => {
  const pipe = await Pipeline.load("/tiny", {
    onWarning: () => {
      throw new RangeError("mine");
    },
  });
  const call = pipe("a red heart");
  expect(() => worker.say({ type: "warning", id: 0, message: "cut off" })).not.toThrow();
  assert.deepEqual(worker.heard.at(-1), { type: "abort", id: 0 });
  worker.say({ type: "stopped", id: 0, error: { kind: "Cancelled", message: "", stack: undefined } });
  await assert.rejects(call, RangeError);
});
