// The process that draws. It has the model, and answers the messages of messages.js.
import { Cancelled, Pipeline } from "tiue-runtime";

/** Serve a port: {on("message", ({data}) => ...), postMessage}. Returns a promise of the pipeline, or null. */
export function serve(port, bundle) {
  const say = (message) => port.postMessage(message);
  const loading = Pipeline.load(bundle, { device: "cpu", onWarning: () => {} }).catch((error) => {
    say({ kind: "failed", message: error.message });
    return null;
  });
  let drawing = { id: null, controller: new AbortController() };

  const draw = async ({ id, prompt, seed }) => {
    drawing.controller.abort(); // The new request replaces the one that runs.
    const controller = new AbortController();
    drawing = { id, controller };
    const pipeline = await loading;
    if (!pipeline) return;
    try {
      const onProgress = (progress) => {
        const preview = progress.preview();
        say({ kind: "progress", id, fraction: progress.fraction, preview: preview && pixels(preview) });
      };
      const result = await pipeline(prompt, { seed, onProgress, signal: controller.signal });
      const [picture] = result.images;
      const { timings, warnings } = result;
      say({ kind: "done", id, picture: pixels(picture), png: await picture.png(), seconds: timings.total, warnings });
    } catch (error) {
      if (error instanceof Cancelled) say({ kind: "cancelled", id });
      else say({ kind: "failed", id, message: error.message });
    }
  };

  const answers = {
    hello: async () => {
      const pipeline = await loading;
      if (pipeline) say({ kind: "ready", examples: pipeline.manifest.prompts?.examples ?? [] });
    },
    draw,
    cancel: ({ id }) => {
      if (id === drawing.id) drawing.controller.abort();
    },
  };
  port.on("message", ({ data }) => void answers[data.kind](data));
  say({ kind: "listening" });
  return loading;
}

const pixels = ({ width, height, data }) => ({ width, height, data });

if (process.parentPort) void serve(process.parentPort, process.argv[2]);
