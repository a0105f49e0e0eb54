/** Prompts to token ids. tokenizer.json alone determines them, its padding and truncation included. */
import { Tokenizer } from "@huggingface/tokenizers";
import { parseJson } from "../bundle/strict_json.js";
import { BundleError, firstLine, RequestError, shorten } from "../errors.js";
import { makeExact, type NormalizerJson, type PreTokenizerJson } from "./exact.js";

// A long prompt is read in windows from its beginning, because tokens cost time and all but `length` of them are cut
// off. The first window has this many characters per token. Each later window is four times as long.
export const CHARACTERS_PER_TOKEN = 64;
const MOST_CHARACTERS = 1_000_000; // of a prompt; later ones are always cut off

/** Token ids of a list of prompts. */
export interface Tokens {
  inputIds: BigInt64Array; // (B, L)
  attentionMask: BigInt64Array; // (B, L), 1 where a token is, 0 where padding is
  cut: string[]; // for each prompt, the words that did not fit into L tokens, or ""
}

/** The parts of tokenizer.json that the library for JavaScript leaves to its caller. */
interface Settings {
  padding: { strategy?: { Fixed?: unknown }; direction?: string; pad_id?: number } | null;
  truncation: { max_length?: unknown; direction?: string } | null;
  normalizer: NormalizerJson | null;
  pre_tokenizer: PreTokenizerJson | null;
  post_processor: Processor | null;
  model: { type: string; unk_token?: string };
}

type Processor =
  | { type: "TemplateProcessing"; single: Piece[]; special_tokens: Record<string, { ids: number[] }> }
  | { type: "BertProcessing" | "RobertaProcessing"; cls: [string, number]; sep: [string, number] }
  | { type: "Sequence"; processors: Processor[] }
  | { type: "ByteLevel" };

type Piece = { SpecialToken: { id: string } } | { Sequence: { id: string } };

/** tokenizer.json, checked to pad and truncate to exactly `length` tokens. */
export class PromptTokenizer {
  readonly #tokenizer: Tokenizer;
  readonly #length: number;
  readonly #before: number[]; // special tokens before the prompt's own
  readonly #after: number[];
  readonly #padId: number;
  readonly #padsLeft: boolean;
  readonly #keepsTheEnd: boolean;

  /** Takes the bytes of tokenizer.json and the manifest's text_length. Throws BundleError. */
  constructor(data: Uint8Array, length: number) {
    try {
      const content = parseJson(data) as Settings;
      const padded = content.padding?.strategy?.Fixed;
      const cut = content.truncation?.max_length;
      if (padded !== length || cut !== length) {
        throw new BundleError(
          `expected padding and truncation to text_length ${length}, ` +
            `got padding to ${shorten(padded)} and truncation to ${shorten(cut)}`,
        );
      }
      this.#tokenizer = new Tokenizer(content, {});
      makeExact(this.#tokenizer, content);
      [this.#before, this.#after] = specialTokens(content.post_processor);
      this.#padId = content.padding?.pad_id ?? 0;
      checkIds([...this.#before, ...this.#after, this.#padId]);
      this.#padsLeft = content.padding?.direction === "Left";
      this.#keepsTheEnd = content.truncation?.direction === "Left";
    } catch (error) {
      throw new BundleError(`tokenizer.json: not a tokenizer that can be used: ${firstLine(error)}`, { cause: error });
    }
    this.#length = length;
    const own = this.#before.length + this.#after.length;
    if (own > length) throw new BundleError(`tokenizer.json: expected at most ${length} special tokens, got ${own}`);
  }

  /** Encode prompts to rows of exactly L tokens. Throws RequestError, BundleError. */
  encode(prompts: string[]): Tokens {
    const size = prompts.length * this.#length;
    const tokens: Tokens = { inputIds: new BigInt64Array(size), attentionMask: new BigInt64Array(size), cut: [] };
    prompts.forEach((prompt, row) => {
      if (!prompt.isWellFormed()) {
        throw new RequestError(`prompt: expected whole characters, got half of one in ${shorten(prompt)}`);
      }
      const most = this.#length - this.#before.length - this.#after.length;
      const own = this.#own(prompt, most);
      const kept = own.length <= most ? own : this.#keepsTheEnd ? own.slice(own.length - most) : own.slice(0, most);
      const ids = [...this.#before, ...kept, ...this.#after];
      const padding = this.#length - ids.length;
      const first = row * this.#length + (this.#padsLeft ? padding : 0);
      tokens.inputIds.fill(BigInt(this.#padId), row * this.#length, (row + 1) * this.#length);
      tokens.inputIds.set(ids.map(BigInt), first);
      tokens.attentionMask.fill(1n, first, first + ids.length);
      tokens.cut.push(own.length > most ? this.#cutPart(prompt, most) : "");
    });
    return tokens;
  }

  /** Return the prompt's own tokens, or at least the first `most` of them and one more. */
  #own(prompt: string, most: number): number[] {
    if (this.#keepsTheEnd) return this.#ids(lastUnits(prompt, MOST_CHARACTERS));
    let window = CHARACTERS_PER_TOKEN * this.#length;
    while (window < Math.min(prompt.length, MOST_CHARACTERS)) {
      // A token depends on its word, but not on text far behind that word. So if the first half of the window has more
      // tokens than fit, the whole window decides them.
      if (this.#ids(firstUnits(prompt, window / 2)).length > most) return this.#ids(firstUnits(prompt, window));
      window *= 4;
    }
    return this.#ids(firstUnits(prompt, MOST_CHARACTERS));
  }

  #ids(text: string): number[] {
    try {
      return checkIds(this.#tokenizer.encode(text, { add_special_tokens: false }).ids);
    } catch (error) {
      throw new BundleError(`tokenizer.json: the tokenizer failed: ${firstLine(error)}`, { cause: error });
    }
  }

  /** Return the words of a prompt that are not kept whole. The library tells no places of tokens. */
  #cutPart(prompt: string, most: number): string {
    const size = 8 * CHARACTERS_PER_TOKEN * this.#length;
    const words = (this.#keepsTheEnd ? lastUnits(prompt, size) : firstUnits(prompt, size)).match(/\S+\s*/g) ?? [];
    const part = (count: number): string =>
      (this.#keepsTheEnd ? words.slice(words.length - count) : words.slice(0, count)).join("");
    const fits = (count: number): boolean => this.#ids(part(count)).length <= most;
    let [low, high] = [0, words.length];
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if (fits(middle)) low = middle;
      else high = middle - 1;
    }
    const kept = part(low).length;
    return (this.#keepsTheEnd ? prompt.slice(0, prompt.length - kept) : prompt.trimStart().slice(kept)).trim();
  }
}

/** Return token ids if they are some. The library takes them from the file as they are. Throws BundleError. */
function checkIds(ids: readonly unknown[]): number[] {
  const at = ids.findIndex((id) => !Number.isSafeInteger(id) || (id as number) < 0);
  if (at >= 0) throw new BundleError(`expected integers from 0 as token ids, got ${shorten(ids[at])}`);
  return ids as number[];
}

/** Return the ids of the special tokens before and after the prompt's own. */
function specialTokens(processor: Processor | null): [number[], number[]] {
  switch (processor?.type) {
    case "TemplateProcessing": {
      const ids = processor.single.map((piece) =>
        "SpecialToken" in piece ? (processor.special_tokens[piece.SpecialToken.id]?.ids ?? []) : null,
      );
      const own = ids.indexOf(null);
      if (own < 0 || ids.lastIndexOf(null) !== own)
        throw new BundleError("post_processor: expected one place of the prompt");
      return [ids.slice(0, own).flatMap((one) => one ?? []), ids.slice(own + 1).flatMap((one) => one ?? [])];
    }
    case "BertProcessing":
    case "RobertaProcessing":
      return [[processor.cls[1]], [processor.sep[1]]];
    case "Sequence": {
      const inner = processor.processors.map(specialTokens);
      return [inner.reverse().flatMap(([before]) => before), inner.reverse().flatMap(([, after]) => after)];
    }
    case "ByteLevel":
    case undefined:
      return [[], []];
    default:
      throw new BundleError(
        `post_processor: got ${shorten((processor as { type: unknown }).type)}, which the exporter does not write`,
      );
  }
}

/** Return at most `most` UTF-16 units from the beginning of a text, in whole characters. */
function firstUnits(text: string, most: number): string {
  const part = text.slice(0, most);
  return part.isWellFormed() ? part : part.slice(0, -1);
}

function lastUnits(text: string, most: number): string {
  const part = text.length > most ? text.slice(text.length - most) : text;
  return part.isWellFormed() ? part : part.slice(1);
}
