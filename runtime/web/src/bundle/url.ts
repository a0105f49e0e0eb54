/** The URL of a bundle, as the caller gives it. */
import { clip, RequestError } from "../errors.js";

/**
 * Return the absolute URL of a bundle's directory.
 *
 * @param bundle a URL, or with `base` a path from there.
 * @throws RequestError if it is no URL, or has a password, a query or a fragment. Passwords are not shown.
 */
export function directoryUrl(bundle: string, base?: string): string {
  const wrong = (got: string): RequestError =>
    new RequestError(`bundle: expected the URL of a bundle's directory, got ${got}`);
  const shown = clip(bundle.replace(/\/\/.*@/s, "//...@"));
  let url: URL;
  try {
    url = new URL(bundle, base);
  } catch (error) {
    throw Object.assign(wrong(`'${shown}'`), { cause: error });
  }
  if (url.username || url.password) throw wrong("one with a user name or a password, which fetch refuses");
  // The names of files are put behind it.
  if (url.search || url.hash) throw wrong(`one with ${url.search ? "a query (?)" : "a fragment (#)"}: '${shown}'`);
  url.search = url.hash = "";
  return url.href;
}
