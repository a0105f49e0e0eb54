/** The files of a bundle, wherever they lie. */
import { BundleError } from "../errors.js";
import { externalData } from "./external_data.js";
import { MANIFEST, readManifest, REMEDY, type Manifest } from "./manifest.js";
import { sha256 } from "./sha256.js";

/** Where the files of a bundle come from: a directory, or a URL. */
export interface Source {
  /** The directory or URL, for messages. */
  readonly where: string;
  /** Return bundle.json. Throws BundleError. */
  manifest(): Promise<Uint8Array>;
  /** Check that every file that the manifest lists is there, as far as that costs nothing. Throws BundleError. */
  check(manifest: Manifest): Promise<void>;
  /** Return a whole file. Throws BundleError, Cancelled. */
  read(name: string, info: FileInfo): Promise<Uint8Array<ArrayBuffer>>;
  /** Return the path of a file, or null if it is on no disk. */
  path(name: string): string | null;
  /** Whether files that were read can be read again without a network. */
  readonly canReread: boolean;
  /** Keep the files that are read from now on, if only in memory, so that they can be read again. */
  hold?(): void;
  /** Hear which files will be read, for reports of progress. */
  expect?(infos: FileInfo[]): void;
  /** Hear that all files were read. */
  complete?(): Promise<void>;
}

export interface FileInfo {
  sha256: string;
  size: number;
}

/** What loading has done so far. */
export interface LoadProgress {
  /** The file that is being fetched. */
  file: string;
  /** Bytes of all fetched files that are here. */
  loaded: number;
  /** Bytes of all files that this pipeline needs. */
  total: number;
}

/** A graph as ONNX Runtime takes it. */
export interface GraphFiles {
  model: string | Uint8Array;
  externalData: { path: string; data: Uint8Array }[];
}

/** A validated bundle. */
export class Bundle {
  private constructor(
    readonly source: Source,
    readonly manifest: Manifest,
    /** Of bundle.json, which names the hashes of all other files. */
    readonly sha256: string,
  ) {}

  /** Read and validate bundle.json. Throws BundleError. */
  static async load(source: Source): Promise<Bundle> {
    const data = await source.manifest();
    let manifest: Manifest;
    try {
      manifest = readManifest(data);
    } catch (error) {
      if (!(error instanceof BundleError)) throw error;
      throw new BundleError(`${source.where}/${MANIFEST}: ${error.message}`, { cause: error });
    }
    await source.check(manifest);
    return new Bundle(source, manifest, await sha256(data));
  }

  /** Announce files, for reports of progress. */
  expect(names: string[]): void {
    this.source.expect?.(names.map((name) => this.#info(name)));
  }

  read(name: string): Promise<Uint8Array<ArrayBuffer>> {
    return this.source.read(name, this.#info(name));
  }

  /**
   * Return the files of a graph: the model, and the external data that it names.
   *
   * @param opensFiles whether ONNX Runtime can open files by their paths.
   * @throws BundleError
   */
  async graph(file: string, opensFiles: boolean): Promise<GraphFiles> {
    const model = await this.read(file);
    const folder = file.includes("/") ? file.slice(0, file.lastIndexOf("/") + 1) : "";
    let locations: string[];
    try {
      locations = externalData(model);
    } catch (error) {
      throw new BundleError(`${this.source.where}/${file}: ${(error as Error).message}`, { cause: error });
    }
    const data = locations.map((location) => {
      this.#info(`${folder}${location}`);
      return { path: location, name: `${folder}${location}` };
    });
    const path = opensFiles ? this.source.path(file) : null;
    if (path !== null) return { model: path, externalData: [] };
    this.expect(data.map(({ name }) => name));
    // One after another: if one fails, no other goes on in the background.
    const read: GraphFiles["externalData"] = [];
    for (const { path: location, name } of data) read.push({ path: location, data: await this.read(name) });
    return { model, externalData: read };
  }

  #info(name: string): FileInfo {
    const info = Object.hasOwn(this.manifest.files, name) ? this.manifest.files[name] : undefined;
    if (!info) {
      throw new BundleError(
        `${this.source.where}: expected external data among the files of ${MANIFEST}, got ${name}. ${REMEDY}`,
      );
    }
    return info;
  }
}
