/** Pictures from text in the browser, Node and Electron, with the bundles of TiUE. */
export type { LoadProgress } from "./bundle/files.js";
export type { Manifest } from "./bundle/manifest.js";
export {
  BundleError,
  Cancelled,
  DeviceError,
  InferenceError,
  OutOfMemoryError,
  RequestError,
  TiueError,
} from "./errors.js";
export { VERSION } from "./generated/version.js";
export { gaussian } from "./noise.js";
export type { Device, DeviceName, LoadOptions, Memory, Mode, RequestOptions } from "./options.js";
export { Picture, type PngOptions } from "./picture/picture.js";
export type { Record } from "./picture/record.js";
export { Pipeline, type Result } from "./pipeline.js";
export { Progress } from "./progress.js";
