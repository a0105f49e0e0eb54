/** What a page and its worker say to each other. Everything is plain data. */
import type { LoadProgress } from "../bundle/files.js";
import type { SentError } from "../errors.js";
import type { LoadOptions } from "../options.js";
import type { Report } from "../progress.js";
import type { Request } from "../request.js";
import type { EngineInfo, Sampled } from "../sampling/engine.js";

/** Options of loading that a worker needs. */
export type SentOptions = Pick<LoadOptions, "device" | "vae" | "variant" | "memory" | "threads" | "cache"> & {
  wasmPaths: string | undefined;
};

export type ToWorker =
  | { type: "load"; url: string; options: SentOptions }
  | { type: "sample"; id: number; request: Request }
  | { type: "abort"; id: number };

export type FromWorker =
  | { type: "loading"; progress: LoadProgress }
  | { type: "loaded"; info: EngineInfo }
  | { type: "failed"; error: SentError }
  | { type: "warning"; id: number | null; message: string }
  | { type: "report"; id: number; report: Report }
  | { type: "sampled"; id: number; sampled: Sampled }
  | { type: "stopped"; id: number; error: SentError };
