// The page: it gets the model, and draws.
import { blankPictures, remember } from "./pictures.js";
import { underServiceWorker } from "./service.js";

const BUNDLE = "model";
const COUNT = 4; // pictures of a request
const KEPT = "the model is here"; // in localStorage

const part = (id) => document.getElementById(id);
const status = part("status");
let pipeline;
let drawing = null; // the AbortController of the request that runs

const megabytes = (bytes) => `${Math.round(bytes / 1e6)} MB`;

/** Return localStorage, or undefined in a browser that keeps nothing for this page. */
function storage() {
  try {
    return localStorage;
  } catch {
    return undefined;
  }
}

function complain(error) {
  part("problem").textContent = error.message;
}

function showProgress(fraction) {
  part("progress").hidden = fraction === null;
  part("progress").value = fraction ?? 0;
}

async function load() {
  part("load").disabled = true;
  part("problem").textContent = "";
  status.textContent = "Getting the model …";
  try {
    const { Pipeline } = await import("./lib/tiue-runtime.js");
    pipeline = await Pipeline.load(BUNDLE, {
      wasmPaths: new URL("lib/", location.href),
      onProgress: ({ loaded, total }) => {
        showProgress(loaded / total);
        status.textContent = loaded < total ? `${megabytes(loaded)} of ${megabytes(total)}` : "Preparing the model …";
      },
      onWarning: console.warn,
    });
  } catch (error) {
    part("load").disabled = false;
    part("start").hidden = false;
    status.textContent = "";
    complain(error);
    return;
  } finally {
    showProgress(null);
  }
  try {
    storage()?.setItem(KEPT, "yes");
  } catch (error) {
    console.warn(`The page will ask again: ${error.message}`); // A full storage.
  }
  part("start").hidden = true;
  part("form").hidden = false;
  const { device, threads, manifest } = pipeline;
  part("engine").textContent =
    device === "wasm" ? `Draws on the processor with ${threads} thread${threads === 1 ? "" : "s"}.` : "Draws on the GPU.";
  showIdeas(manifest.prompts?.examples ?? []);
  status.textContent = "Ready.";
  part("prompt").focus();
}

function showIdeas(ideas) {
  const buttons = ideas.map((idea) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: idea });
    button.addEventListener("click", () => {
      part("prompt").value = idea;
      void draw(idea);
    });
    return button;
  });
  part("ideas").replaceChildren(
    ...buttons.map((button) => {
      const item = document.createElement("li");
      item.append(button);
      return item;
    }),
  );
}

/** Show one of the buttons. The focus goes from one to the other. */
function setBusy(busy) {
  const [shown, hidden] = busy ? [part("cancel"), part("draw")] : [part("draw"), part("cancel")];
  const focused = document.activeElement === hidden;
  shown.hidden = false;
  hidden.hidden = true;
  if (focused) shown.focus();
}

/** Draw pictures of a prompt. `seed` is a number, or undefined for new pictures. */
async function draw(prompt, seed) {
  drawing?.abort();
  const controller = new AbortController();
  drawing = controller;
  setBusy(true);
  part("problem").textContent = "";
  status.textContent = "Drawing …";
  const { show, finish } = blankPictures(part("pictures"), COUNT, prompt);
  const current = () => drawing === controller;
  try {
    const result = await pipeline(prompt, {
      numImages: COUNT,
      seed,
      signal: controller.signal,
      onProgress: (progress) => {
        if (!current()) return;
        showProgress(progress.fraction);
        const count = pipeline.manifest.preview && progress.latents ? COUNT : 0;
        for (let i = 0; i < count; i++) show(i, progress.preview(i));
      },
    });
    if (!current()) return;
    result.images.forEach((picture, i) => finish(i, picture));
    status.textContent = [`Drawn in ${result.timings.total.toFixed(1)} s.`, ...result.warnings].join(" ");
    part("earlier").hidden = false;
    await remember(part("history"), result.images[0], prompt, () => {
      part("prompt").value = prompt;
      void draw(prompt, result.seeds[0]);
    });
  } catch (error) {
    if (!current()) return;
    status.textContent = error.name === "Cancelled" ? "Cancelled." : "";
    if (error.name !== "Cancelled") complain(error);
  } finally {
    if (current()) {
      drawing = null;
      setBusy(false);
      showProgress(null);
    }
  }
}

async function showSize() {
  const { files } = await (await fetch(`${BUNDLE}/bundle.json`)).json();
  part("size").textContent = megabytes(Object.values(files).reduce((sum, { size }) => sum + size, 0));
}

part("form").addEventListener("submit", (event) => {
  event.preventDefault();
  void draw(part("prompt").value);
});
part("cancel").addEventListener("click", () => drawing?.abort());
part("load").addEventListener("click", () => void load());

if (await underServiceWorker()) {
  part("load").disabled = false;
  if (storage()?.getItem(KEPT)) {
    part("start").hidden = true;
    await load();
  } else {
    await showSize().catch(complain);
  }
}
