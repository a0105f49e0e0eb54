"""The command `info`: what a bundle is, and what its model can draw."""

import argparse
import json

from tiue_runtime.bundle import MANIFEST, Bundle, Manifest, Prompts
from tiue_runtime.bundle.find import find_bundle
from tiue_runtime.tools.console import print_rows, write
from tiue_runtime.tools.flags import Add, bundle_flag

_SOME = 12  # names that are shown without --all


def register(add: Add) -> None:
    """Add the command."""
    parser = add("info", _describe, "describe a bundle: license, sizes, step counts, what it can draw")
    bundle_flag(parser)
    parser.add_argument("--all", action="store_true", help="print everything that the model can draw, one a line")
    parser.add_argument("--json", action="store_true", help="print bundle.json and the directory, for programs")


def _describe(arguments: argparse.Namespace) -> int:
    bundle = Bundle.load(find_bundle(arguments.bundle))
    if arguments.json:
        content = json.loads((bundle.directory / MANIFEST).read_text(encoding="utf-8"))
        # ASCII, because `write` would replace characters that the terminal cannot show by escapes foreign to JSON.
        write(json.dumps({"directory": str(bundle.directory), **content}, indent=2))
        return 0
    manifest = bundle.manifest
    rows: dict[str, object] = {
        "name": manifest.name,
        "license": manifest.license,
        "directory": bundle.directory,
        "size": f"{manifest.size / 1e6:.1f} MB in {len(manifest.files)} files; weights in {manifest.weights}",
        "precision": manifest.precision,
        "variants": ", ".join(manifest.variants),
        "vae": f"{', '.join(manifest.vaes)} (default {manifest.vaes[0]})",
        **({"safety checker": "yes; flagged pictures are blurred"} if manifest.safety_checker else {}),
        **({"upscaler": f"--upscale {manifest.upscaler.scale}"} if manifest.upscaler else {}),
        "image": _sizes(manifest),
        "prompt": f"up to {manifest.text_length} tokens",
        "steps": f"{', '.join(map(str, sorted(manifest.schedules)))} (default {manifest.default_steps})",
        **{f"from {key}": text for key, text in manifest.created_from.items()},
        **_drawable(manifest.prompts, every=arguments.all),
    }
    print_rows(rows)
    return 0


def _sizes(manifest: Manifest) -> str:
    """Name the sizes as --width and --height take them."""
    made_for = ", ".join(f"{width}x{height}" for height, width in manifest.made_for)
    return f"{made_for}; others are multiples of {manifest.size_multiple} and get a warning"


def _drawable(prompts: Prompts | None, every: bool) -> dict[str, object]:
    """Return rows that say what a model can draw."""
    if prompts is None:
        return {"knows": "the bundle does not say"} if every else {}
    rows: dict[str, object] = {"examples": "; ".join(prompts.examples)} if prompts.examples else {}
    if prompts.styles:
        rows["styles"] = ", ".join(prompts.styles)
    count = len(prompts.vocabulary)
    if every:
        rows["knows"] = "\n  ".join([f"{count} names:" if count else "no closed list of names", *prompts.vocabulary])
    elif count:
        some = ", ".join(prompts.vocabulary[:: max(count // _SOME, 1)][:_SOME])
        rows["knows"] = f"{count} names, for example {some}; all of them: tiue-runtime info --all"
    return rows
