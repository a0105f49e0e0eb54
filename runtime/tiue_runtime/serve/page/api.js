/** The server's API, as in docs/server.md. */

import { readNote, writeNote } from "./store.js";

const KEY = "tiue-key";
const API = new URL("v1/", document.baseURI);

/** An error of the server, or of the way to it. */
export class ApiError extends Error {
  /**
   * @param {string} message for people
   * @param {number} status of HTTP, or 0
   */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Keep the API key while this tab is open. */
export function useKey(key) {
  writeNote("sessionStorage", KEY, key);
}

/** Return the names of the server's models, the default first. */
export async function listModels() {
  const answer = await ask("models");
  return (await answer.json()).data.map((model) => model.id);
}

/** Return what a model can do: license, sizes, steps, examples, device, most_pictures. */
export async function describeModel(name) {
  const answer = await ask(`models/${encodeURIComponent(name)}`);
  return (await answer.json()).tiue;
}

/**
 * Draw pictures, and yield each partial and each finished one.
 *
 * @param {{model: string, prompt: string, n: number, size: string, seed: ?string, steps: ?number}} wish
 *     The seed is a string of digits: numbers of JavaScript end at 2**53.
 * @param {AbortSignal} signal cancels the drawing
 * @yields {{done: boolean, index: number, blob: Blob, seed: string, facts: object}} seed and facts: if done
 */
export async function* draw({ seed, steps, ...wish }, signal) {
  const body = JSON.stringify({ ...wish, ...(steps ? { steps } : {}), stream: true, partial_images: 3 });
  const answer = await ask("images/generations", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: seed === null ? body : `${body.slice(0, -1)},"seed":${seed}}`,
    signal,
  });
  let finished = 0;
  for await (const event of eventsOf(answer, wish.n, () => finished)) {
    if (event.error) throw new ApiError(event.error.message, answer.status);
    const done = event.type === "image_generation.completed";
    if (!done && event.type !== "image_generation.partial_image") continue;
    const index = event.tiue?.index ?? finished;
    finished += done;
    const blob = toBlob(event.b64_json, `image/${event.output_format}`);
    const own = seed === null ? event.tiue?.seeds?.[0] : BigInt(seed) + BigInt(index);
    yield { done, index, blob, seed: String(own ?? ""), facts: event.tiue ?? {} };
  }
  if (finished < wish.n) throw lost(finished, wish.n);
}

async function* eventsOf(answer, count, finished) {
  try {
    yield* readEvents(answer.body);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw lost(finished(), count);
  }
}

function lost(finished, count) {
  const which = finished ? `${finished} of ${count} pictures were finished.` : "No picture was finished.";
  return new ApiError(`The connection to the server was lost. ${which} Is the server still running?`);
}

/** Send a request, and throw an ApiError unless the answer is a good one. */
async function ask(path, options = {}) {
  const key = readNote("sessionStorage", KEY);
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  if (!/^[ -~]*$/.test(key ?? "")) throw new ApiError("The API key has a character that no key can have.", 401);
  let answer;
  try {
    answer = await fetch(new URL(path, API), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running?");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  throw new ApiError(said?.error?.message ?? `The server answered with status ${answer.status}.`, answer.status);
}

function toBlob(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type });
}

/**
 * Read the events of a stream (text/event-stream) whose data are JSON.
 *
 * @param {ReadableStream<Uint8Array>} stream
 * @yields {object} the JSON of each event
 */
export async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  const parts = [];  // of an event that has not ended: a picture comes in many
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const pieces = ((parts.pop() ?? "") + value).split("\n\n");
      // An event may end at the border of two parts, so the last piece is joined with what follows.
      for (const piece of pieces.slice(0, -1)) yield* parsed(piece);
      parts.push(pieces.at(-1));
    }
  } finally {
    reader.cancel().catch(() => {});  // The reader may have failed already.
  }
}

function* parsed(event) {
  const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
  if (data.length && data[0] !== "[DONE]") yield JSON.parse(data.join("\n"));
}
