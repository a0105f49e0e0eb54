/** A picture with its record. It looks like ImageData, so that it works in every environment. */
import { DeviceError } from "../errors.js";
import { checkPngOptions } from "../options.js";
import { encodePng } from "./png.js";
import type { Record } from "./record.js";

export interface PngOptions {
  /** Whether to write the record and webui's `parameters`. Default: true. */
  metadata?: boolean | undefined;
  /** Whether to write the mark "made by AI" (IPTC's DigitalSourceType in XMP). Default: true. */
  aiMark?: boolean | undefined;
}

export class Picture {
  constructor(
    readonly width: number,
    readonly height: number,
    /** Red, green, blue and alpha of each pixel, row by row. */
    readonly data: Uint8ClampedArray<ArrayBuffer>,
    /** How the picture was made, or null for previews. */
    readonly record: Record | null = null,
  ) {}

  /** Return the pixels as ImageData, for a canvas. Browsers and their workers have it. Throws DeviceError elsewhere. */
  toImageData(): ImageData {
    if (!("ImageData" in globalThis)) {
      throw new DeviceError("only browsers have ImageData: take width, height and data of the picture, or png()");
    }
    return new ImageData(this.data, this.width, this.height);
  }

  /**
   * Return the bytes of a PNG file that says how the picture was made, and that a model made it. Throws RequestError if
   * an option is wrong.
   */
  async png(options?: PngOptions): Promise<Uint8Array<ArrayBuffer>> {
    const { metadata = true, aiMark = true } = checkPngOptions(options);
    return encodePng(this, metadata ? this.record : null, aiMark);
  }

  /** Return a PNG file as a Blob, for a download or an <img>. Throws as `png`. */
  async toBlob(options?: PngOptions): Promise<Blob> {
    return new Blob([await this.png(options)], { type: "image/png" });
  }
}

/** Return the red, green and blue bytes of a picture. */
export function rgbOf({ data }: { data: Uint8ClampedArray }): Uint8Array<ArrayBuffer> {
  const rgb = new Uint8Array((data.length / 4) * 3);
  for (let from = 0, to = 0; from < data.length; from += 4, to += 3) rgb.set(data.subarray(from, from + 3), to);
  return rgb;
}

/** Turn RGB in [0, 1], pixel by pixel, into bytes, rounded to the nearest of 256 levels; half goes to even. */
export function toLevel(unit: number): number {
  const scaled = Math.fround(Math.min(Math.max(unit, 0), 1) * 255);
  const below = Math.floor(scaled);
  const rest = scaled - below;
  return rest > 0.5 || (rest === 0.5 && below % 2 === 1) ? below + 1 : below;
}
