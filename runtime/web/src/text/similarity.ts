/** Similar words, by the measure of Ratcliff and Obershelp that Python's difflib uses. */

/** Return the most similar of the candidates, or null if none reaches `least`. */
export function closest(word: string, candidates: string[], least: number): string | null {
  let best: string | null = null;
  let reached = least;
  for (const candidate of candidates) {
    const longest = Math.min(word.length, candidate.length);
    if ((2 * longest) / (word.length + candidate.length) < reached) continue;
    const similarity = (2 * matching(candidate, word)) / (word.length + candidate.length);
    if (similarity > reached || (similarity === reached && (best === null || candidate > best))) {
      [best, reached] = [candidate, similarity];
    }
  }
  return best;
}

/** Count the characters in the longest common substring, and in those to the left and to the right of it. */
function matching(a: string, b: string): number {
  let [length, startA, startB] = [0, 0, 0];
  let before = new Map<number, number>(); // end in b => length of the common substring that ends there
  for (let i = 0; i < a.length; i++) {
    const now = new Map<number, number>();
    for (let j = 0; j < b.length; j++) {
      if (a[i] !== b[j]) continue;
      const common = (before.get(j - 1) ?? 0) + 1;
      now.set(j, common);
      if (common > length) [length, startA, startB] = [common, i - common + 1, j - common + 1];
    }
    before = now;
  }
  if (length === 0) return 0;
  const left = matching(a.slice(0, startA), b.slice(0, startB));
  return length + left + matching(a.slice(startA + length), b.slice(startB + length));
}
