/** Downloads and kept copies that fail in unusual ways, and URLs that are none. */
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { afterEach, beforeEach, test } from "vitest";
import { readManifest, TOKENIZER } from "../src/bundle/manifest.js";
import type { Store } from "../src/bundle/store.js";
import { directoryUrl } from "../src/bundle/url.js";
import { WebSource } from "../src/bundle/web_source.js";
import { BundleError, RequestError } from "../src/index.js";
import { TINY } from "./shared.js";

type Answer = (request: IncomingMessage, response: ServerResponse) => void;

let server: Server;
let url: string;
let answer: Answer;
const files: Answer = (request, response) =>
  void readFile(join(TINY, request.url ?? "")).then((data) => response.end(data));

beforeEach(async () => {
  answer = files;
  server = createServer((request, response) => answer(request, response));
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/`;
});
afterEach(() => {
  server.closeAllConnections();
  server.close();
});

/** A browser's storage in which some operations fail. */
function failing(...operations: (keyof Store)[]): Store {
  const store = {
    read: () => Promise.resolve(0),
    write: () => Promise.resolve(),
    remove: () => Promise.resolve(),
    manifest: () => Promise.resolve(null),
    keepManifest: () => Promise.resolve(),
  };
  const broken = () => Promise.reject(new DOMException("the disk is broken", "UnknownError"));
  return Object.assign(store, Object.fromEntries(operations.map((name) => [name, broken]))) as unknown as Store;
}

async function fetched(store: Store | null): Promise<{ bytes: number; warnings: string[] }> {
  const warnings: string[] = [];
  const source = new WebSource(url, { onWarning: (message) => warnings.push(message) }, store);
  const manifest = readManifest(await source.manifest());
  const info = manifest.files[TOKENIZER];
  assert.ok(info);
  const { length } = await source.read(TOKENIZER, info);
  assert.equal(length, info.size);
  await source.complete(manifest);
  return { bytes: length, warnings };
}

const FAILING: [(keyof Store)[], RegExp[]][] = [
  [["read"], [/^tokenizer\.json: the copy that this browser kept is damaged; it is downloaded again$/]],
  [["write"], [/^this browser's storage fails: the disk is broken\. The model works/]],
  [
    ["read", "remove"],
    [/is damaged; it is downloaded again$/, /^this browser's storage fails/],
  ],
  [["manifest"], [/^this browser's storage fails/]],
  [["keepManifest"], [/^this browser's storage fails/]],
];

for (const [operations, expected] of FAILING) {
  test(`a storage whose ${operations.join(" and ")} fails costs a warning, and the file arrives`, async () => {
    const { warnings } = await fetched(failing(...operations));
    assert.equal(warnings.length, expected.length, warnings.join("; "));
    expected.forEach((pattern, i) => assert.match(warnings[i] ?? "", pattern));
  });
}

test("a kept bundle.json that is damaged is replaced", async () => {
  const store = Object.assign(failing(), { manifest: () => Promise.resolve(new TextEncoder().encode("{")) });
  assert.deepEqual((await fetched(store)).warnings, []);
});

test("without an answer and with a storage that fails, the missing answer is reported", async () => {
  answer = (_, response) => response.destroy();
  await assert.rejects(new WebSource(url, {}, failing("manifest")).manifest(), /^BundleError: .*: cannot be fetched: /);
});

for (const status of [301, 403, 404, 416, 429]) {
  test(`status ${status} for a file is an error that names the file`, async () => {
    answer = (request, response) => {
      if (request.url === "/bundle.json") return files(request, response);
      response.writeHead(status).end();
    };
    await assert.rejects(fetched(null), (error) => {
      assert.ok(error instanceof BundleError);
      return /tokenizer\.json: .*(the server answered \d+|cannot be fetched)/.test(error.message);
    });
  });
}

test("a page in place of bundle.json is named", async () => {
  answer = (_, response) => response.end("<!doctype html>");
  const source = new WebSource(url, {}, null);
  const data = await source.manifest();
  assert.throws(() => readManifest(data), /^BundleError: expected JSON, but /);
});

test("URLs of directories are made absolute", () => {
  assert.equal(directoryUrl("bundle", "https://example.org/page/index.html"), "https://example.org/page/bundle");
  assert.equal(directoryUrl("https://example.org/heart/?#"), "https://example.org/heart/");
});

for (const [given, message] of [
  ["https://[", /got 'https:\/\/\['$/],
  ["bundle", /got 'bundle'$/],
  ["https://anna:secret@example.org/", /got one with a user name or a password, which fetch refuses$/],
  ["https://anna:secret@[", /got 'https:\/\/\.\.\.@\['$/],
  ["https://example.org/?token=1", /got one with a query \(\?\): 'https:\/\/example\.org\/\?token=1'$/],
  ["https://example.org/#part", /got one with a fragment \(#\)/],
] as const) {
  test(`refuses ${given} as the URL of a bundle`, () => {
    assert.throws(
      () => directoryUrl(given),
      (error) => {
        assert.ok(error instanceof RequestError);
        assert.match(error.message, /^bundle: expected the URL of a bundle's directory, /);
        assert.match(error.message, message);
        return !error.message.includes("secret");
      },
    );
  });
}
