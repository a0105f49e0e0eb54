/** The styles of a bundle: a prompt that names none gets one, which the seed chooses. */
import type { Manifest } from "../bundle/manifest.js";

/**
 * Return the prompt that is drawn: if `prompt` names no style, the seed's style is added.
 *
 * The word "style" counts as a name. A prompt without words stays as it is.
 */
export function inStyle(prompts: Manifest["prompts"], prompt: string, seed: bigint): string {
  const styles = prompts?.styles ?? [];
  if (styles.length === 0) return prompt;
  const words = spaced(prompt);
  if (words === " " || ["style", ...styles].some((name) => words.includes(spaced(name)))) return prompt;
  return `${prompt}${ending(styles[Number(seed % BigInt(styles.length))] ?? "")}`;
}

/** Return what `inStyle` adds to a prompt. */
export function ending(style: string): string {
  return `, ${style} style`;
}

/** Return the words of a text in lower case, with a space before and after each. */
function spaced(text: string): string {
  return ["", ...(text.toLowerCase().match(/[\p{L}\p{N}_]+/gu) ?? []), ""].join(" ");
}
