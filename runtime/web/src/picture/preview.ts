/** Previews: a matrix turns latents into small pictures, at a tiny part of an image decoder's cost. */
import type { Manifest } from "../bundle/manifest.js";
import { RequestError } from "../errors.js";
import { Picture, toLevel } from "./picture.js";

/**
 * Turn latents (C, h, w) => a picture of full size. RGB of a latent pixel is latents @ matrix + bias, clipped.
 *
 * @throws RequestError if the bundle has no matrix.
 */
export function preview(manifest: Manifest, latents: Float32Array, height: number, width: number): Picture {
  if (!manifest.preview) {
    throw new RequestError(`preview: bundle ${manifest.name} has no matrix for quick previews`);
  }
  const { matrix, bias } = manifest.preview;
  const area = height * width;
  const small = new Uint8ClampedArray(area * 4).fill(255);
  for (let pixel = 0; pixel < area; pixel++) {
    for (let color = 0; color < 3; color++) {
      const value = matrix.reduce(
        (sum, row, c) => sum + (latents[c * area + pixel] ?? 0) * (row[color] ?? 0),
        bias[color] ?? 0,
      );
      small[4 * pixel + color] = toLevel(value);
    }
  }
  const scale = manifest.pixels_per_latent;
  const tall = stretch(small, height, width, scale, false);
  return new Picture(width * scale, height * scale, stretch(tall, height * scale, width, scale, true));
}

/** Stretch RGBA bytes along one axis, bilinearly between the centers of pixels. */
function stretch(
  data: Uint8ClampedArray<ArrayBuffer>,
  height: number,
  width: number,
  scale: number,
  across: boolean,
): Uint8ClampedArray<ArrayBuffer> {
  const [size, wide] = across ? [width, width * scale] : [height, width];
  const tall = across ? height : height * scale;
  const out = new Uint8ClampedArray(wide * tall * 4);
  for (let y = 0; y < tall; y++) {
    for (let x = 0; x < wide; x++) {
      const place = ((across ? x : y) + 0.5) / scale - 0.5;
      const first = Math.max(Math.floor(place), 0);
      const next = Math.min(Math.floor(place) + 1, size - 1);
      const share = place - Math.floor(place);
      for (let channel = 0; channel < 4; channel++) {
        const at = (i: number): number => data[4 * (across ? y * width + i : i * width + x) + channel] ?? 0;
        out[4 * (y * wide + x) + channel] = Math.floor(at(first) * (1 - share) + at(next) * share + 0.5);
      }
    }
  }
  return out;
}
