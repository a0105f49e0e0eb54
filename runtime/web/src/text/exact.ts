/**
 * Parts of tokenizers in which the library for JavaScript differs from the one that Python uses. They work on whole
 * characters instead of UTF-16 units, turn capitals into small letters one character at a time, and take control
 * characters, marks and punctuation from the version of Unicode that Python's library has.
 */
import type { Tokenizer } from "@huggingface/tokenizers";
import { CONTROL, MARK, PUNCTUATION } from "../generated/characters.js";

/** A normalizer, or a list of them, in tokenizer.json. */
export interface NormalizerJson {
  type: string;
  normalizers?: NormalizerJson[];
  clean_text?: boolean;
  handle_chinese_chars?: boolean;
  strip_accents?: boolean | null;
  lowercase?: boolean;
}

/** A pre-tokenizer, or a list of them, in tokenizer.json. */
export interface PreTokenizerJson {
  type: string;
  pretokenizers?: PreTokenizerJson[];
}

interface Parts {
  normalizer: NormalizerJson | null;
  pre_tokenizer: PreTokenizerJson | null;
  model: { type: string; unk_token?: string };
}

type Normalize = (text: string) => string;
type Split = (text: string, options: object) => string[];

/** Replace the parts of a tokenizer that compute other tokens than Python's. */
export function makeExact(tokenizer: Tokenizer, { normalizer, pre_tokenizer, model }: Parts): void {
  tokenizer.normalizer = normalizerOf(normalizer, tokenizer.normalizer as Normalize | null) as Tokenizer["normalizer"];
  tokenizer.pre_tokenizer = splitterOf(
    pre_tokenizer,
    tokenizer.pre_tokenizer as Split | null,
  ) as Tokenizer["pre_tokenizer"];
  if (model.type === "WordLevel" && tokenizer.model && model.unk_token !== undefined) {
    const unknown = tokenizer.token_to_id(model.unk_token);
    if (unknown !== undefined) tokenizer.model.unk_token_id = unknown;
  }
}

function normalizerOf(json: NormalizerJson | null, original: Normalize | null): Normalize | null {
  switch (json?.type) {
    case "BertNormalizer":
      return (text) => bert(json, text);
    case "Lowercase":
      return lowercase;
    case "Sequence": {
      const inner = (original as unknown as { normalizers: (Normalize | null)[] }).normalizers;
      const parts = (json.normalizers ?? []).map((one, i) => normalizerOf(one, inner[i] ?? null));
      return (text) => parts.reduce((made, part) => part?.(made) ?? made, text);
    }
    default:
      return original;
  }
}

function splitterOf(json: PreTokenizerJson | null, original: Split | null): Split | null {
  switch (json?.type) {
    case "BertPreTokenizer":
      return (text) => text.match(BERT_WORD) ?? [];
    case "Whitespace":
      return (text) => text.match(WORD) ?? [];
    case "WhitespaceSplit":
      return (text) => text.match(NO_SPACE) ?? [];
    case "ByteLevel":
      // The library's pattern has \s, which is another set of characters in JavaScript: with U+FEFF, without U+0085.
      if (original) (original as unknown as { pattern: RegExp }).pattern = BYTE_LEVEL_WORD;
      return original;
    case "Sequence": {
      const inner = (original as unknown as { tokenizers: (Split | null)[] }).tokenizers;
      const parts = (json.pretokenizers ?? []).map((one, i) => splitterOf(one, inner[i] ?? null));
      return (text, options) =>
        parts.reduce((words, part) => (part ? words.flatMap((word) => part(word, options)) : words), [text]);
    }
    default:
      return original;
  }
}

const BERT_WORD = new RegExp(`[${PUNCTUATION}]|[^\\p{White_Space}${PUNCTUATION}]+`, "gu");
const LETTERS = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}";
const WORD = new RegExp(`[${LETTERS}]+|[^${LETTERS}\\p{White_Space}]+`, "gu");
const BYTE_LEVEL_WORD =
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
const NO_SPACE = /\P{White_Space}+/gu;

function bert(json: NormalizerJson, given: string): string {
  let text = given;
  if (json.clean_text) {
    text = text.replace(REMOVED, "").replace(/\p{White_Space}/gu, " ");
  }
  if (json.handle_chinese_chars) text = text.replace(CHINESE, " $& ");
  if (json.strip_accents ?? json.lowercase) text = text.normalize("NFD").replace(MARKS, "");
  return json.lowercase ? lowercase(text) : text;
}

const REMOVED = new RegExp(`[${CONTROL}]`, "gu");
const MARKS = new RegExp(`[${MARK}]`, "gu");
const CHINESE =
  /[\u4e00-\u9fff\u3400-\u4dbf\u{20000}-\u{2a6df}\u{2a700}-\u{2b73f}\u{2b740}-\u{2b81f}\u{2b920}-\u{2ceaf}\uf900-\ufaff\u{2f800}-\u{2fa1f}]/gu;

/** Turn each character into small letters by itself. `toLowerCase` of a whole text looks at the neighbors of a sigma. */
function lowercase(text: string): string {
  let made = "";
  for (const character of text) made += character.toLowerCase();
  return made;
}
