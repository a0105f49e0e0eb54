// The application without Electron: BUNDLE=... node --test
import assert from "node:assert/strict";
import { EventEmitter, on } from "node:events";
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { Pipeline } from "tiue-runtime";
import { CHANNEL, PAGE, start } from "../application.js";
import { serve } from "../artist.js";
import { checkMessage } from "../messages.js";
import { FakeElectron, runPreload } from "./stand_in.mjs";

const PAGE_FRAME = { senderFrame: { url: PAGE } };
const BUNDLE = process.env.BUNDLE;
const electron = new FakeElectron();
const window = await start(electron, BUNDLE);
after(() => electron.app.quit());

const say = (message, event = PAGE_FRAME) => electron.ipcMain.emit(CHANNEL, event, message);
const draw = (id, prompt = "a red heart") => say({ kind: "draw", id, prompt, seed: 1 });

const inbox = on(electron.sent, CHANNEL);

/** Wait for a message of one of some kinds. Returns it, and all before it. */
async function until(...kinds) {
  const before = [];
  for (;;) {
    const [message] = (await inbox.next()).value;
    if (kinds.includes(message.kind)) return { message, before };
    before.push(message);
  }
}

test("the page is isolated, sandboxed, and without node", () => {
  assert.equal(electron.app.sandboxed, true);
  const { contextIsolation, sandbox, nodeIntegration } = window.options.webPreferences;
  assert.deepEqual({ contextIsolation, sandbox, nodeIntegration }, { contextIsolation: true, sandbox: true, nodeIntegration: false });
  assert.equal(window.url, PAGE, "the address that is trusted");
});

test("the page opens no window, goes nowhere, and gets no permission", () => {
  assert.deepEqual(window.openHandler({ url: "https://example.org" }), { action: "deny" });
  let prevented = false;
  window.webContents.emit("will-navigate", { preventDefault: () => (prevented = true) });
  assert.ok(prevented);
  window.permissionHandler(null, "media", (granted) => assert.equal(granted, false));
});

test("only the page is heard, and only what has the form of a message", () => {
  say({ kind: "hello" }, { senderFrame: { url: "https://example.org" } });
  say({ kind: "hello" }, { senderFrame: null });
  for (const message of [null, "hello", {}, { kind: "draw", id: 1 }, { kind: "constructor", id: 1 }]) say(message);
  assert.equal(electron.processes.length, 0);
  const whole = { kind: "draw", id: 1, prompt: "a cat", seed: 1 };
  assert.ok(checkMessage(whole));
  for (const wrong of [{ id: 0.5 }, { prompt: "x".repeat(1001) }, { prompt: 1 }, { seed: -1 }, { kind: "load" }]) {
    assert.ok(!checkMessage({ ...whole, ...wrong }), JSON.stringify(wrong));
  }
});

test("the preload script exposes three functions and nothing of Electron", () => {
  const { exposed, ipcRenderer } = runPreload();
  assert.deepEqual(Object.keys(exposed), ["artist"]);
  assert.deepEqual(Object.keys(exposed.artist).sort(), ["cancel", "draw", "listen"]);
  const heard = [];
  exposed.artist.listen((...words) => heard.push(words));
  ipcRenderer.emit(CHANNEL, { sender: ipcRenderer }, { kind: "ready" });
  assert.deepEqual(heard, [[{ kind: "ready" }]]);
  exposed.artist.draw(1, "a cat", 2);
  exposed.artist.cancel(1);
  assert.ok(ipcRenderer.outgoing.every(([channel, message]) => channel === CHANNEL && checkMessage(message)));
  assert.equal(ipcRenderer.outgoing.length, 3);
});

test("a request gives previews and the runtime's picture", async () => {
  say({ kind: "hello" });
  const { message: ready } = await until("ready", "failed");
  assert.ok(ready.examples.length > 0);
  draw(1);
  const { message, before } = await until("done", "failed");
  const previews = before.filter(({ preview }) => preview);
  assert.ok(previews.length >= 2);
  const pipeline = await Pipeline.load(BUNDLE, { device: "cpu" });
  const expected = (await pipeline("a red heart", { seed: 1 })).images[0];
  await pipeline.dispose();
  assert.deepEqual([...message.picture.data], [...expected.data]);
  assert.deepEqual([...message.png.subarray(1, 4)], [...Buffer.from("PNG")]);
});

test("a request is cancelled by its number, and replaced by the next", async () => {
  // In this process, so that each message arrives while its drawing runs.
  const port = new EventEmitter();
  const answers = on(port, "answer");
  port.postMessage = (message) => port.emit("answer", message);
  const tell = (data) => port.emit("message", { data });
  const onFirstProgress = new Map([
    [2, () => tell({ kind: "draw", id: 3, prompt: "a red heart", seed: 1 })],
    [3, () => [2, 3].forEach((id) => tell({ kind: "cancel", id }))], // 2 is an old one: nothing happens.
  ]);
  port.on("answer", ({ kind, id }) => {
    if (kind !== "progress") return;
    onFirstProgress.get(id)?.();
    onFirstProgress.delete(id);
  });
  serve(port, BUNDLE);
  tell({ kind: "draw", id: 2, prompt: "a red heart", seed: 1 });
  const ends = [];
  for await (const [{ kind, id }] of answers) {
    if (kind === "cancelled" || kind === "done") ends.push(`${kind} ${id}`);
    if (ends.length === 2) break;
  }
  assert.deepEqual(ends.sort(), ["cancelled 2", "cancelled 3"]);
});

test("a wrong request is answered with its reason", async () => {
  say({ kind: "draw", id: 4, prompt: "\ud800", seed: 1 });
  const { message } = await until("failed", "done");
  assert.equal(message.kind, "failed");
  assert.match(message.message, /prompt/);
});

test("a process that dies is reported, and the next request starts another", async () => {
  const count = electron.processes.length;
  electron.processes.at(-1).kill("SIGKILL");
  const { message } = await until("failed");
  assert.match(message.message, /drawing process ended/);
  draw(5);
  assert.equal((await until("done", "failed")).message.kind, "done");
  assert.equal(electron.processes.length, count + 1);
});

/** Start another application. Returns a function that sends a message, and returns the answer that is no progress. */
async function another(bundle) {
  const other = new FakeElectron();
  after(() => other.app.quit());
  await start(other, bundle);
  const answers = on(other.sent, CHANNEL);
  return async (message) => {
    other.ipcMain.emit(CHANNEL, PAGE_FRAME, message);
    for (;;) {
      const [answer] = (await answers.next()).value;
      if (answer.kind !== "progress") return answer;
    }
  };
}

test("a bundle that is none is named, also to a later request", async () => {
  const ask = await another("/nowhere");
  for (const message of [{ kind: "hello" }, { kind: "draw", id: 1, prompt: "a cat", seed: 1 }]) {
    const answer = await ask(message);
    assert.deepEqual([answer.kind, answer.id], ["failed", message.id]);
    assert.match(answer.message, /nowhere is not a bundle/);
  }
});

test("a bundle without a matrix for previews is drawn without", async () => {
  const folder = mkdtempSync(join(tmpdir(), "bundle-"));
  after(() => rmSync(folder, { recursive: true }));
  cpSync(BUNDLE, folder, { recursive: true });
  const { preview, ...manifest } = JSON.parse(readFileSync(join(folder, "bundle.json"), "utf8"));
  assert.ok(preview);
  writeFileSync(join(folder, "bundle.json"), JSON.stringify(manifest));
  const ask = await another(folder);
  const answer = await ask({ kind: "draw", id: 1, prompt: "a red heart", seed: 1 });
  assert.equal(answer.kind, "done", answer.message);
});
