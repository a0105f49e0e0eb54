// Gives a process of Node what Electron gives to utility processes: process.parentPort.
import { EventEmitter } from "node:events";

process.parentPort = Object.assign(new EventEmitter(), { postMessage: (message) => process.send(message) });
process.on("message", (data) => process.parentPort.emit("message", { data }));
process.on("disconnect", () => process.exit());
