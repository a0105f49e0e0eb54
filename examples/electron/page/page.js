// The page knows only `window.artist`, which preload.cjs made.
const [form, prompt, draw, cancel, examples, canvas, progress, status, save] = [
  "form",
  "prompt",
  "draw",
  "cancel",
  "examples",
  "picture",
  "progress",
  "status",
  "save",
].map((id) => document.getElementById(id));

let current = 0; // the number of the request whose messages count
let drawn = "";

function show({ width, height, data }) {
  Object.assign(canvas, { width, height });
  canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(data), width, height), 0, 0);
}

function finish(message) {
  const focused = document.activeElement === cancel;
  draw.hidden = false;
  cancel.hidden = true;
  if (focused) draw.focus();
  progress.value = 0;
  status.textContent = message;
}

const answers = {
  ready({ examples: words }) {
    draw.disabled = false;
    prompt.value ||= words[0] ?? "";
    examples.replaceChildren(...words.map((word) => new Option(word)));
    status.textContent = "Ready.";
  },
  progress({ fraction, preview }) {
    progress.value = fraction;
    if (preview) show(preview);
  },
  done({ picture, png, seconds, warnings }) {
    show(picture);
    canvas.setAttribute("aria-label", `A picture of: ${drawn}`);
    URL.revokeObjectURL(save.href);
    save.href = URL.createObjectURL(new Blob([png], { type: "image/png" }));
    save.hidden = false;
    finish([`Drawn in ${seconds.toFixed(1)} s.`, ...warnings].join(" "));
  },
  cancelled: () => finish("Cancelled."),
  failed({ message }) {
    draw.disabled = false; // The next request starts a process that died while it loaded the model.
    finish(message);
  },
};

form.addEventListener("submit", (event) => {
  event.preventDefault();
  current += 1;
  drawn = prompt.value;
  draw.hidden = true;
  cancel.hidden = false;
  cancel.focus();
  status.textContent = "Drawing …";
  window.artist.draw(current, drawn, crypto.getRandomValues(new Uint32Array(1))[0]);
});
cancel.addEventListener("click", () => window.artist.cancel(current));
window.artist.listen((message) => {
  if (message.id === undefined || message.id === current) answers[message.kind](message);
});
