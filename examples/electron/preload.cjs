// The only thing that the page gets: three functions. It never sees ipcRenderer, node or Electron.
const { contextBridge, ipcRenderer } = require("electron");

const CHANNEL = "artist";

contextBridge.exposeInMainWorld("artist", {
  draw: (id, prompt, seed) => ipcRenderer.send(CHANNEL, { kind: "draw", id, prompt, seed }),
  cancel: (id) => ipcRenderer.send(CHANNEL, { kind: "cancel", id }),
  listen: (onMessage) => {
    ipcRenderer.on(CHANNEL, (_event, message) => onMessage(message));
    ipcRenderer.send(CHANNEL, { kind: "hello" });
  },
});
