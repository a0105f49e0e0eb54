/** What tests in a browser call. It is bundled for the page. */
export * from "../../src/index.js";
export { PromptTokenizer } from "../../src/text/tokenizer.js";
export { CACHE, Store } from "../../src/bundle/store.js";
