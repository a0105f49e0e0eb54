/** The gallery: cards of kept pictures, and plates of those that are being drawn. */

import * as store from "./store.js";

const PAGE = 48;  // pictures that are shown at once

/** Shows the pictures of the store in a list. */
export class Gallery {
  /**
   * @param {object} parts elements of the page: list, count, empty, more, clear
   * @param {(picture: import("./store.js").Picture) => void} open shows a picture
   */
  constructor(parts, open) {
    this.parts = parts;
    this.open = open;
    this.cards = new Map();  // picture => its element and the address of its file
    this.oldest = Infinity;
    this.older = null;  // the search for older pictures that runs
  }

  /** Show the newest pictures of the store, or those that follow the ones that are shown. */
  showOlder() {
    this.older ??= this.findOlder().finally(() => { this.older = null; });
    return this.older;
  }

  async findOlder() {
    const { list, more } = this.parts;
    const pictures = await store.listKept(PAGE, this.oldest);
    for (const picture of pictures) list.append(this.card(picture));
    this.oldest = pictures.at(-1)?.id ?? this.oldest;
    const focused = document.activeElement === more;
    await this.tell();
    if (focused && more.hidden && pictures.length) this.cards.get(pictures[0]).element.querySelector("button").focus();
  }

  /** Show plates for pictures that are being drawn, before all others. Returns them. */
  addPlates(count, prompt) {
    const plates = Array.from({ length: count }, () => new Plate(prompt));
    this.parts.list.prepend(...plates.map((plate) => plate.element));
    this.parts.empty.hidden = true;
    return plates;
  }

  /**
   * Put a finished picture in the place of its plate, and keep it.
   *
   * @throws {Error} the browser refuses to keep it; it is shown all the same
   */
  async finish(plate, picture) {
    const card = this.card(picture);
    plate.end(card);
    try {
      picture.id = await store.keep({ ...picture });
    } finally {
      await this.tell();
    }
  }

  /** Remove a plate whose picture was not finished. */
  drop(plate) {
    plate.end();
    this.tell();
  }

  /** Forget a picture. The focus goes to the next one. */
  async forget(picture) {
    if (picture.id !== undefined) await store.forget(picture.id);
    const { element } = this.cards.get(picture);
    const neighbor = element.nextElementSibling ?? element.previousElementSibling;
    this.remove(picture);
    (neighbor?.querySelector("button") ?? document.getElementById("prompt")).focus();
    await this.tell();
  }

  /** Forget all pictures. */
  async clear() {
    if (await store.countKept().catch(() => 0)) await store.forget();
    for (const picture of [...this.cards.keys()]) this.remove(picture);
    document.getElementById("prompt").focus();
    await this.tell();
  }

  /** Return the address of a shown picture's file. */
  address(picture) {
    return this.cards.get(picture).address;
  }

  remove(picture) {
    const { element, address } = this.cards.get(picture);
    element.remove();
    URL.revokeObjectURL(address);
    this.cards.delete(picture);
  }

  card(picture) {
    const element = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `Show ${picture.prompt}, seed ${picture.seed}`);
    button.addEventListener("click", () => this.open(picture));
    const address = URL.createObjectURL(picture.blob);
    button.append(image(address));
    element.append(button, line("words", picture.prompt), line("seed", `seed ${picture.seed}`));
    this.cards.set(picture, { element, address });
    return element;
  }

  /** Say how many pictures there are. */
  async tell() {
    const kept = await store.countKept().catch(() => 0);
    const shown = this.parts.list.childElementCount;
    const count = Math.max(kept, this.cards.size);
    this.parts.count.textContent = count === 1 ? "1 picture" : count ? `${count} pictures` : "";
    this.parts.empty.hidden = shown > 0;
    this.parts.clear.hidden = count === 0;
    this.parts.more.hidden = kept <= [...this.cards.keys()].filter((picture) => picture.id !== undefined).length;
  }
}

/** The place of a picture that is being drawn. It shows previews. */
class Plate {
  constructor(prompt) {
    this.element = document.createElement("li");
    this.plate = Object.assign(document.createElement("div"), { className: "plate" });
    this.previews = 0;
    [this.asked, this.shown] = [0, 0];  // numbers of previews
    this.plate.append(Object.assign(document.createElement("div"), { className: "blank" }));
    this.element.append(this.plate, line("words", prompt), line("seed", "drawing…"));
    this.address = null;
  }

  /** Show a preview, unless a newer one is shown or the picture is finished. */
  async show(blob) {
    const number = ++this.asked;
    const picture = image(URL.createObjectURL(blob));
    await new Promise((resolve) => (picture.onload = picture.onerror = resolve));  // decode() waits for a quiet moment.
    if (number < this.shown) return URL.revokeObjectURL(picture.src);
    if (this.address) URL.revokeObjectURL(this.address);
    [this.shown, this.address] = [number, picture.src];
    this.previews += 1;
    this.plate.dataset.previews = Math.min(this.previews, 3);
    this.plate.replaceChildren(picture);
  }

  /** Leave the page, or give the place to a card. */
  end(card) {
    if (card) this.element.replaceWith(card);
    else this.element.remove();
    if (this.address) URL.revokeObjectURL(this.address);
    [this.shown, this.address] = [Infinity, null];
  }
}

function image(address) {
  return Object.assign(document.createElement("img"), { alt: "", src: address });  // Its prompt stands below it.
}

function line(name, text) {
  return Object.assign(document.createElement("p"), { className: name, textContent: text });
}
