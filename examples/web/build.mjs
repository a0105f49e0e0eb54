// Writes the page as static files: node build.mjs OUT [BUNDLE]. The package in runtime/web must have been built.
import { createHash } from "node:crypto";
import { cpSync, existsSync, mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const root = join(here, "..", "..");
const [out, bundle = join(root, "models/emoji/tiue_emoji")] = process.argv.slice(2);
const packed = join(root, "runtime/web/dist/static");
const onnxRuntime = join(root, "runtime/web/node_modules/onnxruntime-web/dist");
const PAGE = ["index.html", "page.css", "page.js", "pictures.js", "service.js", "icon.svg", "manifest.webmanifest"];
// For the processor, and for WebGPU. A browser fetches the one that it uses.
const ENGINES = ["ort-wasm-simd-threaded", "ort-wasm-simd-threaded.asyncify"];

if (!out) fail("expected a directory to write: node build.mjs OUT [BUNDLE]");
if (!existsSync(packed)) fail(`${packed} is missing: run npm install and npm run build in runtime/web`);
if (!existsSync(join(bundle, "bundle.json"))) fail(`${bundle} is not a bundle: expected a file bundle.json in it`);

rmSync(join(out, "lib"), { recursive: true, force: true });
mkdirSync(join(out, "lib"), { recursive: true });
for (const name of PAGE) cpSync(join(here, name), join(out, name));
cpSync(packed, join(out, "lib"), { recursive: true });
for (const name of ENGINES.flatMap((engine) => [`${engine}.mjs`, `${engine}.wasm`])) {
  cpSync(join(onnxRuntime, name), join(out, "lib", name));
}
const { files } = JSON.parse(readFileSync(join(bundle, "bundle.json"), "utf8"));
for (const name of ["bundle.json", ...Object.keys(files)]) cpSync(join(bundle, name), join(out, "model", name));

// The service worker keeps these files at once. It keeps an engine when the page has asked for it.
const kept = [...PAGE, ...readdirSync(packed).map((name) => `lib/${name}`)];
const all = [...kept, ...ENGINES.map((engine) => `lib/${engine}.wasm`)];
const hash = createHash("sha256");
for (const name of all) hash.update(readFileSync(join(out, name)));
const worker = readFileSync(join(here, "offline.js"), "utf8")
  .replace('["./"]; // build.mjs puts the page\'s files here,', `${JSON.stringify(["./", ...kept])};`)
  .replace('"development"; // and a hash of them here.', `"${hash.digest("hex").slice(0, 16)}";`);
if (worker.includes("development")) fail("offline.js has changed: its first lines no longer have the expected form");
writeFileSync(join(out, "offline.js"), worker);
console.log(`${out}: serve it with any static server, for example: python -m http.server -d ${out}`);

function fail(problem) {
  console.error(`build.mjs: error: ${problem}`);
  process.exit(2);
}
