#!/usr/bin/env node
/** The command line: `npx tiue-runtime generate "a red heart" -o heart.png --bundle DIR`. */
import { Cancelled, TiueError } from "../errors.js";
import { VERSION } from "../generated/version.js";
import { flag, HELP, OPTIONS, parse } from "./flags.js";
import { generate } from "./generate.js";

const USER_ERROR = 2;
const SIGNALS = { SIGINT: [130, "interrupted"], SIGTERM: [143, "terminated"] } as const;

/** Run one command. Returns 0, or 2 after one line on stderr about a problem that the user can fix. */
async function main(words: string[]): Promise<number> {
  const controller = new AbortController();
  let ended: (typeof SIGNALS)[keyof typeof SIGNALS] | undefined;
  for (const [name, end] of Object.entries(SIGNALS)) {
    process.once(name, () => {
      ended = end;
      controller.abort();
    });
  }
  try {
    const [command, ...rest] = words;
    if (command === undefined || command === "--help" || command === "-h") say(HELP);
    else if (command === "--version") say(`tiue-runtime ${VERSION}`);
    else {
      const arguments_ = parse(command, rest);
      if (arguments_ === null) say(HELP);
      else await generate(arguments_, controller.signal, say, (message) => complain("warning", message));
    }
    return 0;
  } catch (error) {
    if (ended && error instanceof Cancelled) {
      complain("error", ended[1]);
      return ended[0];
    }
    const ofSystem = error instanceof Error && "code" in error && "syscall" in error;
    if (!(error instanceof TiueError) && !ofSystem) throw error;
    complain("error", error.message);
    return USER_ERROR;
  }
}

function say(text: string): void {
  process.stdout.write(`${text}\n`);
}

function complain(kind: string, message: string): void {
  process.stderr.write(`tiue-runtime: ${kind}: ${withFlags(message.split(/\s+/).join(" "))}\n`);
}

/** Replace the names of options in a message of the library by the flags of the command line. */
function withFlags(message: string): string {
  const names = OPTIONS.map(({ name }) => name).join("|");
  return message
    .replace(new RegExp(`^(${names})(?=:)`), (name) => flag(name))
    .replace(new RegExp(`\\b(${names}): "([^"]+)"`, "g"), (_, name: string, value: string) => `${flag(name)} ${value}`)
    .replace(new RegExp(`\`(${names})\``, "g"), (_, name: string) => flag(name));
}

// A reader that has gone, for example head, ends nothing.
process.stdout.on("error", () => undefined);
process.exitCode = await main(process.argv.slice(2));
// A graph that was cancelled still runs on a thread of ONNX Runtime. Nobody waits for it.
if (process.exitCode !== 0) process.exit();
