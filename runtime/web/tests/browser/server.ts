/** A server of static files that can misbehave on demand. */
import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { extname, join } from "node:path";

const TYPES: Record<string, string> = {
  ".html": "text/html",
  ".js": "text/javascript",
  ".mjs": "text/javascript",
  ".wasm": "application/wasm",
  ".json": "application/json",
};
const PAGE = '<!doctype html><meta charset="utf-8"><title>test</title>';

/** What a test does with a request. Returns true if it has answered. */
export type Trouble = (path: string, request: IncomingMessage, response: ServerResponse) => boolean;

export class TestServer {
  /** Paths that were asked for, with the range, if any. */
  readonly log: string[] = [];
  trouble: Trouble = () => false;
  isolated = false;

  private constructor(
    readonly server: Server,
    readonly folders: Record<string, string>,
  ) {}

  /** @param folders the first part of a path => the directory of its files. */
  static async start(folders: Record<string, string>): Promise<TestServer> {
    const server = createServer();
    const own = new TestServer(server, folders);
    server.on("request", (request, response) => own.#answer(request, response));
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    return own;
  }

  get port(): number {
    return (this.server.address() as AddressInfo).port;
  }

  get origin(): string {
    return `http://localhost:${this.port}`;
  }

  reset(): void {
    this.log.length = 0;
    this.trouble = () => false;
    this.isolated = false;
  }

  async stop(): Promise<void> {
    this.server.closeAllConnections();
    await new Promise((resolve) => this.server.close(resolve));
  }

  #answer(request: IncomingMessage, response: ServerResponse): void {
    const path = decodeURIComponent(new URL(request.url ?? "/", this.origin).pathname);
    const range = /^bytes=(\d+)-$/.exec(request.headers.range ?? "");
    this.log.push(range ? `${path} from ${range[1] ?? ""}` : path);
    if (this.isolated) {
      response.setHeader("Cross-Origin-Opener-Policy", "same-origin");
      response.setHeader("Cross-Origin-Embedder-Policy", "require-corp");
    }
    if (this.trouble(path, request, response)) return;
    if (path === "/") {
      response.setHeader("Content-Type", "text/html").end(PAGE);
      return;
    }
    const [, first = "", ...rest] = path.split("/");
    const file = join(this.folders[first] ?? "/nowhere", ...rest);
    if (!existsSync(file)) {
      response.writeHead(404).end();
      return;
    }
    const { size } = statSync(file);
    const from = range ? Number(range[1]) : 0;
    response.writeHead(range ? 206 : 200, {
      "Content-Type": TYPES[extname(file)] ?? "application/octet-stream",
      "Content-Length": size - from,
      ...(range ? { "Content-Range": `bytes ${from}-${size - 1}/${size}` } : {}),
    });
    createReadStream(file, { start: from }).pipe(response);
  }
}
