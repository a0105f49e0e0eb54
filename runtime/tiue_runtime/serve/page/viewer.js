/** The dialog that shows one picture. */

/** Shows a picture, and what made it. */
export class Viewer {
  /**
   * @param {HTMLDialogElement} dialog
   * @param {{repeat: Function, forget: Function, address: Function}} actions each takes the picture
   */
  constructor(dialog, actions) {
    this.dialog = dialog;
    this.actions = actions;
    this.picture = null;
    const on = (name, act) => this.part(name).addEventListener("click", act);
    on("close", () => dialog.close());
    on("repeat", () => { dialog.close(); actions.repeat(this.picture); });
    on("delete", () => { dialog.close(); actions.forget(this.picture); });
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  }

  /** Show a picture. */
  show(picture) {
    this.picture = picture;
    const address = this.actions.address(picture);
    this.part("picture").src = address;
    this.part("picture").alt = picture.prompt;
    this.part("prompt").textContent = picture.prompt;
    const facts = { Seed: picture.seed, Size: picture.size, Model: picture.model, Made: day(picture.made) };
    this.part("facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [
      element("dt", name), element("dd", value),
    ]));
    this.part("download").href = address;
    this.part("download").download = fileName(picture);
    this.dialog.showModal();
    this.part("download").focus();
  }

  part(name) {
    return document.getElementById(`viewer-${name}`);
  }
}

function fileName(picture) {
  const words = Array.from(picture.prompt.toLowerCase().normalize("NFC").replace(/[^\p{L}\p{N}]+/gu, "-"))
    .slice(0, 60).join("").replace(/^-|-$/g, "");
  return `${words || "picture"}-${picture.seed}.${picture.blob.type.split("/")[1] || "png"}`;
}

function day(milliseconds) {
  return new Date(milliseconds).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

function element(name, text) {
  return Object.assign(document.createElement(name), { textContent: text });
}
