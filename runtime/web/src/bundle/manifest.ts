/**
 * The content of bundle.json. Its types and the checks of single values are generated from the JSON schema of the
 * Python runtime. The schema cannot say how values relate to each other. These relations are checked here.
 */
import { BundleError, clip, shorten } from "../errors.js";
import type { Manifest } from "../generated/manifest.js";
import { validate } from "../generated/validate_manifest.js";
import { parseJson } from "./strict_json.js";

export type { Manifest } from "../generated/manifest.js";

export const FORMAT = 1;
export const MANIFEST = "bundle.json";
export const TOKENIZER = "tokenizer.json";
export const MANIFEST_LIMIT = 16 * 2 ** 20; // bytes of bundle.json
export const REMEDY = "Export the bundle again, or download it again.";

export const TEXT_ENCODER = "text_encoder";
export const UNET_ENCODER = "unet_encoder";
export const UNET_DECODER = "unet_decoder";
export const VAE_DECODER = "vae_decoder";
export const SAFETY_CHECKER = "safety_checker";
export const UPSCALER = "upscaler";
const GRAPHS = [TEXT_ENCODER, UNET_ENCODER, UNET_DECODER, VAE_DECODER];
const OPTIONAL = [SAFETY_CHECKER, UPSCALER] as const; // graphs that this package does not run

/** One problem that the generated check found, in the form of ajv. */
interface Problem {
  instancePath: string;
  keyword: string;
  params: Record<string, unknown>;
  schema: unknown;
  parentSchema: Record<string, unknown>;
  data: unknown;
  propertyName?: string; // if the problem is a key
}

/** Read the bytes of bundle.json. Throws BundleError. */
export function readManifest(data: Uint8Array): Manifest {
  return remedied(() => {
    if (data.length > MANIFEST_LIMIT) {
      throw new BundleError(`expected at most ${MANIFEST_LIMIT} bytes, got ${data.length}`);
    }
    const content = parseJson(data);
    require(isObject(content), MANIFEST, "an object", content);
    const version = (content as Record<string, unknown>)["format"];
    require(Number.isInteger(version), "format", "an integer", version);
    if ((version as number) > FORMAT) throw new NewerFormat(version as number);
    const check = validate as unknown as { (value: unknown): boolean; errors: Problem[] | null };
    const [problem] = check(content) ? [] : (check.errors ?? []);
    if (problem) throw new BundleError(describe(problem));
    const manifest = content as Manifest;
    checkRelations(manifest);
    return manifest;
  });
}

class NewerFormat extends BundleError {
  constructor(version: number) {
    super(
      `format: this tiue-runtime reads ${FORMAT}, got ${version}: written by a newer tiue; install a newer tiue-runtime`,
    );
  }
}

function remedied(read: () => Manifest): Manifest {
  try {
    return read();
  } catch (error) {
    if (!(error instanceof BundleError) || error instanceof NewerFormat) throw error;
    throw new BundleError(`${error.message}. ${REMEDY}`, { cause: error });
  }
}

/** Say in one line what the generated check expected and what arrived. */
function describe({ instancePath, keyword, params, schema, parentSchema, data, propertyName }: Problem): string {
  const parts = instancePath.split("/").slice(1);
  const names = parts.map((part) => part.replaceAll("~1", "/").replaceAll("~0", "~"));
  const where = clip(names.reduce((path, name) => join(path, name), "")) || MANIFEST;
  if (keyword === "required")
    return `missing field ${clip(join(parts.length ? where : "", String(params["missingProperty"])))}`;
  if (keyword === "additionalProperties") {
    return `unknown field ${clip(join(parts.length ? where : "", String(params["additionalProperty"])))}`;
  }
  const got = `got ${shorten(data)}`;
  if (propertyName !== undefined) {
    return `${where}: expected step counts as keys, for example '4', got ${shorten(propertyName)}`;
  }
  if (keyword === "enum") return `${where}: expected one of ${(schema as unknown[]).join(", ")}, ${got}`;
  if (keyword === "const") return `${where}: expected ${String(schema)}, ${got}`;
  if (keyword === "type") return `${where}: expected ${article(String(schema))}, ${got} (${typeName(data)})`;
  if (keyword === "pattern") {
    return `${where}: expected ${String(schema).includes("u0000") ? "printable characters" : String(schema)}, ${got}`;
  }
  const least =
    parentSchema["minimum"] ?? parentSchema["minLength"] ?? parentSchema["minItems"] ?? parentSchema["minProperties"];
  const most =
    parentSchema["maximum"] ?? parentSchema["maxLength"] ?? parentSchema["maxItems"] ?? parentSchema["maxProperties"];
  if (keyword === "minimum" || keyword === "maximum") {
    const bounds = [least === undefined ? "" : `>= ${String(least)}`, most === undefined ? "" : `<= ${String(most)}`];
    return `${where}: expected a number ${bounds.filter(Boolean).join(" and ")}, ${got}`;
  }
  const unit = keyword.endsWith("Length") ? "characters" : keyword.endsWith("Items") ? "items" : "entries";
  const size = isObject(data) ? Object.keys(data as object).length : (data as string | unknown[]).length;
  return `${where}: expected ${String(least)} to ${String(most)} ${unit}, got ${size}`;
}

function join(path: string, name: string): string {
  if (/^\d+$/.test(name) && path) return `${path}[${name}]`;
  return path ? `${path}.${name}` : name;
}

function article(type: string): string {
  return { integer: "an integer", object: "an object", array: "a list" }[type] ?? `a ${type}`;
}

function typeName(value: unknown): string {
  return value === null ? "null" : Array.isArray(value) ? "list" : typeof value;
}

function isObject(value: unknown): boolean {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function require(condition: boolean, where: string, expected: string, received: unknown): void {
  if (!condition) throw new BundleError(`${clip(where)}: expected ${expected}, got ${shorten(received)}`);
}

/** Check values against each other, as `Manifest` of the Python runtime does. */
function checkRelations(manifest: Manifest): void {
  checkSizes(manifest);
  checkSchedules(manifest);
  checkVariants(manifest);
  checkOptionalGraphs(manifest);
  checkFiles(manifest);
  const vaes = manifest.vaes ?? ["kl"];
  require(new Set(vaes).size === vaes.length, "vaes", "different kinds", vaes);
  const known = graphsOf(manifest);
  for (const [variant, graphs] of Object.entries(manifest.memory ?? {})) {
    require(variant in
      manifest.variants, "memory", `variants among ${Object.keys(manifest.variants).join(", ")}`, variant);
    for (const graph of Object.keys(graphs)) {
      require(known.includes(graph), `memory.${variant}`, `graphs among ${known.join(", ")}`, graph);
    }
  }
  const rows = manifest.preview?.matrix.length ?? manifest.latent_channels;
  require(rows === manifest.latent_channels, "preview.matrix", `${manifest.latent_channels} rows`, rows);
}

function checkSizes(manifest: Manifest): void {
  const { pixels_per_latent: scale, size_multiple: multiple } = manifest;
  require(multiple % scale === 0, "size_multiple", `a multiple of pixels_per_latent (${scale})`, multiple);
  const sizes: [string, number][] = [
    ["default_height", manifest.default_height],
    ["default_width", manifest.default_width],
    ...(manifest.sizes ?? []).flatMap((pair, i) =>
      pair.map((size, j): [string, number] => [`sizes[${i}][${j}]`, size]),
    ),
  ];
  for (const [name, size] of sizes) {
    require(size > 0 && size % multiple === 0, name, `a positive multiple of size_multiple (${multiple})`, size);
  }
}

function checkSchedules(manifest: Manifest): void {
  const rows = manifest.decoder_timesteps;
  require(new Set(rows).size === rows.length, "decoder_timesteps", "distinct timesteps", rows);
  for (const [steps, { timesteps, step_weights: weights }] of Object.entries(manifest.schedules)) {
    const where = `schedules.${steps}`;
    const fits = timesteps.length === Number(steps) && weights.length === Number(steps);
    const lengths = `${timesteps.length} and ${weights.length}`;
    require(fits, where, `${steps} timesteps and ${steps} step_weights`, lengths);
    const decreasing = timesteps.every((t, i) => i === 0 || t < (timesteps[i - 1] ?? 0));
    require(decreasing, `${where}.timesteps`, "decreasing timesteps", timesteps);
    const absent = timesteps.filter((t) => !rows.includes(t));
    require(absent.length === 0, `${where}.timesteps`, "timesteps of decoder_timesteps", absent);
  }
  const known = Object.keys(manifest.schedules).join(", ");
  const fits = String(manifest.default_steps) in manifest.schedules;
  require(fits, "default_steps", `a step count of schedules (${clip(known)})`, manifest.default_steps);
}

function checkVariants(manifest: Manifest): void {
  const expected = graphsOf(manifest);
  const variants = Object.entries(manifest.variants);
  require(variants.length > 0, "variants", "a variant such as 'portable'", "none");
  for (const [variant, graphs] of variants) {
    const found = Object.keys(graphs).sort();
    const same = found.join() === [...expected].sort().join();
    require(same, `variants.${variant}`, `the graphs ${expected.join(", ")}`, found);
    for (const [graph, name] of Object.entries(graphs)) {
      const fits = isPortable(name) && name.endsWith(".onnx");
      require(fits, `variants.${variant}.${graph}`, "a file name inside the bundle that ends in .onnx", name);
    }
  }
}

function checkOptionalGraphs(manifest: Manifest): void {
  const known = graphsOf(manifest);
  for (const graph of OPTIONAL) {
    const about = manifest[graph];
    const expected = `an object if variants have the graph ${graph}, else none`;
    require(known.includes(graph) === (about !== undefined), graph, expected, about ?? "none");
  }
  const { resize, crop } = manifest.safety_checker ?? { resize: 0, crop: 0 };
  require(crop <= resize, "safety_checker.crop", `at most safety_checker.resize (${resize})`, crop);
}

function checkFiles(manifest: Manifest): void {
  const names = Object.keys(manifest.files);
  for (const name of names) {
    require(isPortable(name), "files", "names relative to the bundle, with '/', that every system can store", name);
  }
  const folded = [...names, MANIFEST].map((name) => name.normalize("NFC").toLowerCase());
  const twice = names.filter((_, i) => folded.indexOf(folded[i] ?? "") !== folded.lastIndexOf(folded[i] ?? ""));
  require(twice.length === 0, "files", "names that differ by more than capitals, without bundle.json", twice);
  const needed = [TOKENIZER, ...Object.values(manifest.variants).flatMap((graphs) => Object.values(graphs))];
  for (const name of needed) require(name in manifest.files, "files", `an entry for ${clip(name)}`, names);
}

const RESERVED = /^(con|prn|aux|nul|com[0-9\u00b9\u00b2\u00b3]|lpt[0-9\u00b9\u00b2\u00b3])(\..*)?$/i;

/** Say whether a file name stays inside the bundle and can be stored on every system. */
function isPortable(name: string): boolean {
  if (name.length > 1000 || /[\\:*?"<>|\x00-\x1f\x7f]/.test(name)) return false;
  return name.split("/").every((part) => {
    const bytes = new TextEncoder().encode(part).length;
    return !["", ".", ".."].includes(part) && !/[. ]$/.test(part) && !RESERVED.test(part) && bytes <= 255;
  });
}

/** Return every graph of a variant: the four, further image decoders, the safety checker and the upscaler, if any. */
export function graphsOf(manifest: Manifest): string[] {
  const variants = Object.values(manifest.variants);
  const optional = OPTIONAL.filter((graph) => variants.some((graphs) => graph in graphs));
  return [...new Set([...GRAPHS, ...Object.values(vaeGraphs(manifest)), ...optional])];
}

/** Return the graph of each kind of image decoder. The first kind is the default. */
export function vaeGraphs(manifest: Manifest): Record<string, string> {
  const kinds = manifest.vaes ?? ["kl"];
  return Object.fromEntries(kinds.map((kind, i) => [kind, i ? `${VAE_DECODER}_${kind}` : VAE_DECODER]));
}

export interface Schedule {
  rows: number[]; // step_index of each timestep: rows of decoder_timesteps
  noiseWeight: number; // w_0
  stepWeights: number[]; // w_1 .. w_N
}

/** Return the schedule of a step count, which the manifest has. */
export function scheduleOf(manifest: Manifest, steps: number): Schedule {
  const schedule = manifest.schedules[String(steps)];
  if (!schedule) throw new BundleError(`schedules: expected ${steps} steps`);
  const rows = schedule.timesteps.map((t) => manifest.decoder_timesteps.indexOf(t));
  return { rows, noiseWeight: schedule.noise_weight, stepWeights: schedule.step_weights };
}
