/** Chromium with the package in a page. */
import { fileURLToPath } from "node:url";
import { build } from "esbuild";
import { chromium, type Browser } from "playwright-core";
import { EMOJI, PACKAGE, TINY } from "../shared.js";
import { TestServer } from "./server.js";

const STATIC = `${PACKAGE}/dist/static`;

/** Start a server with the package, ONNX Runtime's files and two bundles. */
export async function startServer(): Promise<TestServer> {
  const inside = `${PACKAGE}/dist/tests/inside`;
  await build({
    entryPoints: [fileURLToPath(new URL("./inside.js", import.meta.url))],
    outdir: inside,
    bundle: true,
    format: "esm",
    platform: "browser",
    conditions: ["onnxruntime-web-use-extern-wasm"],
    splitting: true,
    logLevel: "warning",
  });
  return TestServer.start({
    inside,
    static: STATIC,
    ort: `${PACKAGE}/node_modules/onnxruntime-web/dist`,
    tiny: TINY,
    emoji: EMOJI,
  });
}

/** Start Debian's Chromium, or the browser that the environment variable CHROMIUM names. */
export function startBrowser(...flags: string[]): Promise<Browser> {
  return chromium.launch({
    executablePath: process.env["CHROMIUM"] ?? "/usr/bin/chromium",
    args: [
      "--no-sandbox",
      "--disable-quic",
      "--no-first-run",
      "--disable-background-networking",
      "--disable-component-update",
      "--disable-sync",
      "--host-resolver-rules=MAP insecure.test 127.0.0.1",
      ...flags,
    ],
  });
}
