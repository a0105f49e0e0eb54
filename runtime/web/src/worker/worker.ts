/** The worker of a page: it holds the graphs, so that the page never freezes. */
import { toSent } from "../errors.js";
import { openHere } from "../platform/browser_engine.js";
import type { Engine } from "../sampling/engine.js";
import type { FromWorker, SentOptions, ToWorker } from "./messages.js";

const page = self as unknown as {
  name: string;
  postMessage(message: FromWorker, transfer?: Transferable[]): void;
  onmessage: ((event: MessageEvent<ToWorker>) => void) | null;
};
let engine: Engine | undefined;
const running = new Map<number, AbortController>();

async function load(url: string, options: SentOptions): Promise<void> {
  try {
    engine = await openHere(url, {
      ...options,
      onProgress: (progress) => page.postMessage({ type: "loading", progress }),
      onWarning: (message) => page.postMessage({ type: "warning", id: null, message }),
    });
    page.postMessage({ type: "loaded", info: engine.info });
  } catch (error) {
    page.postMessage({ type: "failed", error: toSent(error) });
  }
}

async function sample({ id, request }: Extract<ToWorker, { type: "sample" }>): Promise<void> {
  const controller = new AbortController();
  running.set(id, controller);
  try {
    if (!engine) throw new Error("the bundle is not loaded");
    const listener = {
      onReport: (report: Extract<FromWorker, { type: "report" }>["report"]) =>
        page.postMessage({ type: "report", id, report }),
      onWarning: (message: string) => page.postMessage({ type: "warning", id, message }),
    };
    const sampled = await engine.sample(request, listener, controller.signal);
    page.postMessage(
      { type: "sampled", id, sampled },
      sampled.pixels.map((data) => data.buffer),
    );
  } catch (error) {
    page.postMessage({ type: "stopped", id, error: toSent(error) });
  } finally {
    running.delete(id);
  }
}

// A bundler may put ONNX Runtime into the same file. Its threads then start with this file as well.
if (!page.name.startsWith("em-pthread")) {
  page.onmessage = ({ data }) => {
    if (data.type === "load") void load(data.url, data.options);
    else if (data.type === "sample") void sample(data);
    else running.get(data.id)?.abort();
  };
}
