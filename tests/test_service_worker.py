"""The service worker of the page in examples/web, and the code that waits for it, without a browser."""

import shutil
import subprocess
from pathlib import Path

import pytest

WEB = Path(__file__).parents[1] / "examples" / "web"

pytestmark = pytest.mark.skipif(not shutil.which("node"), reason="Node is not installed")

BEGINNING = """
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import vm from "node:vm";
const read = (name) => readFileSync(`${process.argv[1]}/${name}`, "utf8");
"""

WORKERS = """
const kept = new Set();
const cache = {
  match: async () => undefined,
  put: async () => { throw new DOMException("full", "QuotaExceededError"); },
};
const caches = {
  open: async (name) => (kept.add(name), cache),
  keys: async () => [...kept],
  delete: async (name) => kept.delete(name),
};

/** Start a version of the service worker in a folder of a host. Returns what it does for an event. */
function start(folder, version) {
  const listeners = {};
  const addEventListener = (name, act) => (listeners[name] = act);
  const self = { registration: { scope: `https://host${folder}` }, addEventListener };
  const others = { clients: { claim: async () => {} }, location: { origin: "https://host" }, console: { warn() {} } };
  const network = { fetch: async () => new Response("engine"), URL, Response, Headers };
  const code = read("offline.js").replace("development", version);
  vm.runInNewContext(code, { self, caches, ...others, ...network });
  return async (name) => {
    let done;
    const hear = (promise) => (done = promise);
    const request = { method: "GET", url: `https://host${folder}lib/engine.wasm` };
    listeners[name]({ request, waitUntil: hear, respondWith: hear });
    return done;
  };
}

for (const [folder, version] of [["/a/", "1"], ["/b/", "1"], ["/a/", "2"]]) {
  const answer = await start(folder, version)("fetch");
  assert.equal(await answer.text(), "engine", "a storage that is full");
}
assert.equal(kept.size, 3);
await start("/a/", "2")("activate");
assert.equal(kept.size, 2, "the other folder keeps its files, and the older version of this one does not");
"""

WAITING = """
const worker = Object.assign(new EventTarget(), { state: "installing" });
const serviceWorker = { register: async () => ({ installing: worker, active: null }), ready: new Promise(() => {}) };
const warnings = [];
const globals = { navigator: { serviceWorker }, console: { warn: (text) => warnings.push(text) } };
const going = vm.runInNewContext(`${read("service.js").replace("export ", "")};underServiceWorker()`, globals);
setImmediate(() => {
  worker.state = "redundant";
  worker.dispatchEvent(new Event("statechange"));
});
assert.equal(await going, true, "the page goes on");
assert.deepEqual(warnings, ["The page will need the network: its files cannot be kept"]);
"""


@pytest.mark.parametrize("program", [WORKERS, WAITING])
def test_a_full_storage_and_other_folders_of_the_host(program):
    command = ["node", "--input-type=module", "--eval", BEGINNING + program, WEB]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
