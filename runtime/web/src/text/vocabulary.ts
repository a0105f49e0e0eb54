/** Words that a model knows, if it was trained on a closed list of them: a warning instead of a strange picture. */
import type { Manifest } from "../bundle/manifest.js";
import { clip, firstCharacters } from "../errors.js";
import { closest } from "./similarity.js";
import { ending } from "./styles.js";
import { CHARACTERS_PER_TOKEN } from "./tokenizer.js";

// Words that say nothing about a picture's content.
const SMALL = new Set(
  ("a an and at by for from in into is it its my of on or over " + "style that the this to under with").split(" "),
);
const CLOSE = 0.7; // the similarity of a word that was probably meant
const MOST_WORDS = 32; // that are compared with all words of the vocabulary, which takes time
const SUGGESTIONS = 3;

/**
 * The words of a bundle's `prompts`. Without a vocabulary, every word counts as known.
 *
 * Python's runtime has the same limits, so that both give the same warnings.
 */
export class Vocabulary {
  readonly #examples: string[];
  readonly #endings: string[]; // that name a style
  readonly #phrases = new Map<string, string>(); // word => the first phrase that has it
  readonly #forms = new Set<string>();
  readonly #most: number; // characters of a prompt that are read

  /** Takes the manifest's prompts and text_length. */
  constructor(prompts: Manifest["prompts"], length: number) {
    this.#most = CHARACTERS_PER_TOKEN * length;
    this.#examples = prompts?.examples ?? [];
    this.#endings = (prompts?.styles ?? []).map(ending);
    for (const phrase of prompts?.vocabulary ?? []) {
      for (const word of words(phrase)) if (!this.#phrases.has(word)) this.#phrases.set(word, phrase);
    }
    for (const word of this.#phrases.keys()) for (const form of forms(word)) this.#forms.add(form);
  }

  /** Return a warning about a prompt of which no word is known, else null. Plural and singular are the same word. */
  complaint(prompt: string): string | null {
    for (const style of this.#endings) if (prompt.endsWith(style)) prompt = prompt.slice(0, -style.length);
    const asked = words(firstCharacters(prompt, this.#most));
    const known = asked.some((word) => forms(word).some((form) => this.#forms.has(form)));
    if (this.#phrases.size === 0 || asked.length === 0 || known) return null;
    const candidates = [...this.#phrases.keys()];
    const meant: string[] = [];
    for (const word of [...new Set(asked)].slice(0, MOST_WORDS)) {
      const close = closest(word, candidates, CLOSE);
      if (close !== null) meant.push(this.#phrases.get(close) ?? close);
      if (meant.length === SUGGESTIONS) break;
    }
    const suggestions = [meant, this.#examples, [...this.#phrases.values()]].find((list) => list.length > 0) ?? [];
    const shown = suggestions.slice(0, SUGGESTIONS).join(", ");
    return `the model knows no word of '${clip(prompt)}'; it knows for example ${shown}`;
  }
}

function words(text: string): string[] {
  return (text.toLowerCase().match(/[\p{L}\p{N}_]+/gu) ?? []).filter((word) => !SMALL.has(word));
}

/** Return a word and its possible singulars. */
function forms(word: string): string[] {
  const endings = [
    ["s", ""],
    ["es", ""],
    ["ies", "y"],
    ["ves", "f"],
  ] as const;
  const singulars = endings
    .filter(([ending]) => word.endsWith(ending) && word.length > ending.length + 1)
    .map(([ending, singular]) => word.slice(0, -ending.length) + singular);
  return [word, ...singulars];
}
