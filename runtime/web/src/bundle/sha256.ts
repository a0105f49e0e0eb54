/** SHA-256 by the platform's SubtleCrypto. */
import { DeviceError } from "../errors.js";

/**
 * Return the SHA-256 of data in lower-case hexadecimal.
 *
 * @throws DeviceError if the page is no secure context, because browsers then have no SubtleCrypto.
 */
export async function sha256(data: Uint8Array): Promise<string> {
  const digest = await subtleCrypto().digest("SHA-256", data as Uint8Array<ArrayBuffer>);
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Return SubtleCrypto. Throws DeviceError if the page is no secure context. */
export function subtleCrypto(): SubtleCrypto {
  const subtle = (globalThis.crypto as Crypto | undefined)?.subtle as SubtleCrypto | undefined;
  if (subtle) return subtle;
  throw new DeviceError(
    "this page is not a secure context, so files cannot be checked (crypto.subtle is missing): " +
      "serve it over https, or from localhost",
  );
}
