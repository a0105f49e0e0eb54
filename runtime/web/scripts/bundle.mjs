// Writes dist/static/: this package for pages without a bundler. Beside these files, a page needs the .mjs and .wasm files
// of onnxruntime-web.
import { rm } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const root = fileURLToPath(new URL("..", import.meta.url));
await rm(`${root}dist/static`, { recursive: true, force: true });
await build({
  entryPoints: { "tiue-runtime": `${root}dist/src/index.js`, worker: `${root}dist/src/worker/worker.js` },
  outdir: `${root}dist/static`,
  bundle: true,
  splitting: true, // onnxruntime-web is fetched for the chosen device only
  format: "esm",
  platform: "browser",
  conditions: ["onnxruntime-web-use-extern-wasm"], // threads start from files of their own
  minify: true,
  target: "es2022",
  chunkNames: "[name]-[hash]",
  logLevel: "warning",
});
