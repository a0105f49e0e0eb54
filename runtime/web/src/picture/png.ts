/** PNG files, with the metadata that runtime/tiue_runtime/metadata.py writes. */
import { RequestError } from "../errors.js";
import { VERSION } from "../generated/version.js";
import { rgbOf } from "./picture.js";
import { parameters, toJson, type Record } from "./record.js";

/** IPTC's term for media that a trained model made. */
export const AI_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia";

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const XMP = "XML:com.adobe.xmp";
const MARK =
  '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">' +
  '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" ' +
  `Iptc4xmpExt:DigitalSourceType="${AI_SOURCE}"/></rdf:RDF></x:xmpmeta>`;
const MOST_BYTES = 16 * 2 ** 20; // of a record

type Bytes = Uint8Array<ArrayBuffer>;

interface Pixels {
  width: number;
  height: number;
  data: Uint8ClampedArray;
}

/**
 * Write a PNG file in RGB.
 *
 * @param picture its alpha is left out.
 * @param record null writes neither parameters nor record.
 * @param aiMark whether to write the mark "made by AI".
 */
export async function encodePng(picture: Pixels, record: Record | null, aiMark: boolean): Promise<Bytes> {
  const header = new Uint8Array(13);
  const view = new DataView(header.buffer);
  view.setUint32(0, picture.width);
  view.setUint32(4, picture.height);
  header.set([8, 2, 0, 0, 0], 8); // 8 bits, RGB, deflate, adaptive filters, not interlaced
  const pixels = await deflate(filtered(rgbOf(picture), 3 * picture.width));
  return joined([
    new Uint8Array(SIGNATURE),
    chunk("IHDR", header),
    ...metadata(record, aiMark),
    chunk("IDAT", pixels),
    chunk("IEND", new Uint8Array()),
  ]);
}

function metadata(record: Record | null, aiMark: boolean): Bytes[] {
  const chunks: Bytes[] = [];
  if (record) {
    const json = toJson(record);
    if (json.length > MOST_BYTES) {
      throw new RequestError(
        `prompt: it is too long for the picture's metadata, ${json.length} bytes of at most ${MOST_BYTES}: pass metadata: false`,
      );
    }
    chunks.push(
      text("parameters", parameters(record)),
      text("tiue", json),
      text("Software", `tiue-runtime ${VERSION}`),
    );
  }
  if (aiMark) chunks.push(internationalText(XMP, MARK));
  return chunks;
}

function text(key: string, value: string): Bytes {
  return /^[\0-\x7f]*$/.test(value) ? chunk("tEXt", utf8(`${key}\0${value}`)) : internationalText(key, value);
}

function internationalText(key: string, value: string): Bytes {
  return chunk("iTXt", utf8(`${key}\0\0\0\0\0${value}`)); // not compressed, no language, no translated key
}

/** Apply PNG's Paeth filter to each row: bytes become differences to their neighbors, which compress better. */
function filtered(rgb: Bytes, stride: number): Bytes {
  const rows = rgb.length / stride;
  const out = new Uint8Array(rgb.length + rows);
  const at = (row: number, i: number): number => (row < 0 || i < 0 ? 0 : (rgb[row * stride + i] ?? 0));
  for (let row = 0; row < rows; row++) {
    out[row * (stride + 1)] = 4;
    for (let i = 0; i < stride; i++) {
      const [left, up, corner] = [at(row, i - 3), at(row - 1, i), at(row - 1, i - 3)];
      const guess = left + up - corner;
      const [a, b, c] = [Math.abs(guess - left), Math.abs(guess - up), Math.abs(guess - corner)];
      const nearest = a <= b && a <= c ? left : b <= c ? up : corner;
      out[row * (stride + 1) + 1 + i] = at(row, i) - nearest;
    }
  }
  return out;
}

async function deflate(data: Bytes): Promise<Bytes> {
  const stream = new Blob([data]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function chunk(type: string, data: Bytes): Bytes {
  const whole = new Uint8Array(12 + data.length);
  const view = new DataView(whole.buffer);
  view.setUint32(0, data.length);
  whole.set(utf8(type), 4);
  whole.set(data, 8);
  view.setUint32(8 + data.length, crc32(whole.subarray(4, 8 + data.length)));
  return whole;
}

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  return crc;
});

function crc32(data: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of data) crc = (crc >>> 8) ^ (CRC_TABLE[(crc ^ byte) & 255] ?? 0);
  return (crc ^ 0xffffffff) >>> 0;
}

function utf8(value: string): Bytes {
  return new TextEncoder().encode(value) as Bytes;
}

function joined(parts: Bytes[]): Bytes {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}
