/** Token ids of prompts, for comparisons with the Python runtime: JSON in, JSON out. */
import { readFile } from "node:fs/promises";
import { text } from "node:stream/consumers";
import { PromptTokenizer } from "../src/text/tokenizer.js";

const { tokenizer, length, prompts } = JSON.parse(await text(process.stdin)) as {
  tokenizer: string;
  length: number;
  prompts: string[];
};
const encoder = new PromptTokenizer(await readFile(tokenizer), length);
const rows = prompts.map((prompt) => {
  const { inputIds, attentionMask } = encoder.encode([prompt]);
  return [Array.from(inputIds, Number), Array.from(attentionMask, Number)];
});
process.stdout.write(JSON.stringify(rows));
