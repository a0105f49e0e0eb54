// Stands in for Electron: the same names and events, with processes of Node.
import { fork } from "node:child_process";
import { EventEmitter } from "node:events";
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import vm from "node:vm";

const here = (name) => fileURLToPath(new URL(name, import.meta.url));

export class FakeElectron {
  app = Object.assign(new EventEmitter(), {
    sandboxed: false,
    enableSandbox: () => (this.app.sandboxed = true),
    whenReady: async () => {},
    quit: () => this.app.emit("will-quit"),
  });
  ipcMain = new EventEmitter();
  processes = [];
  utilityProcess = { fork: (file, words) => this.#fork(file, words) };
  /** Receives what the page gets. */
  sent = new EventEmitter();
  BrowserWindow;

  constructor() {
    const sent = this.sent;
    this.BrowserWindow = class {
      constructor(options) {
        this.options = options;
        this.webContents = Object.assign(new EventEmitter(), {
          send: (channel, message) => sent.emit(channel, message),
          setWindowOpenHandler: (handler) => (this.openHandler = handler),
          session: { setPermissionRequestHandler: (handler) => (this.permissionHandler = handler) },
        });
      }
      async loadURL(url) {
        this.url = url;
      }
      isDestroyed() {
        return false;
      }
    };
  }

  #fork(file, words) {
    const child = fork(file, words, { execArgv: ["--import", here("parent_port.mjs")], serialization: "advanced" });
    child.postMessage = (message) => child.send(message);
    this.processes.push(child);
    return child;
  }
}

/** Run preload.cjs. Returns what the page gets, and what it sends. */
export function runPreload() {
  const exposed = {};
  const ipcRenderer = new EventEmitter();
  ipcRenderer.outgoing = [];
  ipcRenderer.send = (channel, message) => ipcRenderer.outgoing.push([channel, message]);
  const contextBridge = { exposeInMainWorld: (name, value) => (exposed[name] = value) };
  const file = here("../preload.cjs");
  const real = createRequire(file);
  const given = (name) => (name === "electron" ? { contextBridge, ipcRenderer } : real(name));
  vm.runInThisContext(`(require) => {${readFileSync(file, "utf8")}}`)(given);
  return { exposed, ipcRenderer };
}
