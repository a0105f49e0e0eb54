/** Pipelines in Node: pictures, options, progress, cancelling and memory modes. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { join } from "node:path";
import { InferenceSession } from "onnxruntime-node";
import { afterAll, beforeAll, test, vi } from "vitest";
import { inflateSync } from "node:zlib";
import {
  Cancelled,
  DeviceError,
  gaussian,
  OutOfMemoryError,
  Pipeline,
  RequestError,
  type DeviceName,
  type LoadOptions,
  type Memory,
  type PngOptions,
  type RequestOptions,
  type Result,
} from "../src/index.js";
import { rgbOf } from "../src/picture/picture.js";
import { decibels, EMOJI, floats, HEAVY, largestDifference, ROOT, TINY, vectors } from "./shared.js";

const QUIET: LoadOptions = { onWarning: () => undefined };
const LEAST_DECIBELS = 100; // between z_0 of ONNX Runtime's builds for other platforms
let pipe: Pipeline;

beforeAll(async () => {
  pipe = await Pipeline.load(TINY, QUIET);
});
afterAll(() => pipe.dispose());

interface Case {
  bundle: string;
  prompts: string[];
  options: {
    seed: string;
    memory?: "sequential";
    num_images?: number;
    steps?: number;
    height?: number;
    width?: number;
  };
  seeds: string[];
  shape: number[];
  latents: number[];
  size: [number, number];
  rgb: string[];
  pixels_sha256: string[];
  previews: string[];
}

function optionsOf({ options: { seed, num_images, ...others } }: Case): RequestOptions {
  return { ...others, numImages: num_images, seed: BigInt(seed) };
}

function checkAgainst(one: Case, result: Result): void {
  assert.deepEqual(result.shape, one.shape);
  assert.deepEqual(result.seeds.map(String), one.seeds);
  assert.ok(decibels(result.latents, floats(one.latents)) > LEAST_DECIBELS);
  for (const [i, image] of result.images.entries()) {
    assert.deepEqual([image.width, image.height], one.size);
    const rgb = rgbOf(image);
    assert.ok(largestDifference(rgb, Buffer.from(one.rgb[i] ?? "", "hex")) <= 1);
    assert.equal(image.record?.pixels_sha256, createHash("sha256").update(rgb).digest("hex"));
  }
}

for (const device of ["cpu", "wasm"] as DeviceName[]) {
  test(`${device} makes the golden pictures and previews`, async () => {
    const loaded = await Pipeline.load(TINY, { ...QUIET, device });
    assert.equal(loaded.device, device);
    for (const one of vectors<Case>("pictures.json")) {
      checkAgainst(one, await loaded(one.prompts, optionsOf(one)));
      const previews: string[] = [];
      const onProgress: RequestOptions["onProgress"] = (progress) => {
        const preview = progress.preview();
        previews.push(preview ? Buffer.from(rgbOf(preview)).toString("hex") : "");
      };
      await loaded(one.prompts, { ...optionsOf(one), onProgress });
      assert.equal(previews.length, one.previews.length);
      for (const [i, preview] of previews.entries()) {
        assert.ok(largestDifference(Buffer.from(preview, "hex"), Buffer.from(one.previews[i] ?? "", "hex")) <= 1);
      }
    }
    await loaded.dispose();
  });
}

test("ONNX Runtime for WebAssembly keeps the threads of its first load", async () => {
  const load = (threads?: number) => Pipeline.load(TINY, { ...QUIET, device: "wasm", threads });
  for (const threads of [1, undefined]) {
    const loaded = await load(threads);
    assert.equal(loaded.threads, 1);
    await loaded.dispose();
  }
  await assert.rejects(load(2), (error) => {
    assert.ok(error instanceof DeviceError);
    return /^threads: .* runs with 1 here since the first load, and cannot change to 2: load with/.test(error.message);
  });
});

test("Node says which options only pages take", async () => {
  const warnings: string[] = [];
  const onWarning = (message: string): unknown => warnings.push(message);
  const loaded = await Pipeline.load(TINY, { onWarning, worker: false, cache: true, wasmPaths: "/ort/" });
  await loaded.dispose();
  assert.deepEqual(
    warnings.map((warning) => warning.split(":", 1)[0]),
    ["wasmPaths", "cache"],
  );
});

test("all memory modes make the same picture", async () => {
  const expected = await pipe("a red heart", { seed: 3 });
  for (const memory of ["partial", "sequential", "low"] as const) {
    const made = await pipe("a red heart", { seed: 3, memory });
    assert.ok(largestDifference(made.latents, expected.latents) < 1e-5);
    assert.equal(made.memory, memory === "low" ? "sequential" : memory);
  }
});

test("a pipeline with low memory loads graphs for their turns only", async () => {
  const low = await Pipeline.load(HEAVY, { ...QUIET, memory: "low", vae: "tiny" });
  const held: number[] = []; // sessions, each time that one was created
  let sessions = 0;
  const create = InferenceSession.create.bind(InferenceSession) as (...given: unknown[]) => Promise<InferenceSession>;
  const spy = vi.spyOn(InferenceSession, "create").mockImplementation(async (...given: unknown[]) => {
    const session = await create(...given);
    const release = session.release.bind(session);
    session.release = () => ((sessions -= 1), release());
    held.push((sessions += 1));
    return session;
  });
  const made = await low("a red heart", { seed: 1, height: 8, width: 8 });
  spy.mockRestore();
  assert.deepEqual([held, sessions], [[1, 1, 1, 1], 0]);
  assert.equal(made.vae, "tiny");
  assert.equal(made.memory, "sequential");
});

test("pictures of a batch are those that each seed gives alone", async () => {
  const batch = await pipe(["a red heart", "a blue star"], { seed: 5, numImages: 2 });
  assert.deepEqual(batch.seeds, [5n, 6n, 7n, 8n]);
  const alone = await pipe("a blue star", { seed: 7 });
  assert.deepEqual(batch.images[2]?.data, alone.images[0]?.data);
  assert.deepEqual(
    batch.images.map((image) => image.record?.prompt),
    ["a red heart", "a red heart", "a blue star", "a blue star"],
  );
});

test("without a seed, each call gets another one", async () => {
  const [first, second] = [await pipe("a red heart"), await pipe("a red heart")];
  assert.notEqual(first.seeds[0], second.seeds[0]);
});

test("progress never falls and ends at 1", async () => {
  const seen: [string, number][] = [];
  await pipe("a red heart", { onProgress: ({ stage, fraction }) => seen.push([stage, fraction]) });
  assert.deepEqual(
    seen.map(([stage]) => stage),
    ["text_encoder", "unet_encoder", ...Array<string>(4).fill("unet_decoder"), "vae_decoder"],
  );
  assert.ok(seen.every(([, fraction], i) => fraction > (seen[i - 1]?.[1] ?? 0)));
  assert.equal(seen.at(-1)?.[1], 1);
});

test("Node has no ImageData, and the error says what to take", async () => {
  const { images } = await pipe("a red heart", { seed: 1 });
  assert.throws(() => images[0]?.toImageData(), /^DeviceError: only browsers have ImageData: take .* or png\(\)$/);
});

test("warnings go to the console unless somebody hears them", async () => {
  const warn = vi.spyOn(console, "warn").mockImplementation(() => undefined);
  const loaded = await Pipeline.load(TINY);
  await loaded("zebras");
  await loaded.dispose();
  const said = warn.mock.calls.map(([message]) => String(message));
  warn.mockRestore();
  assert.equal(said.length, 1);
  assert.match(said[0] ?? "", /^tiue-runtime: .*zebras/);
});

test("a PNG file holds the pixels", async () => {
  const { images } = await pipe("a red heart", { seed: 1 });
  const [image] = images;
  assert.ok(image);
  const png = await image.png({ metadata: false, aiMark: false });
  assert.deepEqual(unfiltered(png, image.width), Buffer.from(rgbOf(image)));
});

test("a misspelt option of a file is refused, and so is a number of elements that is none", async () => {
  const { images } = await pipe("a red heart", { seed: 1 });
  for (const options of [{ aimark: false }, { metadata: "no" }, null]) {
    await assert.rejects(images[0]?.png(options as PngOptions) ?? Promise.resolve(), RequestError);
    await assert.rejects(images[0]?.toBlob(options as PngOptions) ?? Promise.resolve(), RequestError);
  }
  for (const count of [-1, 1.5, NaN, 2 ** 32]) assert.throws(() => gaussian(1, count), RequestError);
});

/** Decode a PNG file in RGB whose rows have Paeth's filter. */
function unfiltered(png: Uint8Array, width: number): Buffer {
  const at = Buffer.from(png).indexOf("IDAT");
  const size = Buffer.from(png).readUInt32BE(at - 4);
  const rows = inflateSync(png.subarray(at + 4, at + 4 + size));
  const stride = 3 * width;
  const out = Buffer.alloc((rows.length / (stride + 1)) * stride);
  for (let row = 0; row < out.length / stride; row++) {
    assert.equal(rows[row * (stride + 1)], 4);
    for (let i = 0; i < stride; i++) {
      const left = i < 3 ? 0 : (out[row * stride + i - 3] ?? 0);
      const up = row === 0 ? 0 : (out[(row - 1) * stride + i] ?? 0);
      const corner = i < 3 || row === 0 ? 0 : (out[(row - 1) * stride + i - 3] ?? 0);
      const guess = left + up - corner;
      const [nearest] = [left, up, corner].sort((a, b) => Math.abs(guess - a) - Math.abs(guess - b));
      out[row * stride + i] = (rows[row * (stride + 1) + 1 + i] ?? 0) + (nearest ?? 0);
    }
  }
  return out;
}

const WRONG: [unknown, unknown, RegExp][] = [
  [undefined, {}, /^prompt: expected a string or a list of strings, got nothing$/],
  [[], {}, /^prompt: expected at least one prompt/],
  [["a", 1], {}, /^prompt\[1\]: expected a string, got number$/],
  ["a \ud800 heart", {}, /^prompt\[0\]: expected whole characters, got half of one in a \\ud800 heart$/],
  [`\ud800${"\u{1f600}".repeat(99)}`, {}, /^prompt\[0\]: .* in \\ud800\u{1f600}{91}\.\.\.$/u],
  ["a", { steps: 3 }, /^steps: this bundle was trained for 2, 4, got 3$/],
  ["a", { steps: "4" }, /^steps: expected an integer, got '4'$/],
  ["a", { seed: -1 }, /^seed: expected an integer in \[0, 2\*\*64\), got -1$/],
  ["a", { seed: 1.5 }, /^seed: expected an integer/],
  ["a", { seed: 2 ** 60 }, /^seed: expected a bigint/],
  ["a", { seed: 2n ** 64n - 1n, numImages: 2 }, /with seed \+ 1 the seed of the last image/],
  ["a", { numImages: 0 }, /^numImages: expected an integer from 1 to/],
  ["a", { height: 10 }, /^height: expected a multiple of 4 in pixels, for example 8 or 12, got 10$/],
  ["a", { memory: "huge" }, /^memory: expected one of auto, low, parallel, partial, sequential, got 'huge'$/],
  ["a", { onProgress: 1 }, /^onProgress: expected a function/],
  ["a", { signal: {} }, /^signal: expected an AbortSignal/],
  ["a", { colour: 1 }, /^unexpected option 'colour'; expected some of seed, steps/],
  ["a", { constructor: 1 }, /^unexpected option 'constructor'; expected/],
  ["a", { guidanceScale: 7.5 }, /^guidanceScale: guidance was distilled into the student/],
  ["a", { num_inference_steps: 4 }, /^num_inference_steps: use `steps`/],
  ["a", { numImagesPerPrompt: 4 }, /^numImagesPerPrompt: use `numImages`$/],
  ["a", 7, /^options: expected an object such as \{seed: 1\}, got 7$/],
];

for (const [prompt, options, message] of WRONG) {
  test(`refuses ${String(message)}`, async () => {
    await assert.rejects(pipe(prompt as string, options as RequestOptions), (error) => {
      assert.ok(error instanceof RequestError);
      assert.match(error.message, message);
      return true;
    });
  });
}

test("each picture is that of its prompt with the style of its seed", async () => {
  const drawing = await Pipeline.load(EMOJI, QUIET);
  const { images } = await drawing(["a red heart", "a sun, twemoji style"], { seed: 5, numImages: 2 });
  const drawn = [
    "a red heart, noto classic style",
    "a red heart, noto style",
    ...Array(2).fill("a sun, twemoji style"),
  ];
  assert.deepEqual(
    images.map(({ record }) => [record?.prompt, record?.prompts, record?.num_images]),
    drawn.map((prompt) => [prompt, 2, 2]),
  );
  for (const [i, prompt] of drawn.entries()) {
    const alone = (await drawing(prompt, { seed: 5 + i })).images[0];
    assert.ok(largestDifference(alone?.data ?? [], images[i]?.data ?? []) <= 1);
  }
  await drawing.dispose();
});

test("a signal cancels at once, and later calls work", async () => {
  const controller = new AbortController();
  const call = pipe("a red heart", { signal: controller.signal });
  controller.abort(new Error("enough"));
  await assert.rejects(call, (error) => error instanceof Cancelled && (error.cause as Error).message === "enough");
  await assert.rejects(pipe("a red heart", { signal: controller.signal }), Cancelled);
  assert.equal((await pipe("a red heart", { seed: 1 })).images.length, 1);
});

test("loading is cancelled before and between graphs", async () => {
  await assert.rejects(Pipeline.load(TINY, { ...QUIET, signal: AbortSignal.abort("enough") }), Cancelled);
  for (const memory of ["auto", "low"] as Memory[]) {
    const controller = new AbortController();
    const loading = Pipeline.load(TINY, { ...QUIET, memory, signal: controller.signal });
    controller.abort();
    await assert.rejects(loading, /^Cancelled: cancelled while the bundle was loaded$/);
  }
});

test("a call that is cancelled before its turn does nothing to the others", async () => {
  const first = pipe("a red heart", { seed: 1 });
  const controller = new AbortController();
  const second = pipe("a red heart", { memory: "low", signal: controller.signal });
  controller.abort();
  await assert.rejects(second, Cancelled);
  await first;
  const create = vi.spyOn(InferenceSession, "create");
  await pipe("a red heart", { seed: 1 });
  assert.equal(create.mock.calls.length, 0, "no graph was freed");
  create.mockRestore();
});

test("many pictures can be cancelled while their noise is drawn", async () => {
  const signal = AbortSignal.timeout(50);
  const begun = performance.now();
  await assert.rejects(pipe("a red heart", { numImages: 2 ** 20, signal }), Cancelled);
  await pipe("a red heart"); // It waits for the request before it.
  assert.ok(performance.now() - begun < 10_000);
});

test("pictures that no memory holds are an error of that kind", async () => {
  await assert.rejects(pipe("a red heart", { height: 2 ** 20, width: 2 ** 20 }), (error) => {
    assert.ok(error instanceof OutOfMemoryError, String(error));
    return error.message === "the request does not fit into memory: ask for fewer or smaller pictures";
  });
});

test("a signal in onProgress stops the request between graphs", async () => {
  const controller = new AbortController();
  const stages: string[] = [];
  const onProgress: RequestOptions["onProgress"] = ({ stage }) => {
    stages.push(stage);
    if (stage === "unet_encoder") controller.abort();
  };
  await assert.rejects(pipe("a red heart", { signal: controller.signal, onProgress }), Cancelled);
  await pipe("a red heart");
  assert.deepEqual(stages, ["text_encoder", "unet_encoder"]);
});

test("an error of onProgress ends the request and reaches the caller", async () => {
  const onProgress = (): void => {
    throw new RangeError("mine");
  };
  await assert.rejects(pipe("a red heart", { onProgress }), RangeError);
});

test("calls at the same time run one after another", async () => {
  const stages: string[] = [];
  const call = (name: string) => pipe("a red heart", { seed: 1, onProgress: () => void stages.push(name) });
  const [first, second] = await Promise.all([call("first"), call("second")]);
  assert.deepEqual(first.latents, second.latents);
  assert.deepEqual(stages, [...Array<string>(7).fill("first"), ...Array<string>(7).fill("second")]);
});

test("long prompts and unknown words give warnings", async () => {
  const long = await pipe("a red heart ".repeat(9));
  assert.match(long.warnings[0] ?? "", /^prompt longer than 8 tokens; this part was cut off: 'a red heart a/);
  const unknown = await pipe("zebras");
  assert.match(unknown.warnings[0] ?? "", /knows no word of 'zebras'; it knows for example/);
});

test("a size that the model was not made for gets a warning, once", async () => {
  const loaded = await Pipeline.load(TINY, QUIET);
  const expected = "the model was made for pictures of 12x8; at 4x16 it may draw nothing that one recognizes";
  assert.deepEqual((await loaded("a red heart", { width: 4, height: 16 })).warnings, [`width, height: ${expected}`]);
  assert.deepEqual((await loaded("a red heart", { width: 4, height: 16 })).warnings, []);
  assert.deepEqual((await loaded("a red heart", { width: 12, height: 8 })).warnings, []);
});

test("a closed pipeline refuses calls", async () => {
  const closed = await Pipeline.load(TINY, QUIET);
  await closed.dispose();
  await assert.rejects(closed("a red heart"), /^RequestError: this pipeline is closed/);
});

test("the default model draws", async () => {
  const emoji = await Pipeline.load(join(ROOT, EMOJI.slice(ROOT.length)), QUIET);
  const { images } = await emoji("a red heart", { seed: 1 });
  const [red, green, blue] = images[0]?.data.subarray(4 * (64 * 128 + 64)) ?? [];
  assert.ok((red ?? 0) > 150 && (green ?? 255) < 90 && (blue ?? 255) < 90, "the middle of the picture is red");
  await emoji.dispose();
});
