/**
 * The names of the files that hold the weights of an ONNX graph, as runtime/tiue_runtime/bundle/external_data.py reads
 * them. An ONNX file is a protobuf message. A tensor whose bytes lie in another file names it in its field
 * `external_data`, under the key "location".
 */
import { BundleError } from "../errors.js";

type Field = string; // a message, or the name of a text

/** Message => field number => message of the field, from onnx.proto. Fields without tensors are left out. */
const MESSAGES: Record<string, Record<number, Field>> = {
  ModelProto: { 7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto" },
  TrainingInfoProto: { 1: "GraphProto", 2: "GraphProto" },
  FunctionProto: { 7: "NodeProto", 11: "AttributeProto" },
  GraphProto: { 1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto" },
  NodeProto: { 4: "op_type", 5: "AttributeProto" },
  AttributeProto: {
    5: "TensorProto",
    6: "GraphProto",
    10: "TensorProto",
    11: "GraphProto",
    22: "SparseTensorProto",
    23: "SparseTensorProto",
  },
  SparseTensorProto: { 1: "TensorProto", 2: "TensorProto" },
  TensorProto: { 13: "StringStringEntryProto" },
  StringStringEntryProto: { 1: "key", 2: "value" },
};
const DEEPEST = 100; // messages inside one another, as in protobuf's own reader
const LONGEST_TEXT = 4096; // bytes of a key, a location or an operator's name

/** Return the locations that the tensors of an ONNX file name, relative to its folder. Throws BundleError. */
export function externalData(data: Uint8Array): string[] {
  const locations = new Set<string>();
  let at = 0;

  const varint = (): number => {
    let value = 0;
    for (let shift = 0; shift < 70; shift += 7) {
      const byte = data[at++];
      if (byte === undefined) throw damaged("it ends too early");
      value += (byte & 127) * 2 ** shift;
      if (byte < 128) return value;
    }
    throw damaged("a number has more than 10 bytes");
  };

  const message = (kind: string, end: number, depth: number): void => {
    if (depth > DEEPEST) throw damaged(`messages are nested deeper than ${DEEPEST}`);
    const texts: Record<string, string> = {};
    while (at < end) {
      const begun = at;
      const tag = varint();
      const number = Math.floor(tag / 8);
      const wire = tag & 7;
      if (number === 0 || ![0, 1, 2, 5].includes(wire)) throw damaged(`no field begins at byte ${begun}`);
      if (wire === 0) {
        varint();
        continue;
      }
      const size = wire === 2 ? varint() : wire === 1 ? 8 : 4;
      const stop = at + size;
      if (stop > end) throw damaged(`the field at byte ${begun} is cut off`);
      const inner = wire === 2 ? MESSAGES[kind]?.[number] : undefined;
      if (inner !== undefined && inner in MESSAGES) message(inner, stop, depth + 1);
      else if (inner !== undefined) {
        if (size > LONGEST_TEXT) throw damaged(`a name has ${size} bytes`);
        texts[inner] = new TextDecoder().decode(data.subarray(at, stop));
        if (inner === "op_type" && texts[inner] === "EPContext") {
          throw damaged("it has an EPContext node, which is compiled for one device");
        }
      }
      at = stop;
    }
    if (texts["key"] === "location") locations.add(texts["value"] ?? "");
  };

  message("ModelProto", data.length, 0);
  return [...locations].sort();
}

function damaged(problem: string): BundleError {
  return new BundleError(`not an ONNX graph that can be read: ${problem}`);
}
