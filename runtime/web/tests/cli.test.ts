/** The command line, as it is built: exit codes and messages. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, test } from "vitest";
import { PACKAGE, TINY } from "./shared.js";

const MAIN = join(PACKAGE, "dist/src/cli/main.js");
let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "tiue-"));
  await writeFile(join(folder, "file"), "");
});
afterAll(() => rm(folder, { recursive: true }));

interface Ended {
  code: number | null;
  out: string;
  err: string;
}

function run(words: string[], signal?: NodeJS.Signals): Promise<Ended> {
  const child = spawn(process.execPath, [MAIN, ...words], { cwd: folder, env: { ...process.env, TIUE_BUNDLE: "" } });
  const ended: Ended = { code: null, out: "", err: "" };
  child.stdout.on("data", (data) => (ended.out += String(data)));
  child.stderr.on("data", (data) => (ended.err += String(data)));
  if (signal) setTimeout(() => child.kill(signal), 300);
  return new Promise((resolve) => child.on("close", (code) => resolve({ ...ended, code })));
}

test("a picture is saved with its record", async () => {
  const made = await run(["generate", "a", "red", "heart", "-o", "heart.png", "--seed", "1", "--bundle", TINY]);
  assert.deepEqual([made.code, made.err], [0, ""]);
  assert.match(made.out, /^heart\.png {2}12x8 {2}seed 1\n\d+\.\d\d s on cpu, without loading\n$/);
  assert.match((await readFile(join(folder, "heart.png"))).toString("latin1"), /"prompt": "a red heart", "seed": 1, /);
});

test("several pictures are numbered, and JSON holds large seeds", async () => {
  const seed = String(2n ** 63n);
  const made = await run([
    "generate",
    "a red heart",
    "-o",
    "two.png",
    "--num-images",
    "2",
    "--seed",
    seed,
    "--json",
    "--bundle",
    TINY,
  ]);
  assert.equal(made.code, 0);
  const expected = `{"path":"two-1.png","width":12,"height":8,"seed":${seed},"prompt":"a red heart"}`;
  assert.equal(made.out.split("\n")[0], expected);
  assert.ok((await readdir(folder)).includes("two-2.png"));
});

test("without a name, the file is named after prompt and seed, and never replaces another", async () => {
  for (const name of ["a-red-heart-1.png", "a-red-heart-1-again-2.png"]) {
    assert.match(
      (await run(["generate", "a red heart", "--seed", "1", "--bundle", TINY])).out,
      new RegExp(`^${name} `),
    );
  }
});

test("the name of a file has whole characters and fits into a file system", async () => {
  const { out } = await run(["generate", `e\u0301${"\u{1d41a}".repeat(70)}`, "--seed", "1", "--bundle", TINY]);
  assert.match(out, /^\u00e9\u{1d41a}{29}-1\.png /u);
});

const MISTAKES: [string[], RegExp][] = [
  [["generate", "a", "--steps", "3", "--bundle", TINY], /^--steps: this bundle was trained for 2, 4, got 3$/],
  [["generate", "a", "--steps", "x", "--bundle", TINY], /^--steps: expected an integer, got 'x'$/],
  [["generate", "a", "--bundle", "/nowhere"], /^\/nowhere is not a bundle/],
  [["generate", "a"], /^--bundle: expected a directory or a URL/],
  [["generate", "--bundle", TINY], /^prompt: expected a description of the picture, got none/],
  [["generate", "a", "--colour"], /^Unknown option '--colour' \(see tiue-runtime --help\)$/],
  [["generate", "a", "--guidance-scale=7"], /^--guidance-scale: guidance was distilled/],
  [["generate", "a", "--num-images-per-prompt", "7"], /^--num-images-per-prompt: use --num-images$/],
  [
    ["generate", "a", "-o", "a.jpg", "--bundle", TINY],
    /^--out: expected a file name that ends in \.png, got 'a\.jpg'$/,
  ],
  [
    ["generate", "a", "-o", "no/such/a.png", "--bundle", TINY],
    /^--out: cannot write no\/such\/a\.png: No such file or directory$/,
  ],
  [["generate", "a", "-o", "file/a.png", "--bundle", TINY], /^--out: cannot write file\/a\.png: Not a directory$/],
  [["generate", "a", "-o", `${"a".repeat(300)}.png`, "--bundle", TINY], /^--out: cannot write a+\.*: Name too long$/],
  [["generate", "a", "--bundle", "http://127.0.0.1:9/"], /bundle\.json: cannot be fetched: bad port$/],
  [
    ["generate", "a", "--num-images", "9".repeat(20), "--bundle", TINY],
    /^--num-images: expected an integer from 1 to 1048576, got 1/,
  ],
  [
    ["generate", "a", "--timeout", "-1", "--bundle", TINY],
    /^--timeout: expected a number of seconds above 0, got '-1'$/,
  ],
  [["draw"], /^expected the command generate, got 'draw'/],
];

for (const [words, message] of MISTAKES) {
  test.concurrent(`a mistake ends with 2 and one line: ${String(message)}`, async () => {
    const { code, out, err } = await run(words);
    assert.deepEqual([code, out], [2, ""]);
    assert.match(err, /^tiue-runtime: error: [^\n]*\n$/);
    assert.match(err.trim().replace("tiue-runtime: error: ", ""), message);
  });
}

test("help and version", async () => {
  assert.match((await run(["--version"])).out, /^tiue-runtime \d+\.\d+\.\d+\n$/);
  assert.match((await run([])).out, /--num-images N/);
});

test("a timeout ends with 2", async () => {
  const { code, err } = await run([
    "generate",
    "a red heart",
    "--timeout",
    "0.001",
    "--num-images",
    "2000",
    "--bundle",
    TINY,
  ]);
  assert.equal(code, 2);
  assert.equal(err, "tiue-runtime: error: --timeout: 0.001 seconds were over\n");
});
