/** The command `generate`: pictures of a prompt in files. */
import { existsSync, statSync } from "node:fs";
import { rename, rm, writeFile } from "node:fs/promises";
import { extname } from "node:path";
import { getSystemErrorMap } from "node:util";
import { Cancelled, clip, firstCharacters, firstLine, RequestError } from "../errors.js";
import { Pipeline } from "../pipeline.js";
import type { Arguments } from "./flags.js";

const LONGEST_NAME = 60; // characters of a prompt in a file name, as in Python
const LONGEST_WAIT = 2 ** 31 - 1; // milliseconds that Node can wait
const SHOWN = 300; // characters of a path in a message

/** Run the command. Throws errors of the pipeline, and of the file system. */
export async function generate(
  given: Arguments,
  signal: AbortSignal,
  say: (text: string) => void,
  onWarning: (message: string) => void,
): Promise<void> {
  await checkPicturePath(given.out ?? "picture.png"); // before time is spent on a picture
  const pipe = await Pipeline.load(given.bundle, { ...given.loading, onWarning, signal });
  const late =
    given.timeout === undefined ? null : AbortSignal.timeout(Math.min(Math.ceil(given.timeout * 1000), LONGEST_WAIT));
  let result;
  try {
    result = await pipe(given.prompt, { ...given.request, signal: late ? AbortSignal.any([signal, late]) : signal });
  } catch (error) {
    if (!(error instanceof Cancelled) || !late?.aborted || signal.aborted) throw error;
    throw new Cancelled(`timeout: ${given.timeout ?? 0} seconds were over`, { cause: error });
  }
  const first = given.out ?? newName(given.prompt, result.seeds[0] ?? 0n, result.images.length);
  for (const [i, image] of result.images.entries()) {
    const path = numbered(first, i, result.images.length);
    await replaceFile(path, await image.png({ metadata: given.metadata, aiMark: given.aiMark }));
    const seed = result.seeds[i] ?? 0n;
    const { width, height } = image;
    const row = JSON.stringify({ path, width, height, seed: "SEED", prompt: given.prompt }).replace(
      '"SEED"',
      String(seed),
    );
    say(given.json ? row : `${path}  ${width}x${height}  seed ${seed}`);
  }
  if (!given.json) say(`${(result.timings["total"] ?? 0).toFixed(2)} s on ${result.device}, without loading`);
  await pipe.dispose();
}

/** Throw RequestError unless a picture can be saved to `path`. */
async function checkPicturePath(path: string): Promise<void> {
  const shown = clip(path, SHOWN);
  if (extname(path).toLowerCase() !== ".png") {
    throw new RequestError(`out: expected a file name that ends in .png, got '${shown}'`);
  }
  if (existsSync(path) && statSync(path).isDirectory()) {
    throw new RequestError(`out: expected a file name, but ${shown} is a directory`);
  }
  try {
    await writeFile(partOf(path), "");
    await rm(partOf(path));
  } catch (error) {
    throw cannotWrite(path, error);
  }
}

function cannotWrite(path: string, error: unknown): RequestError {
  const [, known] = getSystemErrorMap().get((error as NodeJS.ErrnoException).errno ?? 0) ?? [];
  const problem = known ? known.charAt(0).toUpperCase() + known.slice(1) : firstLine(error);
  return new RequestError(`out: cannot write ${clip(path, SHOWN)}: ${problem}`, { cause: error });
}

/** Name the files of several pictures: heart.png for one, heart-1.png, heart-2.png and so on for more. */
function numbered(path: string, index: number, count: number): string {
  if (count === 1) return path;
  const ending = extname(path);
  const number = String(index + 1).padStart(String(count).length, "0");
  return `${path.slice(0, path.length - ending.length)}-${number}${ending}`;
}

/** Return the words of a text as a part of a file name: "A red heart!" => "a-red-heart". */
function slug(text: string): string {
  const words = text
    .toLowerCase()
    .normalize("NFC")
    .replace(/[^\p{L}\p{N}]+/gu, "-");
  const characters = Array.from(firstCharacters(words, LONGEST_NAME).replace(/^-+|-+$/g, "") || "picture");
  while (Buffer.byteLength(characters.join("")) > 2 * LONGEST_NAME) characters.pop(); // File systems count bytes.
  return characters.join("");
}

/** Return a file name that no file has: a-red-heart-1.png, or a-red-heart-1-again-2.png if that exists. */
function newName(prompt: string, seed: bigint, count: number): string {
  const words = slug(prompt);
  for (let again = 1; ; again++) {
    const path = `${words}-${seed}${again > 1 ? `-again-${again}` : ""}.png`;
    if (!Array.from({ length: count }, (_, i) => numbered(path, i, count)).some(existsSync)) return path;
  }
}

/** Write a file whole or not at all. Throws RequestError if that fails. */
async function replaceFile(path: string, data: Uint8Array): Promise<void> {
  try {
    await writeFile(partOf(path), data);
    await rename(partOf(path), path);
  } catch (error) {
    await rm(partOf(path), { force: true }).catch(() => undefined);
    throw cannotWrite(path, error);
  }
}

/** Name the temporary file beside a file. */
function partOf(path: string): string {
  return `${path}.${process.pid}.part`;
}
