// The pictures of a request, and those of earlier ones.
const MOST_EARLIER = 14;

/** Show a picture on a canvas. */
function paint(canvas, picture) {
  Object.assign(canvas, { width: picture.width, height: picture.height });
  canvas.getContext("2d").putImageData(picture.toImageData(), 0, 0);
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** Fill a list with blank pictures. Returns functions that show previews and results in them. */
export function blankPictures(list, count, prompt) {
  const canvases = Array.from({ length: count }, (_, i) => {
    const canvas = element("canvas", { width: 64, height: 64, role: "img" });
    canvas.setAttribute("aria-label", `Picture ${i + 1} of ${count}, not drawn yet: ${prompt}`);
    return canvas;
  });
  list.replaceChildren(...canvases.map((canvas) => element("li", {}, canvas)));
  list.hidden = false;
  const show = (i, picture) => paint(canvases[i], picture);
  const finish = (i, picture) => {
    show(i, picture);
    canvases[i].setAttribute("aria-label", `Picture ${i + 1} of ${count}: ${prompt}`);
    const save = element("button", { type: "button", textContent: "Save" });
    save.setAttribute("aria-label", `Save picture ${i + 1}`);
    save.addEventListener("click", () => void download(picture, `${fileName(prompt)}-${picture.record.seed}.png`));
    canvases[i].after(save);
  };
  return { show, finish };
}

/** Put the first picture of a request before earlier ones. A click on it calls `onChoose`. */
export async function remember(list, picture, prompt, onChoose) {
  const image = element("img", { src: URL.createObjectURL(await picture.toBlob()), alt: `Draw again: ${prompt}` });
  const button = element("button", { type: "button", title: prompt }, image);
  button.addEventListener("click", onChoose);
  list.prepend(element("li", {}, button));
  while (list.children.length > MOST_EARLIER) {
    URL.revokeObjectURL(list.lastElementChild.querySelector("img").src);
    list.lastElementChild.remove();
  }
}

async function download(picture, name) {
  const href = URL.createObjectURL(await picture.toBlob());
  element("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}

function fileName(prompt) {
  const words = prompt.toLowerCase().normalize("NFC").replace(/[^\p{L}\p{N}]+/gu, "-");
  return Array.from(words).slice(0, 60).join("").replace(/^-|-$/g, "") || "picture";
}
