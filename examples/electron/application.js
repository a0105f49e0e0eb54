// The window, and the process that draws. It gets Electron as an argument, so that tests can stand in for it.
import { fileURLToPath } from "node:url";
import { checkMessage } from "./messages.js";

const path = (name) => fileURLToPath(new URL(name, import.meta.url));
export const PAGE = new URL("page/index.html", import.meta.url).href;
export const CHANNEL = "artist";

/** Start the application. `bundle` is the directory of the model. */
export async function start({ app, BrowserWindow, ipcMain, utilityProcess }, bundle) {
  app.enableSandbox();
  app.on("window-all-closed", () => app.quit());
  await app.whenReady();
  const window = new BrowserWindow({
    width: 560,
    height: 840,
    title: "Draw",
    webPreferences: { preload: path("preload.cjs"), contextIsolation: true, sandbox: true, nodeIntegration: false },
  });
  closeDoors(window);
  const artist = new Artist(utilityProcess, bundle, (message) => {
    if (!window.isDestroyed()) window.webContents.send(CHANNEL, message);
  });
  ipcMain.on(CHANNEL, (event, message) => {
    const trusted = event.senderFrame?.url === PAGE;
    if (trusted && checkMessage(message)) artist.tell(message);
  });
  app.on("will-quit", () => artist.end());
  await window.loadURL(PAGE); // loadFile would write a path with % in another way.
  return window;
}

/** The page stays where it is, opens no windows, and has no permissions. */
function closeDoors({ webContents }) {
  webContents.setWindowOpenHandler(() => ({ action: "deny" }));
  webContents.on("will-navigate", (event) => event.preventDefault());
  webContents.session.setPermissionRequestHandler((_contents, _permission, answer) => answer(false));
}

/** The process of artist.js. If it ends, the next message starts another. */
class Artist {
  #process = null;
  #waiting = null; // messages for a process that has not said yet that it listens
  #ending = false;

  constructor(utilityProcess, bundle, onMessage) {
    this.fork = () => utilityProcess.fork(path("artist.js"), [bundle], { serviceName: "artist" });
    this.onMessage = onMessage;
  }

  tell(message) {
    if (this.#ending) return;
    this.#process ??= this.#start();
    if (this.#waiting) this.#waiting.push(message);
    else this.#process.postMessage(message);
  }

  end() {
    this.#ending = true;
    this.#process?.kill();
  }

  #start() {
    const started = this.fork();
    this.#waiting = [];
    started.on("message", (message) => {
      if (message.kind !== "listening") return this.onMessage(message);
      for (const early of this.#waiting ?? []) started.postMessage(early);
      this.#waiting = null;
    });
    started.on("exit", (code) => {
      this.#process = null;
      if (!this.#ending) this.onMessage({ kind: "failed", message: `The drawing process ended with code ${code}.` });
    });
    return started;
  }
}
