// The process that draws. It has the model, and answers the messages of messages.js.
import { Cancelled, Pipeline } from "tiue-runtime";

/** Serve a port: {on("message", ({data}) => ...), postMessage}. */
export function serve(port, bundle) {
  const say = (message) => port.postMessage(message);
  const fail = ({ message }, id) => say({ kind: "failed", id, message });
  const loading = Pipeline.load(bundle, { device: "cpu" });
  loading.catch(() => {}); // Each message that needs the pipeline is answered with the error.
  let drawing = { id: null, controller: new AbortController() };

  const draw = async ({ id, prompt, seed }) => {
    drawing.controller.abort(); // The new request replaces the one that runs.
    const controller = new AbortController();
    drawing = { id, controller };
    try {
      const pipeline = await loading;
      const onProgress = (progress) => {
        const preview = pipeline.manifest.preview ? progress.preview() : null;
        say({ kind: "progress", id, fraction: progress.fraction, preview: preview && pixels(preview) });
      };
      const result = await pipeline(prompt, { seed, onProgress, signal: controller.signal });
      const [picture] = result.images;
      const { timings, warnings } = result;
      say({ kind: "done", id, picture: pixels(picture), png: await picture.png(), seconds: timings.total, warnings });
    } catch (error) {
      if (error instanceof Cancelled) say({ kind: "cancelled", id });
      else fail(error, id);
    }
  };

  const answers = {
    hello: () =>
      loading.then(({ manifest }) => say({ kind: "ready", examples: manifest.prompts?.examples ?? [] }), fail),
    draw,
    cancel: ({ id }) => {
      if (id === drawing.id) drawing.controller.abort();
    },
  };
  port.on("message", ({ data }) => void answers[data.kind](data));
  say({ kind: "listening" });
}

const pixels = ({ width, height, data }) => ({ width, height, data });

if (process.parentPort) serve(process.parentPort, process.argv[2]);
