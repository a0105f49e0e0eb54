/** The events of a stream (text/event-stream) whose data are JSON. */

/**
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
