// The main process: npm start -- BUNDLE
import * as electron from "electron";
import { fileURLToPath } from "node:url";
import { start } from "./application.js";

const shipped = fileURLToPath(new URL("../../models/emoji/tiue_emoji", import.meta.url));
const given = process.argv.slice(electron.app.isPackaged ? 1 : 2).find((word) => !word.startsWith("-"));
// Electron is ready only after this module has ended: waiting for `start` here would wait for ever.
void start(electron, given ?? shipped);
