// The page in Chromium, with preload.cjs and the process that draws: CHROMIUM=... BUNDLE=... node --test
import assert from "node:assert/strict";
import { realpathSync } from "node:fs";
import { createRequire } from "node:module";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";
import { CHANNEL, PAGE, start } from "../application.js";
import { FakeElectron, runPreload } from "./stand_in.mjs";

const { CHROMIUM, BUNDLE, SCREENSHOT } = process.env;
const electron = new FakeElectron();
let browser;
let page;
const errors = [];

before(async () => {
  // playwright-core is a development dependency of the runtime, which node_modules links to.
  const runtime = realpathSync(fileURLToPath(new URL("../node_modules/tiue-runtime/package.json", import.meta.url)));
  const { chromium } = createRequire(runtime)("playwright-core");
  await start(electron, BUNDLE);
  const quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
  browser = await chromium.launch({ executablePath: CHROMIUM, args: quiet });
  page = await browser.newPage({ viewport: { width: 560, height: 760 } });
  page.on("pageerror", (error) => errors.push(error.message));
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));

  const { exposed, ipcRenderer } = runPreload();
  const frame = { senderFrame: { url: PAGE } };
  ipcRenderer.send = (channel, message) => electron.ipcMain.emit(channel, frame, message);
  electron.sent.on(CHANNEL, (message) => ipcRenderer.emit(CHANNEL, {}, message));
  await page.exposeFunction("artistDraw", exposed.artist.draw);
  await page.exposeFunction("artistCancel", exposed.artist.cancel);
  await page.exposeFunction("artistListen", () =>
    exposed.artist.listen((message) => void page.evaluate((heard) => window.artistHears(heard), message)),
  );
  await page.addInitScript(() => {
    window.artist = {
      draw: (...words) => window.artistDraw(...words),
      cancel: (...words) => window.artistCancel(...words),
      listen: (onMessage) => {
        window.artistHears = onMessage;
        void window.artistListen();
      },
    };
  });
  await page.goto(PAGE);
});
after(async () => {
  await browser?.close();
  electron.app.quit();
});

const says = (text) => page.getByRole("status").filter({ hasText: text }).waitFor();
const colors = () =>
  page.locator("canvas").evaluate((canvas) => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return new Set(new Uint32Array(data.buffer)).size;
  });

test("a person draws, sees it, and can save it", async () => {
  await says("Ready.");
  await page.getByLabel("What should it show?").fill("a red heart");
  await page.keyboard.press("Enter");
  await says("Drawn in");
  assert.equal(await page.evaluate(() => document.activeElement.id), "draw");
  assert.ok((await colors()) > 20);
  assert.match(await page.getByRole("link", { name: "Save as PNG" }).getAttribute("href"), /^blob:/);
  assert.equal(await page.getByRole("img").getAttribute("aria-label"), "A picture of: a red heart");
  if (SCREENSHOT) await page.screenshot({ path: SCREENSHOT });
});

test("a person cancels, and draws again", async () => {
  // At once, because the picture can be quicker than the hand.
  await page.evaluate(() => ["draw", "cancel"].forEach((id) => document.getElementById(id).click()));
  await says("Cancelled.");
  await page.getByRole("button", { name: "Draw" }).click();
  await says("Drawn in");
});

test("a process that dies before the model is there leaves a form that draws", async () => {
  electron.processes.at(-1).kill("SIGKILL");
  await says("The drawing process ended");
  const count = electron.processes.length;
  await page.reload();
  while (electron.processes.length === count) await page.waitForTimeout(10);
  electron.processes.at(-1).kill("SIGKILL");
  await says("The drawing process ended");
  await page.getByLabel("What should it show?").fill("a red heart");
  await page.keyboard.press("Enter");
  await says("Drawn in");
});

test("nothing was refused or thrown in the page", () => assert.deepEqual(errors, []));
