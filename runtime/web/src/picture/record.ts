/**
 * The record of a picture: everything that made it, as one JSON object and as webui's `parameters` text.
 *
 * Fields, their order and both texts are those of runtime/tiue_runtime/record.py. No field holds a path of this computer.
 */
const FORMAT = 1;

/** How one picture was made. */
export interface Record {
  bundle: string; // the bundle's name
  bundle_sha256: string; // of bundle.json, which lists the sha256 of all files
  steps: number; // N, the decoder's timesteps
  height: number; // pixels
  width: number;
  memory: string; // the mode in which the decoder ran
  vae: string; // the kind of image decoder
  variant: string; // the bundle's graphs that ran
  device: string; // where they ran
  provider: string; // ONNX Runtime's name of the provider
  versions: { [name: string]: string }; // of tiue-runtime and of ONNX Runtime's package
  prompt?: string;
  seed?: bigint; // of this picture
  threads?: number; // if the caller set them
  prompts: number; // prompts of the request, which ran as one batch
  num_images: number; // pictures of each prompt
  index: number; // of this picture in the request, prompt-major, from 0
  pixels_sha256?: string; // of the RGB bytes, row by row, as made
}

const ORDER: (keyof Record)[] = [
  "bundle",
  "bundle_sha256",
  "steps",
  "height",
  "width",
  "memory",
  "vae",
  "variant",
  "device",
  "provider",
  "versions",
  "prompt",
  "seed",
  "threads",
  "prompts",
  "num_images",
  "index",
  "pixels_sha256",
];

/** Return a record as one line of JSON in ASCII, without the fields that are absent. */
export function toJson(record: Record): string {
  const present = ORDER.filter((name) => record[name] !== undefined);
  return json({ format: FORMAT, ...Object.fromEntries(present.map((name) => [name, record[name]])) });
}

/** Return the text that webui writes into pictures, and that tools around it read. */
export function parameters(record: Record): string {
  const values: [string, string | undefined][] = [
    ["Steps", String(record.steps)],
    ["Seed", record.seed?.toString()],
    ["Size", `${record.width}x${record.height}`],
    ["Model", record.bundle],
    ["Model hash", record.bundle_sha256.slice(0, 10)],
    ["VAE", record.vae],
    ["Version", `tiue-runtime ${record.versions["tiue-runtime"] ?? ""}`],
  ];
  const pairs = values.flatMap(([name, value]) => (value === undefined ? [] : [`${name}: ${quoted(value)}`]));
  // NUL cannot stand in a text chunk. The JSON has it as an escape.
  return `${(record.prompt ?? "").replace(/\0/g, "\ufffd").toWellFormed()}\n${pairs.join(", ")}`;
}

/** Quote a value of `parameters` as webui does. */
function quoted(value: string): string {
  return /[,:\n]/.test(value) ? JSON.stringify(value) : value;
}

/** Write JSON as Python's json.dumps does: a space after each comma and colon, and escapes beyond ASCII. */
function json(value: unknown): string {
  if (typeof value === "bigint") return value.toString();
  if (Array.isArray(value)) return `[${value.map(json).join(", ")}]`;
  if (typeof value === "object" && value !== null) {
    return `{${Object.entries(value)
      .map(([key, one]) => `${json(key)}: ${json(one)}`)
      .join(", ")}}`;
  }
  return JSON.stringify(value).replace(
    /[\u007f-\uffff]/g,
    (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}
