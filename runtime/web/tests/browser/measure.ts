/**
 * What a picture of the default model costs in Chromium and in Node. Run by hand: npm run measure, or
 * npm run measure -- wasm-1 node-2 for some cases. All cases but webgpu, which takes minutes, run without a name.
 */
import { readFileSync } from "node:fs";
import { cpus } from "node:os";
import type { Browser } from "playwright-core";
import { Pipeline } from "../../src/index.js";
import { EMOJI } from "../shared.js";
import { startBrowser, startServer } from "./browser.js";
import type * as Inside from "./inside.js";

const PICTURES = 20;
const SWIFTSHADER = [
  "--enable-unsafe-webgpu",
  "--use-webgpu-adapter=swiftshader",
  "--enable-features=Vulkan",
  "--disable-gpu-sandbox",
  "--ignore-gpu-blocklist",
];

function median(values: number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)] ?? NaN;
}

/** Return the largest resident memory of a renderer so far, in MB. */
async function rendererMemory(browser: Browser): Promise<number> {
  const session = await browser.newBrowserCDPSession();
  const { processInfo } = (await session.send("SystemInfo.getProcessInfo")) as {
    processInfo: { type: string; id: number }[];
  };
  const largest = processInfo
    .filter(({ type }) => type === "renderer")
    .map(({ id }) => Number(/VmHWM:\s+(\d+)/.exec(readFileSync(`/proc/${id}/status`, "utf8"))?.[1] ?? 0) / 1000);
  return Math.max(...largest);
}

interface Settings {
  device: "wasm" | "webgpu";
  threads?: number;
  memory?: "low";
}

async function inChromium(settings: Settings, flags: string[] = []): Promise<void> {
  const server = await startServer();
  server.isolated = (settings.threads ?? 1) > 1;
  const browser = await startBrowser(...flags);
  try {
    const page = await (await browser.newContext()).newPage();
    await page.goto(server.origin);
    const empty = await rendererMemory(browser);
    const run = (pictures: number): Promise<number[]> =>
      page.evaluate(
        async ({ settings, pictures }) => {
          const path = "/inside/inside.js";
          const { Pipeline } = (await import(path)) as typeof Inside;
          const wasmPaths = new URL("/ort/", location.href).href;
          const times = [performance.now()];
          const pipe = await Pipeline.load("/emoji", { ...settings, wasmPaths, workerUrl: "/static/worker.js" });
          times.push(performance.now());
          for (let i = 0; i < pictures; i++) {
            await pipe("a red heart", { seed: i });
            times.push(performance.now());
          }
          await pipe.dispose();
          return times.slice(1).map((time, i) => time - (times[i] ?? 0));
        },
        { settings, pictures },
      );
    const [load = NaN, first = NaN, ...next] = await run(PICTURES + 1);
    const memory = await rendererMemory(browser);
    const [again = NaN] = await run(1);
    const spread = `${Math.min(...next).toFixed(0)} to ${Math.max(...next).toFixed(0)}`;
    console.log(
      `Chromium ${browser.version()} ${JSON.stringify(settings)}: load ${load.toFixed(0)} ms, from the cache ${again.toFixed(0)} ms; ` +
        `first picture ${first.toFixed(0)} ms; next ${median(next).toFixed(0)} ms (${spread}, ${PICTURES} pictures); ` +
        `renderer at most ${memory.toFixed(0)} MB, an empty page ${empty.toFixed(0)} MB`,
    );
  } catch (error) {
    console.log(`Chromium ${JSON.stringify(settings)}: ${String(error)}`);
  } finally {
    await browser.close();
    await server.stop();
  }
}

async function inNode(threads: number, device: "cpu" | "wasm"): Promise<void> {
  const times = [performance.now()];
  const pipe = await Pipeline.load(EMOJI, { device, threads });
  times.push(performance.now());
  for (let i = 0; i <= PICTURES; i++) {
    await pipe("a red heart", { seed: i });
    times.push(performance.now());
  }
  await pipe.dispose();
  const [load = NaN, first = NaN, ...next] = times.slice(1).map((time, i) => time - (times[i] ?? 0));
  const spread = `${Math.min(...next).toFixed(0)} to ${Math.max(...next).toFixed(0)}`;
  console.log(
    `Node ${process.version} ${device}, ${threads} threads: load ${load.toFixed(0)} ms; first picture ${first.toFixed(0)} ms; ` +
      `next ${median(next).toFixed(0)} ms (${spread}, ${PICTURES} pictures); ${(process.memoryUsage().rss / 1e6).toFixed(0)} MB`,
  );
}

const CASES: { [name: string]: () => Promise<void> } = {
  "wasm-1": () => inChromium({ device: "wasm", threads: 1 }),
  "wasm-2": () => inChromium({ device: "wasm", threads: 2 }),
  "wasm-low": () => inChromium({ device: "wasm", threads: 1, memory: "low" }),
  "node-1": () => inNode(1, "cpu"),
  "node-2": () => inNode(2, "cpu"),
  "node-wasm": () => inNode(1, "wasm"),
  webgpu: () => inChromium({ device: "webgpu" }, SWIFTSHADER),
};

const asked = process.argv.slice(2);
const unknown = asked.filter((name) => !(name in CASES));
if (unknown.length > 0) {
  console.error(`expected some of ${Object.keys(CASES).join(", ")}, got ${unknown.join(", ")}`);
  process.exit(2);
}
console.log(`${cpus().length} x ${cpus()[0]?.model ?? ""}`);
for (const name of asked.length > 0 ? asked : Object.keys(CASES).filter((one) => one !== "webgpu"))
  await CASES[name]?.();
process.exit();
