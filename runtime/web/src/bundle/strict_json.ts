/** Strict JSON: UTF-8 without a byte order mark, every key once, finite numbers. */
import { BundleError, clip, firstLine, shorten } from "../errors.js";

const TOKENS = /"(?:[^"\\]|\\.)*"|[{}[\]:,]|[^\s"{}[\]:,]+/g;
const DIGITS = 20; // most digits of an integer, as many as 2**64 has

/** Parse the bytes of a JSON file. Throws BundleError. */
export function parseJson(data: Uint8Array): unknown {
  if (data[0] === 0xef && data[1] === 0xbb && data[2] === 0xbf) {
    throw new BundleError("expected JSON without a byte order mark");
  }
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(data);
  } catch (error) {
    throw new BundleError("expected UTF-8, but some bytes are no characters", { cause: error });
  }
  let content: unknown;
  try {
    content = JSON.parse(text);
  } catch (error) {
    throw new BundleError(`expected JSON, but ${firstLine(error)}`, { cause: error });
  }
  checkTokens(text);
  return content;
}

/** Refuse keys that occur twice and overlong numbers in well-formed JSON, which JSON.parse lets pass. */
function checkTokens(text: string): void {
  const keys: (Set<string> | null)[] = []; // of each open object; null is a list
  let before = "";
  let last = "";
  for (const [token] of text.matchAll(TOKENS)) {
    if (token === "{") keys.push(new Set());
    else if (token === "[") keys.push(null);
    else if (token === "}" || token === "]") keys.pop();
    else if (token === ":" && (before === "{" || before === ",")) {
      const open = keys.at(-1);
      const key = JSON.parse(last) as string;
      if (open?.has(key)) throw new BundleError(`expected every key once, got ${shorten(key)} twice`);
      open?.add(key);
    } else if (/^-?\d/.test(token) && (!Number.isFinite(Number(token)) || /^-?\d{21,}$/.test(token))) {
      throw new BundleError(`expected finite numbers of at most ${DIGITS} digits, got ${clip(token)}`);
    }
    [before, last] = [last, token];
  }
}
