/** The package in a page of Chromium: equal pictures, and everything that can go wrong with a download. */
import assert from "node:assert/strict";
import { after, before, beforeEach, test } from "node:test";
import type { Browser, BrowserContext, Page } from "playwright-core";
import type * as Inside from "./inside.js";
import { decibels, floats, largestDifference, vectors } from "../shared.js";
import { startBrowser, startServer } from "./browser.js";
import type { TestServer, Trouble } from "./server.js";

let server: TestServer;
let browser: Browser;
let context: BrowserContext;

before(async () => {
  server = await startServer();
  browser = await startBrowser();
});
after(async () => {
  await browser.close();
  await server.stop();
});
beforeEach(async () => {
  server.reset();
  await context?.close();
  context = await browser.newContext();
});

async function open(origin = server.origin): Promise<Page> {
  const page = await context.newPage();
  await page.goto(origin);
  return page;
}

interface Drawn {
  error: { name: string; message: string } | null;
  warnings: string[];
  latents: number[];
  rgba: number[][];
  threads: number | undefined;
  device: string;
  progress: [number, number][];
}

interface Asked {
  bundle: string;
  prompts: string | string[];
  load?: Inside.LoadOptions;
  options?: { seed?: string; numImages?: number; steps?: number; height?: number; width?: number; memory?: "low" };
}

/** Load a bundle in a page and draw. */
function draw(page: Page, asked: Asked): Promise<Drawn> {
  return page.evaluate(async ({ bundle, prompts, load, options }) => {
    const path = "/inside/inside.js";
    const { Pipeline } = (await import(path)) as typeof Inside;
    const drawn: Drawn = {
      error: null,
      warnings: [],
      latents: [],
      rgba: [],
      threads: undefined,
      device: "",
      progress: [],
    };
    try {
      const pipe = await Pipeline.load(bundle, {
        device: "wasm",
        wasmPaths: new URL("/ort/", location.href).href,
        workerUrl: "/static/worker.js",
        onWarning: (message) => drawn.warnings.push(message),
        onProgress: ({ loaded, total }) => drawn.progress.push([loaded, total]),
        ...load,
      });
      drawn.threads = pipe.threads;
      drawn.device = pipe.device;
      const { seed = "1", ...others } = options ?? {};
      const result = await pipe(prompts, { ...others, seed: BigInt(seed) });
      drawn.latents = Array.from(result.latents);
      drawn.rgba = result.images.map(({ data }) => Array.from(data));
      await pipe.dispose();
    } catch (error) {
      const { name, message } = error as Error;
      drawn.error = { name, message };
    }
    return drawn;
  }, asked);
}

async function succeeds(page: Page, asked: Asked): Promise<Drawn> {
  const drawn = await draw(page, asked);
  assert.deepEqual(drawn.error, null);
  assert.equal(drawn.rgba[0]?.length, asked.bundle === "/emoji" ? 128 * 128 * 4 : 8 * 12 * 4);
  return drawn;
}

const HEART = { bundle: "/tiny", prompts: "a red heart" };
const EMOJI = { bundle: "/emoji", prompts: "a red heart" };
const LARGE = "/emoji/text_encoder.onnx";

/** Send only a part of a file, so often. */
function cutOff(file: string, bytes: number, times: number): Trouble {
  let left = times;
  return (path, request, response) => {
    if (path !== file || left === 0 || request.headers.range) return false;
    left--;
    response.writeHead(200, { "Content-Length": bytes * 2 });
    response.write(Buffer.alloc(bytes), () => response.destroy());
    return true;
  };
}

test("noise and tokens are equal to Python's to the last bit", async () => {
  const noise = vectors<{ seed: string; count: number; sha256: string }>("noise.json");
  const tokens = vectors<{
    bundle: string;
    length: number;
    prompt: string;
    times: number;
    ids: number[];
    mask: number[];
  }>("tokens.json");
  const page = await open();
  const wrong = await page.evaluate(
    async ({ noise, tokens }) => {
      const path = "/inside/inside.js";
      const { gaussian, PromptTokenizer } = (await import(path)) as typeof Inside;
      const found: string[] = [];
      for (const one of noise) {
        const digest = await crypto.subtle.digest(
          "SHA-256",
          gaussian(BigInt(one.seed), one.count).buffer as ArrayBuffer,
        );
        const hex = Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
        if (hex !== one.sha256) found.push(one.seed);
      }
      for (const one of tokens) {
        const file = await fetch(one.bundle.endsWith("tiny") ? "/tiny/tokenizer.json" : "/emoji/tokenizer.json");
        const tokenizer = new PromptTokenizer(new Uint8Array(await file.arrayBuffer()), one.length);
        const made = tokenizer.encode([one.prompt.repeat(one.times)]);
        if (made.inputIds.join() !== one.ids.join() || made.attentionMask.join() !== one.mask.join())
          found.push(one.prompt);
      }
      return found;
    },
    { noise, tokens },
  );
  assert.deepEqual(wrong, []);
});

for (const isolated of [false, true]) {
  test(`golden pictures, ${isolated ? "isolated, two threads" : "one thread"}`, async () => {
    server.isolated = isolated;
    const page = await open();
    assert.equal(await page.evaluate(() => crossOriginIsolated), isolated);
    for (const one of vectors<{
      prompts: string[];
      options: { seed: string; num_images?: number; steps?: number; height?: number; width?: number };
      latents: number[];
      rgb: string[];
    }>("pictures.json")) {
      const { num_images, memory: _, ...others } = one.options as typeof one.options & { memory?: string };
      const options = { ...others, ...(num_images ? { numImages: num_images } : {}) };
      const drawn = await draw(page, {
        bundle: "/tiny",
        prompts: one.prompts,
        options,
        load: isolated ? { threads: 2 } : {},
      });
      assert.equal(drawn.error, null);
      assert.equal(drawn.threads, isolated ? 2 : 1);
      assert.ok(decibels(Float32Array.from(drawn.latents), floats(one.latents)) > 100);
      const rgb = drawn.rgba.map((data) => data.filter((_, i) => i % 4 !== 3));
      one.rgb.forEach((hex, i) => assert.ok(largestDifference(rgb[i] ?? [], Buffer.from(hex, "hex")) <= 1));
    }
  });
}

test("the page reports what it fetches, and the second load fetches bundle.json only", async () => {
  const page = await open();
  const { progress } = await succeeds(page, HEART);
  const [loaded, total] = progress.at(-1) ?? [];
  assert.equal(loaded, total);
  assert.ok(progress.every(([now], i) => now >= (progress[i - 1]?.[0] ?? 0)));
  server.log.length = 0;
  await succeeds(page, HEART);
  assert.deepEqual(
    server.log.filter((path) => path.startsWith("/tiny")),
    ["/tiny/bundle.json"],
  );
});

test("without a network, the kept bundle draws", async () => {
  const page = await open();
  await succeeds(page, HEART);
  server.trouble = (path, _, response) => path.startsWith("/tiny") && Boolean(response.destroy());
  await succeeds(page, HEART);
});

test("the storage lists every bundle.json that it keeps", async () => {
  const page = await open();
  await succeeds(page, HEART);
  const sizes = await page.evaluate(async () => {
    const path = "/inside/inside.js";
    const { Store } = (await import(path)) as typeof Inside;
    const store = await Store.open();
    await store?.keepManifest("https://example.org/it's here", new TextEncoder().encode("{}"));
    return (await store?.manifests())?.map((data) => data.length) ?? [];
  });
  assert.equal(sizes.length, 2);
  assert.ok(sizes.includes(2));
});

test("low memory fetches the files once, and draws the same", async () => {
  const page = await open();
  const expected = await succeeds(page, HEART);
  const low = await succeeds(page, { ...HEART, load: { memory: "low" } });
  assert.deepEqual(low.rgba, expected.rgba);
});

test("a connection that breaks goes on where it broke", async () => {
  const page = await open();
  server.trouble = (path, request, response) => {
    if (path !== LARGE || request.headers.range) return false;
    const half = 10 * 2 ** 20;
    void import("node:fs").then(({ readFileSync }) => {
      const data = readFileSync(`${server.folders["emoji"] ?? ""}/text_encoder.onnx`);
      response.writeHead(200, { "Content-Length": data.length });
      response.write(data.subarray(0, half), () => setTimeout(() => response.destroy(), 50));
    });
    return true;
  };
  await succeeds(page, EMOJI);
  const resumed = server.log.filter((path) => path.startsWith(`${LARGE} from`));
  assert.equal(resumed.length, 1);
  assert.ok(Number(resumed[0]?.split(" ").at(-1)) > 0);
});

test("a tab that is closed while it downloads leaves what it has, and the next tab goes on", async () => {
  const page = await open();
  // Send 9 MiB of the large file, then nothing more.
  server.trouble = (path, request, response) => {
    if (path !== LARGE || request.headers.range) return false;
    void import("node:fs").then(({ readFileSync }) => {
      const data = readFileSync(`${server.folders["emoji"] ?? ""}/text_encoder.onnx`);
      response.writeHead(200, { "Content-Length": data.length });
      response.write(data.subarray(0, 9 * 2 ** 20));
    });
    return true;
  };
  void draw(page, EMOJI).catch(() => undefined);
  await waitFor(async () => (await chunks(page)) >= 3);
  await page.close();
  const next = await open();
  server.log.length = 0;
  await succeeds(next, EMOJI);
  const [resumed] = server.log.filter((path) => path.startsWith(LARGE));
  assert.ok(Number(resumed?.split(" ").at(-1)) >= 8 * 2 ** 20, resumed);
});

/** Count the chunks of files that the browser keeps. */
function chunks(page: Page): Promise<number> {
  return page.evaluate(async () => {
    const keys = await (await caches.open("tiue-runtime-1")).keys();
    return keys.filter(({ url }) => /\/[0-9a-f]{64}\//.test(url)).length;
  });
}

async function waitFor(condition: () => Promise<boolean>): Promise<void> {
  for (let i = 0; i < 200; i++) {
    if (await condition()) return;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  assert.fail("nothing happened for 20 seconds");
}

test("an aborted load is cancelled at once, and the next one works", async () => {
  const page = await open();
  server.trouble = (path) => path === "/tiny/unet_decoder.onnx"; // never answers
  const error = await page.evaluate(async () => {
    const path = "/inside/inside.js";
    const { Pipeline } = (await import(path)) as typeof Inside;
    const wasmPaths = new URL("/ort/", location.href).href;
    const options = {
      device: "wasm",
      wasmPaths,
      workerUrl: "/static/worker.js",
      signal: AbortSignal.timeout(2000),
    } as const;
    return Pipeline.load("/tiny", options).then(
      () => "loaded",
      (error: Error) => `${error.name}: ${error.message}`,
    );
  });
  assert.match(error, /^Cancelled: cancelled while the bundle was loaded/);
  server.reset();
  await succeeds(page, HEART);
});

test("a server that never sends a whole file ends in a clear error", async () => {
  const page = await open();
  server.trouble = (path, _, response) => path === "/tiny/unet_decoder.onnx" && Boolean(response.destroy());
  const { error } = await draw(page, HEART);
  assert.equal(error?.name, "BundleError");
  assert.match(
    error?.message ?? "",
    /unet_decoder.onnx: cannot be fetched: .*; what has arrived is kept, so load it again later/,
  );
});

test("a damaged copy in the cache is downloaded again, with a warning", async () => {
  const page = await open();
  await succeeds(page, HEART);
  await page.evaluate(async () => {
    const cache = await caches.open("tiue-runtime-1");
    for (const key of await cache.keys()) {
      if (!/[0-9a-f]{64}/.test(key.url)) continue;
      const data = new Uint8Array(await ((await cache.match(key)) as Response).arrayBuffer());
      data[0] = (data[0] ?? 0) ^ 1;
      await cache.put(key, new Response(data));
    }
  });
  const { warnings } = await succeeds(page, HEART);
  assert.match(warnings[0] ?? "", /the copy that this browser kept is damaged; it is downloaded again/);
  assert.deepEqual((await succeeds(page, HEART)).warnings, []);
});

test("a file of the server with another content is refused", async () => {
  const page = await open();
  server.trouble = (path, _, response) => {
    if (path !== "/tiny/unet_decoder.onnx") return false;
    response.writeHead(200).end(Buffer.alloc(557));
    return true;
  };
  const { error } = await draw(page, HEART);
  assert.equal(error?.name, "BundleError");
  assert.match(
    error?.message ?? "",
    /\/tiny: content differs from bundle.json: unet_decoder.onnx\. Export the bundle again/,
  );
});

test("a damaged beginning of a file is not kept forever", async () => {
  const page = await open();
  server.trouble = cutOff(LARGE, 9 * 2 ** 20, 1); // zeros, then the connection breaks
  await succeeds(page, EMOJI);
});

test("a full storage gives a warning, and the model draws", async () => {
  const page = await open();
  const session = await context.newCDPSession(page);
  await session.send("Storage.overrideQuotaForOrigin", { origin: server.origin, quotaSize: 100_000 });
  const { warnings } = await succeeds(page, EMOJI);
  assert.deepEqual(warnings, ["this browser's storage is full. The model works, but it is downloaded again next time"]);
});

test("without SharedArrayBuffer, one thread is used, and more are refused", async () => {
  const page = await open();
  assert.equal((await succeeds(page, HEART)).threads, 1);
  const { error } = await draw(page, { ...HEART, load: { threads: 2 } });
  assert.equal(error?.name, "DeviceError");
  assert.match(
    error?.message ?? "",
    /^threads: 2 threads need SharedArrayBuffer.*Cross-Origin-Opener-Policy: same-origin/,
  );
});

test("an insecure page gets a clear error", async () => {
  const page = await open(`http://insecure.test:${server.port}`);
  assert.equal(await page.evaluate(() => isSecureContext), false);
  const { error } = await draw(page, HEART);
  assert.equal(error?.name, "DeviceError");
  assert.match(error?.message ?? "", /^this page is not a secure context, .*serve it over https, or from localhost$/);
});

test("a bundle of a newer format is refused", async () => {
  const page = await open();
  server.trouble = (path, _, response) => {
    if (path !== "/tiny/bundle.json") return false;
    response.writeHead(200).end('{"format": 2}');
    return true;
  };
  const { error } = await draw(page, HEART);
  assert.match(
    error?.message ?? "",
    /bundle.json: format: this tiue-runtime reads 1, got 2: written by a newer tiue; install/,
  );
});

test("a URL without a bundle is refused", async () => {
  const { error } = await draw(await open(), { ...HEART, bundle: "/nothing" });
  assert.match(error?.message ?? "", /\/nothing is not a bundle: expected a file bundle.json in it, found none\.$/);
});

test("a worker that cannot be found gives a clear error", async () => {
  const { error } = await draw(await open(), { ...HEART, load: { workerUrl: "/static/nothing.js" } });
  assert.equal(error?.name, "DeviceError");
  assert.match(error?.message ?? "", /^the worker cannot be started: /);
});

test("missing files of ONNX Runtime give a clear error", async () => {
  const { error } = await draw(await open(), { ...HEART, load: { wasmPaths: "/nothing/" } });
  assert.equal(error?.name, "DeviceError");
  assert.match(error?.message ?? "", /^device: wasm does not work here: /);
});

test("WebGPU is refused where there is none, and auto takes wasm", async () => {
  const page = await open();
  await page.evaluate(() => undefined);
  const { error } = await draw(page, { ...HEART, load: { device: "webgpu" } });
  assert.equal(error?.name, "DeviceError");
  assert.equal((await succeeds(page, { ...HEART, load: { device: "auto" } })).device, "wasm");
});

test("in the page's own thread, it draws as well", async () => {
  await succeeds(await open(), { ...HEART, load: { worker: false } });
});

test("the page never freezes while the worker draws", async () => {
  const page = await open();
  const { longest, total } = await page.evaluate(async () => {
    const path = "/inside/inside.js";
    const { Pipeline } = (await import(path)) as typeof Inside;
    const wasmPaths = new URL("/ort/", location.href).href;
    const pipe = await Pipeline.load("/emoji", { device: "wasm", wasmPaths, workerUrl: "/static/worker.js" });
    let [longest, last] = [0, performance.now()];
    const timer = setInterval(() => {
      const now = performance.now();
      [longest, last] = [Math.max(longest, now - last), now];
    }, 5);
    const begun = performance.now();
    await pipe("a red heart", { numImages: 8 });
    clearInterval(timer);
    return { longest, total: performance.now() - begun };
  });
  assert.ok(longest < total / 3, `the page stood still for ${longest} of ${total} ms`);
});

test("a tab that is frozen in the background goes on when it is shown again", async () => {
  const page = await open();
  const session = await context.newCDPSession(page);
  const drawing = draw(page, EMOJI);
  await waitFor(async () => server.log.includes(LARGE));
  await session.send("Page.setWebLifecycleState", { state: "frozen" });
  await new Promise((resolve) => setTimeout(resolve, 2000));
  await session.send("Page.setWebLifecycleState", { state: "active" });
  assert.equal((await drawing).error, null);
});

test("cancelling a request in the worker leaves the pipeline working", async () => {
  const page = await open();
  const outcome = await page.evaluate(async () => {
    const path = "/inside/inside.js";
    const { Pipeline } = (await import(path)) as typeof Inside;
    const wasmPaths = new URL("/ort/", location.href).href;
    const pipe = await Pipeline.load("/emoji", { device: "wasm", wasmPaths, workerUrl: "/static/worker.js" });
    const controller = new AbortController();
    const previews: number[] = [];
    const stopped = await pipe("a red heart", {
      signal: controller.signal,
      onProgress: (progress) => {
        const preview = progress.preview();
        if (preview) previews.push(preview.width);
        if (progress.step === 2) controller.abort();
      },
    }).then(
      () => "drew",
      (error: Error) => error.name,
    );
    const { images } = await pipe("a red heart", { seed: 1 });
    await pipe.dispose();
    return { stopped, previews, size: images[0]?.width, image: images[0]?.toImageData().data.length };
  });
  assert.deepEqual(outcome, { stopped: "Cancelled", previews: [128, 128], size: 128, image: 128 * 128 * 4 });
});
