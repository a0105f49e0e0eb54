/** The flags of the command line, each written once. */
import { parseArgs } from "node:util";
import { firstLine, RequestError, shorten } from "../errors.js";
import { camel, DEVICES, lessonFor, MEMORY, type LoadOptions, type RequestOptions } from "../options.js";

type Kind = "integer" | "seed" | "seconds" | "text" | "switch";

interface Flag {
  name: string; // of the option in the library
  kind: Kind;
  help: string;
  short?: string;
}

export const OPTIONS: Flag[] = [
  {
    name: "bundle",
    kind: "text",
    help: "the bundle's directory or URL (default: the environment variable TIUE_BUNDLE)",
  },
  {
    name: "out",
    kind: "text",
    short: "o",
    help: "file to save, .png; with several pictures, FILE-1.png, FILE-2.png, ... (default: a new file named after the prompt and the seed)",
  },
  { name: "numImages", kind: "integer", help: "pictures; image j uses seed + j (default: 1)" },
  { name: "seed", kind: "seed", help: "0 <= seed < 2**64; the same seed gives the same picture (default: a new one)" },
  { name: "steps", kind: "integer", help: "a step count of the bundle (default: the bundle's)" },
  { name: "height", kind: "integer", help: "pixels, a multiple of the bundle's size_multiple (default: the bundle's)" },
  { name: "width", kind: "integer", help: "pixels, a multiple of the bundle's size_multiple (default: the bundle's)" },
  { name: "memory", kind: "text", help: `${MEMORY.join(", ")} (default: auto)` },
  { name: "timeout", kind: "seconds", help: "seconds after which the request is cancelled" },
  {
    name: "device",
    kind: "text",
    help: `${DEVICES.join(", ")}; a device requested by name is never replaced (default: auto)`,
  },
  { name: "vae", kind: "text", help: "kl: the full image decoder; tiny: a small, fast one (default: the bundle's)" },
  { name: "variant", kind: "text", help: "the bundle's graphs to run (default: the best for the device)" },
  { name: "threads", kind: "integer", help: "threads of a graph (default: all cores; 1 for wasm)" },
  { name: "json", kind: "switch", help: "print a JSON object per picture, for programs" },
  { name: "noMetadata", kind: "switch", help: "do not save how the picture was made" },
  { name: "noAiMark", kind: "switch", help: 'do not mark the file as "made by AI"' },
  { name: "help", kind: "switch", short: "h", help: "show this text" },
];

export interface Arguments {
  prompt: string;
  bundle: string;
  out: string | undefined;
  timeout: number | undefined;
  json: boolean;
  metadata: boolean;
  aiMark: boolean;
  request: RequestOptions;
  loading: LoadOptions;
}

/** Turn numImages into --num-images. */
export function flag(name: string): string {
  return `--${name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`;
}

const LINES = OPTIONS.map(({ name, kind, short, help }) => {
  const value = kind === "switch" ? "" : ` ${kind === "text" ? "VALUE" : "N"}`;
  return `  ${short ? `-${short}, ` : ""}${flag(name)}${value}\n      ${help}`;
});

export const HELP = `usage: tiue-runtime generate PROMPT [flags]

Make images from text with a TiUE bundle, offline.

${LINES.join("\n")}
  --version
      show the version

Start with: tiue-runtime generate a red heart --bundle DIRECTORY`;

/** Parse a command and its words. Returns null if help is asked for. Throws RequestError. */
export function parse(command: string, words: string[]): Arguments | null {
  if (command !== "generate") {
    throw new RequestError(`expected the command generate, got ${shorten(command)} (see tiue-runtime --help)`);
  }
  refuseLessons(words);
  const { values, positionals } = split(words);
  if (values["help"]) return null;
  const given = Object.fromEntries(
    OPTIONS.flatMap(({ name, kind }) => {
      const value = values[flag(name).slice(2)];
      return value === undefined ? [] : [[name, convert(name, kind, value)]];
    }),
  );
  const { bundle = process.env["TIUE_BUNDLE"], out, timeout, json, noMetadata, noAiMark, ...others } = given;
  const { device, vae, variant, threads, memory, ...request } = others;
  const prompt = positionals.join(" ");
  if (!prompt)
    throw new RequestError("prompt: expected a description of the picture, got none (see tiue-runtime --help)");
  if (!bundle) throw new RequestError("bundle: expected a directory or a URL, or the environment variable TIUE_BUNDLE");
  return {
    prompt,
    bundle: String(bundle),
    out: out as string | undefined,
    timeout: timeout as number | undefined,
    json: json === true,
    metadata: noMetadata !== true,
    aiMark: noAiMark !== true,
    request: request as RequestOptions,
    loading: { device, vae, variant, threads, memory } as LoadOptions,
  };
}

interface Split {
  values: { [name: string]: string | boolean | undefined };
  positionals: string[];
}

function split(words: string[]): Split {
  const options = Object.fromEntries(
    OPTIONS.map(({ name, kind, short }) => [
      flag(name).slice(2),
      { type: kind === "switch" ? ("boolean" as const) : ("string" as const), ...(short ? { short } : {}) },
    ]),
  );
  // parseArgs takes -1 for a flag.
  const args: string[] = [];
  for (const word of words) {
    if (/^-\d/.test(word) && args.at(-1)?.startsWith("--")) args.push(`${args.pop() ?? ""}=${word}`);
    else args.push(word);
  }
  try {
    return parseArgs({ args, options, allowPositionals: true }) as Split;
  } catch (error) {
    const [problem] = firstLine(error).split(". ");
    throw new RequestError(`${problem ?? ""} (see tiue-runtime --help)`, { cause: error });
  }
}

/** Refuse flags that people from diffusers may try, with a sentence that teaches. */
function refuseLessons(words: string[]): void {
  for (const word of words) {
    const [, name] = /^--([a-z-]+)/.exec(word) ?? [];
    const option = (name ?? "").replaceAll("-", "_");
    const lesson = OPTIONS.some((known) => known.name === camel(option)) ? undefined : lessonFor(option);
    if (lesson) throw new RequestError(`--${name ?? ""}: ${lesson}`);
  }
}

function convert(name: string, kind: Kind, value: string | boolean): unknown {
  if (typeof value === "boolean" || kind === "text") return value;
  const wrong = (expected: string): RequestError =>
    new RequestError(`${name}: expected ${expected}, got ${shorten(value)}`);
  if (kind === "seconds") {
    const seconds = Number(value);
    if (!(seconds > 0 && seconds < Infinity)) throw wrong("a number of seconds above 0");
    return seconds;
  }
  if (!/^[+-]?\d{1,40}$/.test(value)) throw wrong("an integer");
  return kind === "seed" ? BigInt(value) : Number(value);
}
