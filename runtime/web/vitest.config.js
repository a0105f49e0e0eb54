import { fileURLToPath } from "node:url";
import { defineConfig } from "vitest/config";

const here = (path) => fileURLToPath(new URL(path, import.meta.url));

// The tests in Node run the sources. Those in Chromium run from dist, by node:test: Vite replaces `import()` also in
// functions that go to the page, where its replacement does not exist.
export default defineConfig({
  resolve: { alias: { "#platform": here("src/platform/node.ts") } },
  test: {
    include: ["tests/*.test.ts"],
    reporters: ["dot"],
    testTimeout: 60_000,
    hookTimeout: 60_000,
  },
});
