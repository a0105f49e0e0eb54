/** The record in a PNG file: how its picture was made. docs/traceability.md describes it. */

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const LARGEST_FILE = 2 ** 28;
const LARGEST_RECORD = 2 ** 24;
const LARGEST_SEED = 2n ** 64n - 1n;

/**
 * Read a file's record.
 *
 * @param {Blob} file
 * @returns {Promise<{prompt: string, seed: string, steps: number, width: number, height: number, bundle: string}>}
 * @throws {Error} the file is no PNG, or has no record from which a picture can be drawn
 */
export async function readRecord(file) {
  if (file.size > LARGEST_FILE) throw new Error("The file is too large for a picture.");
  const text = recordText(new DataView(await file.arrayBuffer()));
  if (text === null) throw new Error("The picture does not say how it was made: it has no record of tiue-runtime.");
  let record;
  try {
    record = JSON.parse(text);
  } catch {
    throw new Error("The record in the picture is damaged.");
  }
  // JSON.parse rounds numbers above 2**53. Within strings, quotes are escaped, so this finds the field alone.
  const seed = /"seed":\s*(\d{1,20})\s*[,}]/.exec(text)?.[1];
  if (record?.prompt === undefined) throw new Error("The picture was made from text embeddings, which no file holds.");
  if (seed === undefined) throw new Error("The picture was made from noise that no file holds.");
  const whole = ["steps", "width", "height"].every((name) => Number.isInteger(record[name]) && record[name] > 0);
  const words = typeof record.prompt === "string" && typeof record.bundle === "string";
  if (record.format !== 1 || !whole || !words || BigInt(seed) > LARGEST_SEED) {
    throw new Error("The record in the picture is damaged, or a newer version wrote it.");
  }
  return { ...record, seed };
}

/** Return the text of the chunk named "tiue", or null. */
function recordText(view) {
  const isPng = view.byteLength > 8 && SIGNATURE.every((byte, i) => view.getUint8(i) === byte);
  if (!isPng) throw new Error("This is no PNG picture.");
  for (let at = 8; at + 12 <= view.byteLength; ) {
    const length = view.getUint32(at);
    if (length > view.byteLength - at - 12) throw new Error("The picture is damaged.");
    const bytes = new Uint8Array(view.buffer, at + 8, length);
    if (latin1(new Uint8Array(view.buffer, at + 4, 4)) === "tEXt" && length <= LARGEST_RECORD) {
      const end = bytes.indexOf(0);
      if (latin1(bytes.subarray(0, end)) === "tiue") return latin1(bytes.subarray(end + 1));
    }
    at += 12 + length;
  }
  return null;
}

function latin1(bytes) {
  return new TextDecoder("latin1").decode(bytes);
}
