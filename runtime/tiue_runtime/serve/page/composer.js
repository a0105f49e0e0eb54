/** The form: what to draw. */

const COUNTS = [1, 2, 4, 8];
const LARGEST_SEED = 2n ** 64n - 1n;

const at = (id) => document.getElementById(id);

/** Reads and fills the form. */
export class Composer {
  /**
   * @param {{draw: Function, cancel: Function}} actions what the large button does
   */
  constructor(actions) {
    this.busy = false;
    at("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.busy) actions.cancel();
      else actions.draw();
    });
    at("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || composes(event)) return;
      event.preventDefault();
      if (!this.busy) actions.draw();
    });
    document.addEventListener("keydown", (event) => {
      const cancels = event.key === "Escape" && this.busy && !composes(event);
      if (cancels && !document.querySelector("dialog[open]")) actions.cancel();
    });
    // The second click of a double one would cancel.
    at("draw").addEventListener("click", (event) => { if (event.detail > 1) event.preventDefault(); });
  }

  /** Offer what a model can do. What was chosen stays, if the model can do it. */
  offer(facts) {
    const chosen = at("size").selectedIndex > 0 && facts.sizes.includes(at("size").value);
    const size = chosen ? at("size").value : facts.sizes[0];
    const count = document.querySelector("#counts input:checked")?.value;
    at("size").replaceChildren(...facts.sizes.map((size) => new Option(size)));
    at("examples").replaceChildren(...facts.examples.map((example) => chip(example)));
    at("examples").hidden = facts.examples.length === 0;
    const legend = at("counts").querySelector("legend");
    at("counts").replaceChildren(legend, ...COUNTS.filter((count) => count <= facts.most_pictures).map(radio));
    at("size").value = size;
    document.querySelectorAll("#counts input").forEach((input) => { input.checked ||= input.value === count; });
  }

  /**
   * Return the wish that the form holds.
   *
   * @throws {Error} a field is wrong; it has the focus
   */
  read() {
    const prompt = at("prompt").value.trim();
    const seed = at("seed").value.trim();
    const n = Number(document.querySelector("#counts input:checked").value);
    if (!prompt) throw refused("prompt", "Say what the picture shows, for example: a red heart");
    const largest = LARGEST_SEED - BigInt(n) + 1n; // Picture j has seed + j.
    if (seed && (!/^\d+$/.test(seed) || BigInt(seed) > largest)) {
      throw refused("seed", `The seed is a whole number from 0 to ${largest}.`);
    }
    return { prompt, n, size: at("size").value, seed: seed ? String(BigInt(seed)) : null };
  }

  /** Fill the form, so that it draws one certain picture. */
  fill({ prompt, seed, size }) {
    at("prompt").value = prompt;
    at("seed").value = seed;
    if (![...at("size").options].some((option) => option.value === size)) at("size").append(new Option(size));
    at("size").value = size;
    document.querySelector("#counts input").checked = true;
  }

  /** Let the large button draw or cancel. */
  setBusy(busy) {
    this.busy = busy;
    at("draw").textContent = busy ? "Cancel" : "Draw";
  }
}

/** Say whether a key belongs to an input method that composes text. Safari tells by the code of the last key. */
function composes(event) {
  return event.isComposing || event.keyCode === 229;
}

function refused(id, message) {
  at(id).focus();
  return new Error(message);
}

function chip(example) {
  const item = document.createElement("li");
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: example });
  button.addEventListener("click", () => {
    at("prompt").value = example;
    at("prompt").focus();
  });
  item.append(button);
  return item;
}

function radio(count) {
  const label = document.createElement("label");
  const facts = { type: "radio", name: "count", value: count, checked: count === 1 };
  const text = Object.assign(document.createElement("span"), { textContent: count });
  label.append(Object.assign(document.createElement("input"), facts), text);
  return label;
}
