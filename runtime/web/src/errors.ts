/** The exceptions of this package, for problems that the caller can fix. They are of the same kinds as Python's. */

/** Characters of a value in a message. As in Python, a pair of surrogates is one character. */
export const SHOWN = 100;
const LONGEST = 1000;

/** Base of every error that this package throws on purpose. Its message is always one line. */
export class TiueError extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(cut(printable(firstCharacters(message, LONGEST + 1)), LONGEST), options);
  }

  // Written out in each class, because minifiers change the names of classes.
  override readonly name: string = "TiueError";
}

/** A bundle is missing, damaged, of another format, or breaks its contract. */
export class BundleError extends TiueError {
  override readonly name: string = "BundleError";
}

/** The requested device, or ONNX Runtime itself, cannot be used as installed. */
export class DeviceError extends TiueError {
  override readonly name: string = "DeviceError";
}

/** An argument of a request is wrong. */
export class RequestError extends TiueError {
  override readonly name: string = "RequestError";
}

/** The request was asked to stop. `cause` is the reason of the AbortSignal. */
export class Cancelled extends TiueError {
  override readonly name: string = "Cancelled";
}

/** A graph failed while running, or computed values that are not finite. */
export class InferenceError extends TiueError {
  override readonly name: string = "InferenceError";
}

/** There was not enough memory to load a graph, or to run it on the smallest part of the request. */
export class OutOfMemoryError extends InferenceError {
  override readonly name: string = "OutOfMemoryError";
}

const KINDS = { TiueError, BundleError, DeviceError, RequestError, Cancelled, InferenceError, OutOfMemoryError };

/** An error as plain data, to send it from a worker to its page. */
export interface SentError {
  kind: string;
  message: string;
  stack: string | undefined;
}

export function toSent(error: unknown): SentError {
  const known = error instanceof Error ? error : new Error(String(error));
  return { kind: known.name, message: known.message, stack: known.stack };
}

export function fromSent({ kind, message, stack }: SentError): Error {
  const Kind = KINDS[kind as keyof typeof KINDS] as typeof TiueError | undefined;
  const error = Kind ? new Kind(message) : Object.assign(new Error(message), { name: kind });
  if (stack !== undefined) error.stack = stack;
  return error;
}

// Phrases of exhausted allocators, in lower case: the C++ library, ONNX Runtime's arena, CUDA, WebAssembly, WebGPU.
const EXHAUSTED = [
  "bad_alloc",
  "bad allocation",
  "cannot allocate memory",
  "failed to allocate memory",
  "smaller than requested bytes",
  "bfcarena",
  "bytes of memory",
  "out of memory",
  "memory allocation failed",
  "array buffer allocation failed",
  "invalid typed array length",
  "cudaerrormemoryallocation",
  "_alloc_failed",
];

/** Say whether an exception of JavaScript or ONNX Runtime means that memory ran out. */
export function isOutOfMemory(error: unknown): boolean {
  const said = String(error instanceof Error ? error.message : error).toLowerCase();
  return error instanceof OutOfMemoryError || EXHAUSTED.some((phrase) => said.includes(phrase));
}

/** Return an OutOfMemoryError in place of an allocation of JavaScript that failed, and any other error as it is. */
export function asOutOfMemory(error: unknown, message: string): unknown {
  const failed = !(error instanceof TiueError) && isOutOfMemory(error);
  return failed ? new OutOfMemoryError(message, { cause: error }) : error;
}

/** Return the first line of an error's message, for a message of ours. */
export function firstLine(error: unknown): string {
  const said = error instanceof Error ? error.message : String(error);
  return clip(said.trim().split("\n", 1)[0] ?? "", 300);
}

/** Show a value in a message: one line of at most SHOWN characters. */
export function shorten(value: unknown): string {
  return clip(shown(value));
}

/** Return text for a message: one line of at most `most` printable characters. */
export function clip(text: string, most: number = SHOWN): string {
  return cut(
    printable(
      firstCharacters(text, 4 * most)
        .split(/\s+/)
        .filter(Boolean)
        .join(" "),
    ),
    most,
  );
}

function shown(value: unknown): string {
  if (typeof value === "string") return `'${firstCharacters(value, 4 * SHOWN)}'`;
  if (typeof value === "bigint" || typeof value === "number") return String(value);
  if (typeof value === "function") return `function ${value.name}`;
  try {
    return JSON.stringify(value) ?? String(value);
  } catch {
    return "a value that cannot be shown";
  }
}

/** Control characters, halves of surrogate pairs, and marks that change the direction of text. */
const UNPRINTABLE = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;

function printable(text: string): string {
  return text.replace(UNPRINTABLE, (one) => {
    const code = one.codePointAt(0) ?? 0;
    const [letter, digits] = code < 0x100 ? ["x", 2] : code < 0x10000 ? ["u", 4] : ["U", 8];
    return `\\${letter}${code.toString(16).padStart(digits, "0")}`;
  });
}

function cut(text: string, most: number): string {
  return firstCharacters(text, most) === text ? text : `${firstCharacters(text, most - 3)}...`;
}

/** Return the beginning of a text. It counts characters as Python does, not halves of surrogate pairs. */
export function firstCharacters(text: string, most: number): string {
  if (text.length <= most) return text;
  return Array.from(text.slice(0, 2 * most))
    .slice(0, most)
    .join("");
}
