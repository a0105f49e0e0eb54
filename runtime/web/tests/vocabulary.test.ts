/** Warnings about unknown words: how much of a prompt they read, and how many words they look up. */
import assert from "node:assert/strict";
import { beforeEach, test, vi } from "vitest";
import { closest } from "../src/text/similarity.js";
import { Vocabulary } from "../src/text/vocabulary.js";

vi.mock(import("../src/text/similarity.js"), async (original) => ({ closest: vi.fn((await original()).closest) }));
beforeEach(() => void vi.mocked(closest).mockClear());

const LENGTH = 8; // tokens, so 512 characters are read
const known = new Vocabulary(
  { examples: ["a red heart"], vocabulary: ["red", "blue", "heart", "star", "sea"] },
  LENGTH,
);

function lookedUp(): string[] {
  return vi.mocked(closest).mock.calls.map(([word]) => word);
}

test("32 different words are looked up at most, each one once", () => {
  const words = Array.from({ length: 10_000 }, (_, i) => `\u044f${i}`);
  const complaint = known.complaint(["\u044f0", ...words].join(" "));
  assert.match(complaint ?? "", /it knows for example a red heart$/);
  assert.deepEqual(lookedUp(), words.slice(0, 32));
});

test("the search ends with three suggestions", () => {
  const complaint = known.complaint("hart zebra sart bleu reed");
  assert.match(complaint ?? "", /it knows for example heart, star, blue$/);
  assert.deepEqual(lookedUp(), ["hart", "zebra", "sart", "bleu"]);
});

test("the style that was added is not quoted", () => {
  const prompts = { examples: ["a heart"], vocabulary: ["heart", "art"], styles: ["pop art"] };
  const complaint = new Vocabulary(prompts, LENGTH).complaint("a zebra, pop art style");
  assert.equal(complaint, "the model knows no word of 'a zebra'; it knows for example a heart");
});

test("64 characters for each token are read, and a surrogate pair is one character", () => {
  const most = 64 * LENGTH;
  const filled = (character: string, end: string): string => character.repeat(most - end.length) + end;
  assert.equal(known.complaint(filled(" ", "zebra heart")), null);
  assert.equal(known.complaint(`${filled(" ", "zebra ")}heart`)?.endsWith("a red heart"), true);
  assert.equal(known.complaint(filled("\u{1f600}", " heart")), null);
  assert.equal(known.complaint(`${filled("\u{1f600}", " zebra ")}heart`)?.endsWith("a red heart"), true);
});
