/** Damaged bundles: each ends in an error that says what was expected, what arrived, and what to do. */
import assert from "node:assert/strict";
import { cp, mkdtemp, readdir, readFile, rm, truncate, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { afterAll, beforeEach, test } from "vitest";
import { externalData } from "../src/bundle/external_data.js";
import { Bundle } from "../src/bundle/files.js";
import { readManifest } from "../src/bundle/manifest.js";
import {
  BundleError,
  DeviceError,
  Pipeline,
  RequestError,
  type LoadOptions,
  type RequestOptions,
} from "../src/index.js";
import { PromptTokenizer } from "../src/text/tokenizer.js";
import { EMOJI, ROOT, TINY, UPSCALED } from "./shared.js";

let copy: string;
beforeEach(async () => {
  if (copy) await rm(copy, { recursive: true });
  copy = await mkdtemp(join(tmpdir(), "tiue-"));
  await cp(TINY, copy, { recursive: true });
});
afterAll(() => rm(copy, { recursive: true }));

type Json = { [key: string]: any };

async function edited(change: (content: Json) => unknown): Promise<void> {
  const path = join(copy, "bundle.json");
  const content = JSON.parse(await readFile(path, "utf8")) as Json;
  change(content);
  await writeFile(path, JSON.stringify(content));
}

function refused(message: RegExp, options?: LoadOptions, Kind: typeof BundleError = BundleError): Promise<void> {
  return assert.rejects(Pipeline.load(copy, options), (error) => {
    assert.ok(error instanceof Kind, String(error));
    assert.match(error.message, message);
    assert.ok(!error.message.includes("\n"));
    return true;
  });
}

const CHANGES: [string, (content: Json) => unknown, RegExp][] = [
  [
    "a newer format",
    (b) => (b["format"] = 2),
    /bundle\.json: format: this tiue-runtime reads 1, got 2: written by a newer tiue; install a newer/,
  ],
  ["format 0", (b) => (b["format"] = 0), /format: expected 1, got 0\. Export the bundle again/],
  ["a format of text", (b) => (b["format"] = "1"), /format: expected an integer, got '1'/],
  ["a missing field", (b) => delete b["name"], /missing field name\. Export/],
  ["an unknown field", (b) => (b["extra"] = 1), /unknown field extra\./],
  ["a wrong type", (b) => (b["latent_channels"] = "4"), /latent_channels: expected an integer, got '4' \(string\)/],
  [
    "a large number",
    (b) => (b["text_length"] = 100_000),
    /text_length: expected a number >= 1 and <= 65536, got 100000/,
  ],
  ["a wrong choice", (b) => (b["precision"] = "fp8"), /precision: expected one of fp32, fp16, bf16, int8, got 'fp8'/],
  ["a control character", (b) => (b["name"] = "a\u001b[31m"), /name: expected printable characters, got 'a\\x1b\[31m'/],
  [
    "a key that is no step count",
    (b) => (b["schedules"] = { "04": b["schedules"]["4"] }),
    /schedules: expected step counts as keys, for example '4', got '04'/,
  ],
  [
    "a wrong hash",
    (b) => (b["files"]["tokenizer.json"]["sha256"] = "XY"),
    /files\.tokenizer\.json\.sha256: expected \^\[0-9a-f\]\{64\}\$, got 'XY'/,
  ],
  ["an empty name", (b) => (b["name"] = ""), /name: expected 1 to 200 characters, got 0/],
  ["too few numbers", (b) => (b["preview"]["bias"] = [1]), /preview\.bias: expected 3 to 3 items, got 1/],
  [
    "a wrong multiple",
    (b) => (b["size_multiple"] = 3),
    /size_multiple: expected a multiple of pixels_per_latent \(2\), got 3/,
  ],
  [
    "a wrong size",
    (b) => (b["default_width"] = 10),
    /default_width: expected a positive multiple of size_multiple \(4\), got 10/,
  ],
  [
    "a schedule of another length",
    (b) => b["schedules"]["4"]["timesteps"].pop(),
    /schedules\.4: expected 4 timesteps and 4 step_weights, got '3 and 4'/,
  ],
  [
    "timesteps that rise",
    (b) => b["schedules"]["4"]["timesteps"].reverse(),
    /schedules\.4\.timesteps: expected decreasing timesteps/,
  ],
  [
    "an unknown timestep",
    (b) => (b["schedules"]["2"]["timesteps"] = [500, 1]),
    /schedules\.2\.timesteps: expected timesteps of decoder_timesteps, got \[500\]/,
  ],
  [
    "a default that is no step count",
    (b) => (b["default_steps"] = 3),
    /default_steps: expected a step count of schedules \(2, 4\), got 3/,
  ],
  [
    "a missing graph",
    (b) => delete b["variants"]["portable"]["vae_decoder"],
    /variants\.portable: expected the graphs text_encoder, unet_encoder/,
  ],
  [
    "a path outside",
    (b) => (b["variants"]["portable"]["vae_decoder"] = "../x.onnx"),
    /variants\.portable\.vae_decoder: expected a file name inside the bundle/,
  ],
  ["a missing entry", (b) => delete b["files"]["tokenizer.json"], /files: expected an entry for tokenizer\.json/],
  [
    "names that differ by capitals",
    (b) => (b["files"]["readme.md"] = b["files"]["README.md"]),
    /files: expected names that differ by more than capitals/,
  ],
  ["a matrix of another height", (b) => b["preview"]["matrix"].pop(), /preview\.matrix: expected 4 rows, got 3/],
  [
    "memory of an unknown graph",
    (b) => (b["memory"] = { portable: { x: { per_latent: 1, per_latent_squared: 0 } } }),
    /memory\.portable: expected graphs among/,
  ],
  [
    "an upscaler without a graph",
    (b) => (b["upscaler"] = { scale: 4 }),
    /upscaler: expected an object if variants have the graph upscaler, else none, got \{"scale":4\}/,
  ],
  [
    "the graph of an upscaler of which nothing is said",
    (b) => (b["variants"]["portable"]["upscaler"] = "vae_decoder.onnx"),
    /upscaler: expected an object if variants have the graph upscaler, else none, got 'none'/,
  ],
  [
    "the graph of a safety checker of which nothing is said",
    (b) => (b["variants"]["portable"]["safety_checker"] = "vae_decoder.onnx"),
    /safety_checker: expected an object if variants have the graph safety_checker, else none, got 'none'/,
  ],
];

for (const [name, change, message] of CHANGES) {
  test(`refuses ${name}`, async () => {
    await edited(change);
    await refused(message);
  });
}

for (const [name, text, message] of [
  ["no JSON", "{", /bundle\.json: expected JSON, but /],
  ["a list", "[]", /bundle\.json: bundle\.json: expected an object, got \[\]/],
  ["a byte order mark", "\ufeff{}", /expected JSON without a byte order mark/],
  ["a key twice", '{"format": 1, "a": {"b": 1, "b": 2}}', /expected every key once, got 'b' twice/],
  ["an overlong number", `{"format": ${"1".repeat(30)}}`, /expected finite numbers of at most 20 digits/],
  ["infinity", '{"format": 1e999}', /expected finite numbers/],
] as const) {
  test(`refuses bundle.json with ${name}`, async () => {
    await writeFile(join(copy, "bundle.json"), text);
    await refused(message);
  });
}

test("equal keys of different objects, and braces in strings, are no duplicates", async () => {
  await edited((b) => (b["created_from"] = { a: '{"a": 1, "a": 2}', "x\\": '"', files: "" }));
  await (await Pipeline.load(copy)).dispose();
});

test("refuses files that are missing, cut off or no graphs", async () => {
  await rm(join(copy, "unet_decoder.onnx"));
  await refused(/unet_decoder\.onnx is missing\. Export the bundle again/);
  await writeFile(join(copy, "unet_decoder.onnx"), Buffer.alloc(557, 7));
  await refused(/unet_decoder\.onnx: not an ONNX graph that can be read/);
  await truncate(join(copy, "unet_decoder.onnx"), 10);
  await refused(/unet_decoder\.onnx: expected 557 bytes, found 10/);
});

test("refuses a directory without a bundle", async () => {
  await rm(join(copy, "bundle.json"));
  await refused(/ is not a bundle: expected a file bundle\.json in it, found none\.$/);
});

test("refuses a tokenizer of another length", async () => {
  await edited((b) => (b["text_length"] = 9));
  await refused(
    /tokenizer\.json: .*expected padding and truncation to text_length 9, got padding to 8 and truncation to 8/,
  );
});

for (const id of [null, 1.5, -1, "x", {}]) {
  test(`refuses a tokenizer whose ids are ${JSON.stringify(id)}`, async () => {
    const content = JSON.parse(await readFile(join(TINY, "tokenizer.json"), "utf8")) as Json;
    const damaged = (change: (content: Json) => void): Uint8Array => {
      const copied = structuredClone(content);
      change(copied);
      return Buffer.from(JSON.stringify(copied));
    };
    const expected = /^BundleError: tokenizer\.json: .*expected integers from 0 as token ids, got /;
    const padding = damaged(({ padding }) => (padding.pad_id = id ?? "none"));
    assert.throws(() => new PromptTokenizer(padding, 8), expected);
    const words = new PromptTokenizer(
      damaged(({ model }) => Object.keys(model.vocab).forEach((word) => (model.vocab[word] = id))),
      8,
    );
    assert.throws(() => words.encode(["a red heart"]), expected);
  });
}

test("refuses devices, variants and image decoders that are not there", async () => {
  await refused(
    /^device: expected one of auto, webgpu, wasm, cpu, cuda, got 'tpu'/,
    { device: "tpu" } as unknown as LoadOptions,
    RequestError,
  );
  await refused(/^device: cuda does not work here: /, { device: "cuda" }, DeviceError);
  await refused(/^variant: the bundle has portable, got cpu/, { variant: "cpu" }, DeviceError);
  await refused(/^vae: bundle tiny has kl, got tiny/, { vae: "tiny" }, RequestError);
  await refused(
    /^unexpected option 'provider'; expected some of device/,
    { provider: 1 } as unknown as LoadOptions,
    RequestError,
  );
  for (const threads of [0, 4097]) {
    await refused(/^threads: expected an integer from 1 to 4096, got \d+$/, { threads }, RequestError);
  }
});

test("external data is found in graphs, and must be listed", async () => {
  assert.deepEqual(externalData(await readFile(join(EMOJI, "unet_decoder.onnx"))), []);
  const graph = withExternalData("weights.data");
  assert.deepEqual(externalData(graph), ["weights.data"]);
  await writeFile(join(copy, "unet_decoder.onnx"), graph);
  await edited((b) => (b["files"]["unet_decoder.onnx"]["size"] = graph.length));
  await refused(/expected external data among the files of bundle\.json, got weights\.data/);
});

test("after a file of external data that fails, no other one is fetched", async () => {
  const manifest = JSON.parse(await readFile(join(TINY, "bundle.json"), "utf8"));
  for (const name of ["a.data", "b.data"]) manifest.files[name] = { size: 1, sha256: "0".repeat(64) };
  const asked: string[] = [];
  const bundle = await Bundle.load({
    where: "here",
    canReread: true,
    manifest: () => Promise.resolve(Buffer.from(JSON.stringify(manifest))),
    check: () => Promise.resolve(),
    path: () => null,
    read: (name) => {
      asked.push(name);
      return name === "a.data" ? Promise.reject(new BundleError("gone")) : Promise.resolve(graph);
    },
  });
  const graph = withExternalData("a.data", "b.data");
  await assert.rejects(bundle.graph("unet_decoder.onnx", false), /gone/);
  assert.deepEqual(asked, ["unet_decoder.onnx", "a.data"]);
});

/** Return an ONNX file of tensors whose bytes lie in other files. */
function withExternalData(...locations: string[]): Uint8Array<ArrayBuffer> {
  const field = (number: number, data: Uint8Array): Uint8Array =>
    Buffer.concat([Buffer.from([number * 8 + 2, data.length]), data]);
  const tensors = locations.map((location) => {
    const entry = Buffer.concat([field(1, Buffer.from("location")), field(2, Buffer.from(location))]);
    return field(5, field(13, entry));
  });
  return new Uint8Array(field(7, Buffer.concat(tensors)));
}

test("a bundle behind a URL draws in Node, and damage is noticed by its sha256", async () => {
  let damaged = "";
  const server = createServer((request, response) => {
    const name = (request.url ?? "").slice(1);
    void readFile(join(TINY, name)).then((data) => {
      if (name === damaged) data[0] = (data[0] ?? 0) ^ 1;
      response.end(data);
    });
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/`;
  try {
    const fetched = await Pipeline.load(url);
    const local = await Pipeline.load(TINY);
    assert.deepEqual(
      (await fetched("a red heart", { seed: 1 })).latents,
      (await local("a red heart", { seed: 1 })).latents,
    );
    damaged = "unet_decoder.onnx";
    await assert.rejects(Pipeline.load(url), /BundleError: .*content differs from bundle\.json: unet_decoder\.onnx/);
  } finally {
    server.closeAllConnections();
    server.close();
  }
});

test("refuses a safety checker that cuts out more than there is", async () => {
  await cp(UPSCALED, copy, { recursive: true });
  await edited((b) => (b["safety_checker"]["crop"] = 7));
  await refused(/safety_checker\.crop: expected at most safety_checker\.resize \(6\), got 7/);
});

test("manifests of all bundles of the checkout are read", async () => {
  const files = await readdir(join(ROOT, "runtime/tests/data"), { recursive: true });
  const manifests = files.filter((file) => basename(file) === "bundle.json");
  assert.ok(manifests.length >= 4);
  for (const path of [join(EMOJI, "bundle.json"), ...manifests.map((file) => join(ROOT, "runtime/tests/data", file))]) {
    assert.equal(readManifest(await readFile(path)).format, 1);
  }
});

test("a bundle with a safety checker and an upscaler draws, with a warning", async () => {
  const warnings: string[] = [];
  const upscaled = await Pipeline.load(UPSCALED, { onWarning: (message) => warnings.push(message) });
  const tiny = await Pipeline.load(TINY);
  const asked = { seed: 1 };
  assert.deepEqual((await upscaled("a red heart", asked)).latents, (await tiny("a red heart", asked)).latents);
  assert.equal(warnings.length, 1);
  assert.match(warnings[0] ?? "", /^bundle upscaled has a safety checker, .*: pictures are not checked$/);
  await assert.rejects(upscaled("a red heart", { upscale: 3 } as RequestOptions), /unexpected option 'upscale'/);
});
