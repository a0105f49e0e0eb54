// What the page may say: {kind: "hello"}, {kind: "draw", id, prompt, seed}, {kind: "cancel", id}.
const MOST_CHARACTERS = 1000;

/** Whether a message has that form. The page is not trusted. */
export function checkMessage(message) {
  if (typeof message !== "object" || message === null) return false;
  const { kind, id, prompt, seed } = message;
  if (kind === "hello") return true;
  if (!Number.isSafeInteger(id)) return false;
  if (kind === "cancel") return true;
  const fits = typeof prompt === "string" && prompt.length <= MOST_CHARACTERS;
  return kind === "draw" && fits && Number.isSafeInteger(seed) && seed >= 0;
}
