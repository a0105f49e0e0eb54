/** The golden vectors of the Python runtime: noise, tokens, weights, records and texts are equal to the last bit. */
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { test } from "vitest";
import { readManifest, scheduleOf, type Manifest } from "../src/bundle/manifest.js";
import { LESSONS } from "../src/generated/lessons.js";
import { gaussian } from "../src/noise.js";
import { camel } from "../src/options.js";
import { encodePng } from "../src/picture/png.js";
import { parameters, toJson, type Record } from "../src/picture/record.js";
import { inStyle } from "../src/text/styles.js";
import { PromptTokenizer } from "../src/text/tokenizer.js";
import { Vocabulary } from "../src/text/vocabulary.js";
import { bits, ROOT, vectors } from "./shared.js";

async function manifestOf(bundle: string): Promise<Manifest> {
  return readManifest(await readFile(join(ROOT, bundle, "bundle.json")));
}

test("noise has the same bits", () => {
  for (const one of vectors<{ seed: string; count: number; first: number[]; sha256: string }>("noise.json")) {
    const values = gaussian(BigInt(one.seed), one.count);
    assert.deepEqual(bits(values.subarray(0, 8)), one.first, `seed ${one.seed}`);
    assert.equal(createHash("sha256").update(new Uint8Array(values.buffer)).digest("hex"), one.sha256);
  }
});

test("prompts get the same styles", async () => {
  const cases = vectors<{ bundle: string; prompt: string; seed: string; drawn: string }>("styles.json");
  assert.ok(new Set(cases.map(({ drawn }) => drawn)).size > cases.length / 2);
  for (const one of cases) {
    const { prompts } = await manifestOf(one.bundle);
    assert.equal(inStyle(prompts, one.prompt, BigInt(one.seed)), one.drawn);
  }
});

test("prompts have the same tokens", async () => {
  type Case = {
    bundle: string;
    length: number;
    prompt: string;
    times: number;
    ids: number[];
    mask: number[];
    cut: boolean;
  };
  const tokenizers = new Map<string, PromptTokenizer>();
  for (const one of vectors<Case>("tokens.json")) {
    const known = tokenizers.get(one.bundle);
    const tokenizer =
      known ?? new PromptTokenizer(await readFile(join(ROOT, one.bundle, "tokenizer.json")), one.length);
    tokenizers.set(one.bundle, tokenizer);
    const made = tokenizer.encode([one.prompt.repeat(one.times)]);
    const about = `${one.bundle}: ${JSON.stringify(one.prompt)} x ${one.times}`;
    assert.deepEqual(Array.from(made.inputIds, Number), one.ids, about);
    assert.deepEqual(Array.from(made.attentionMask, Number), one.mask, about);
    assert.equal(made.cut[0] !== "", one.cut, about);
  }
});

test("of a long prompt whose end is kept, everything before the end is cut off", async () => {
  const json = await readFile(join(ROOT, "runtime/tests/data/tiny/tokenizer.json"), "utf8");
  const tokenizer = new PromptTokenizer(Buffer.from(json.replaceAll('"direction": "Right"', '"direction": "Left"')), 8);
  const [cut = ""] = tokenizer.encode([`${"\u{1f600}zebra ".repeat(2000)}a red heart`]).cut;
  assert.ok(cut.isWellFormed());
  assert.match(cut, /^(\u{1f600}zebra ?){1990,2000}$/u);
});

test("schedules have the same rows and weights", async () => {
  type Case = { bundle: string; steps: number; rows: number[]; noise_weight: number; step_weights: number[] };
  for (const one of vectors<Case>("schedules.json")) {
    const schedule = scheduleOf(await manifestOf(one.bundle), one.steps);
    assert.deepEqual(schedule.rows, one.rows);
    assert.deepEqual(bits([schedule.noiseWeight]), [one.noise_weight]);
    assert.deepEqual(bits(schedule.stepWeights), one.step_weights);
  }
});

type RecordCase = { record: { [name: string]: unknown }; json: string; parameters: string };

function recordOf({ record }: RecordCase): Record {
  const { format: _, seed, ...fields } = record;
  return { ...fields, ...(seed === null ? {} : { seed: BigInt(seed as string) }) } as Record;
}

test("records give the same JSON and the same parameters", () => {
  for (const one of vectors<RecordCase>("records.json")) {
    assert.equal(toJson(recordOf(one)), one.json);
    assert.equal(parameters(recordOf(one)), one.parameters);
  }
});

test("PNG files have the same text chunks", async () => {
  const records = vectors<RecordCase>("records.json");
  const picture = { width: 1, height: 1, data: new Uint8ClampedArray(4) };
  for (const [i, { chunks }] of vectors<{ chunks: [string, string][] }>("chunks.json").entries()) {
    const png = await encodePng(picture, recordOf(records[i] as RecordCase), true);
    assert.deepEqual(textChunks(png), chunks);
  }
});

/** Return (type, content) of a file's text chunks. */
function textChunks(png: Uint8Array): [string, string][] {
  const view = new DataView(png.buffer);
  const found: [string, string][] = [];
  for (let at = 8; at < png.length; at += 12 + view.getUint32(at)) {
    const type = new TextDecoder().decode(png.subarray(at + 4, at + 8));
    const data = png.subarray(at + 8, at + 8 + view.getUint32(at));
    if (type === "tEXt" || type === "iTXt") found.push([type, new TextDecoder().decode(data)]);
  }
  return found;
}

test("unknown words get the same warnings", async () => {
  for (const one of vectors<{ bundle: string; prompt: string; warning: string | null }>("vocabulary.json")) {
    const { prompts, text_length } = await manifestOf(one.bundle);
    const vocabulary = new Vocabulary(prompts, text_length);
    assert.equal(vocabulary.complaint(one.prompt), one.warning);
  }
});

test("arguments of diffusers get the same lessons, with the names of this package", () => {
  for (const { name, lesson } of vectors<{ name: string; lesson: string }>("lessons.json")) {
    assert.equal(LESSONS[camel(name)]?.replace(/`\w+`/g, "`"), lesson.replace(/`\w+`/g, "`"));
  }
  assert.equal(LESSONS["numImagesPerPrompt"], "use `numImages`");
  assert.equal(LESSONS["callbackOnStepEnd"], "use `onProgress`; it gets a Progress");
});
