/** The page: it connects the form, the server and the gallery. */

import { ApiError, describeModel, draw, listModels, useKey } from "./api.js";
import { Composer } from "./composer.js";
import { Gallery } from "./gallery.js";
import { readRecord } from "./record.js";
import { readNote, writeNote } from "./store.js";
import { Viewer } from "./viewer.js";

const THEMES = ["auto", "light", "dark"];

const at = (id) => document.getElementById(id);

let models = [];
let model = null;  // null: what the server can draw is not known, or not any more
let choosing = Promise.resolve();  // of the last choice of a model
let drawing = null;  // the AbortController of the request that runs

const composer = new Composer({ draw: drawForm, cancel: () => drawing?.abort() });
const gallery = new Gallery(
  { list: at("gallery"), count: at("gallery-count"), empty: at("empty"), more: at("more"), clear: at("clear") },
  (picture) => viewer.show(picture),
);
const viewer = new Viewer(at("viewer"), {
  repeat: (picture) => repeat({ ...picture, bundle: picture.model }),
  forget: (picture) => attempt(() => gallery.forget(picture)),
  address: (picture) => gallery.address(picture),
});

/** Show a message above the gallery, or none. */
function tell(message, isNote = false) {
  at("notice").textContent = message;
  at("notice").classList.toggle("note", isNote);
}

/** Do something, and show what went wrong. */
async function attempt(act) {
  tell("");
  try {
    await act();
  } catch (error) {
    if (error.name === "AbortError") return;
    if (error instanceof ApiError && error.status === 401) askForKey();
    if (error instanceof ApiError && [0, 404].includes(error.status)) model = null;  // Another server may come.
    tell(error.message || String(error));
  }
}

/** Ask the server what it can draw. */
async function connect() {
  const chosen = at("model-choice").value;
  models = await listModels();
  at("models").hidden = models.length < 2;
  at("model-choice").replaceChildren(...models.map((name) => new Option(name)));
  await choose(models.includes(chosen) ? chosen : models[0]);
  at("key-form").hidden = true;
}

/** Draw with a model from now on. The last choice counts, whichever answer comes first. */
function choose(name) {
  at("model-choice").value = name;
  const mine = describeModel(name).then(
    (facts) => { if (choosing === mine) use(name, facts); },
    (error) => {
      if (choosing === mine) {
        at("model-choice").value = model ?? name;
        choosing = Promise.resolve();
      }
      throw error;
    },
  );
  choosing = mine;
  return mine;
}

function use(name, facts) {
  model = name;
  at("model").textContent = models.length < 2 ? `${name} on ${facts.device}` : `on ${facts.device}`;
  composer.offer(facts);
}

function askForKey() {
  at("key-form").hidden = false;
  at("key").focus();
}

function drawForm() {
  return attempt(async () => {
    if (model === null) await connect();
    await choosing;
    if (!drawing) await drawWish({ model, ...composer.read() });
  });
}

/** Make a picture again, from what is known of it. */
function repeat({ prompt, seed, size, steps, bundle }) {
  return attempt(async () => {
    refuseTwo();
    if (model === null) await connect();
    if (!models.includes(bundle)) {
      throw new Error(`The picture was made with the model ${bundle}. This server has ${models.join(", ")}.`);
    }
    if (bundle !== at("model-choice").value) await choose(bundle);
    await choosing;
    refuseTwo();
    composer.fill({ prompt, seed, size });
    scrollTo({ top: 0 });
    await drawWish({ model: bundle, prompt, n: 1, size, seed, steps });
  });
}

function refuseTwo() {
  if (drawing) throw new Error("Wait until this drawing is done, or cancel it first.");
}

async function drawWish(wish) {
  const plates = gallery.addPlates(wish.n, wish.prompt);
  const left = new Set(plates);
  const notes = new Set();
  let allKept = true;
  drawing = new AbortController();
  composer.setBusy(true);
  at("status").textContent = wish.n === 1 ? "Drawing a picture." : `Drawing ${wish.n} pictures.`;
  try {
    for await (const { done, index, blob, seed, facts } of draw(wish, drawing.signal)) {
      if (!done) {
        plates[index].show(blob);
        continue;
      }
      const { prompt, size, steps = null } = wish;
      const picture = { blob, prompt, seed, size, steps, model: wish.model, made: Date.now() };
      left.delete(plates[index]);
      facts.warnings?.forEach((warning) => notes.add(warning));
      await gallery.finish(plates[index], picture).catch((error) => {
        allKept = false;
        notes.add(notKept(error));
      });
      if (notes.size) tell([...notes].join(" "), allKept);
    }
    at("status").textContent = wish.n === 1 ? "The picture is finished." : `${wish.n} pictures are finished.`;
  } catch (error) {
    at("status").textContent = error.name === "AbortError" ? "The drawing was cancelled." : "";
    throw error;
  } finally {
    left.forEach((plate) => gallery.drop(plate));
    composer.setBusy(false);
    drawing = null;
  }
}

function notKept(error) {
  const full = error.name === "QuotaExceededError";
  const why = full ? "its storage is full. Delete some." : `${error.message || error.name}.`;
  return `This browser does not keep the picture: ${why} Download what you need.`;
}

function repeatFile(file) {
  return attempt(async () => {
    const record = await readRecord(file);
    await repeat({ ...record, size: `${record.width}x${record.height}` });
  });
}

/** Let a button go through the themes: the browser's setting, light and dark. The choice is remembered. */
function chooseTheme(button) {
  let choice = readNote("localStorage", "tiue-theme");
  const show = () => {
    if (!THEMES.includes(choice)) choice = "auto";
    document.documentElement.dataset.theme = choice;
    button.textContent = `Theme: ${choice}`;
  };
  button.addEventListener("click", () => {
    choice = THEMES[(THEMES.indexOf(choice) + 1) % THEMES.length];
    writeNote("localStorage", "tiue-theme", choice);
    show();
  });
  show();
}

/** Show an overlay while a file is dragged over the page, and pass on what is dropped. */
function onDrop(overlay, use) {
  const hasFile = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    overlay.hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) overlay.hidden = true;
  });
  addEventListener("drop", (event) => {
    overlay.hidden = true;
    if (!hasFile(event)) return;
    event.preventDefault();
    use(event.dataTransfer.files[0]);
  });
}

chooseTheme(at("theme"));
onDrop(at("drop"), repeatFile);
at("file").addEventListener("change", () => {
  const [file] = at("file").files;
  at("file").value = "";  // so that the same file can be chosen again
  if (file) repeatFile(file);
});
at("model-choice").addEventListener("change", () => attempt(() => choose(at("model-choice").value)));
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("key").value.trim());
  at("key").value = "";
  attempt(connect);
});
at("more").addEventListener("click", () => attempt(() => gallery.showOlder()));
at("clear").addEventListener("click", () => {
  at("confirm").returnValue = "";  // Escape would leave the answer of the last time.
  at("confirm").showModal();
});
at("confirm").addEventListener("close", () => {
  if (at("confirm").returnValue === "yes") attempt(() => gallery.clear());
});

attempt(connect);
gallery.showOlder().catch(() => tell("This browser does not keep pictures: its storage is closed to this page.", true));
