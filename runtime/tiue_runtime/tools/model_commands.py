"""The commands that get models: pull, list, remove, sign and verify."""

import argparse
import getpass
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiue_runtime.tools.console import write
from tiue_runtime.tools.flags import Add, bundle_flag

if TYPE_CHECKING:
    from tiue_runtime.hub.signature import Trust

PASSWORD_VARIABLE = "TIUE_KEY_PASSWORD"


def register(add: Add) -> None:
    """Add the commands."""
    pull = add("pull", _pull, "get a bundle from the Hub, a URL or a directory")
    pull.add_argument(
        "source", metavar="SOURCE", help="OWNER/NAME[@revision] of the Hugging Face Hub, URL or directory"
    )
    pull.add_argument("--name", help="the name that finds it (default: OWNER/NAME, else the name in bundle.json)")
    pull.add_argument("--offline", action="store_true", help="use no network, as HF_HUB_OFFLINE=1 does")
    pull.add_argument("--allow-http", action="store_true", help="accept http:// URLs of other computers")
    _trust_flags(pull)

    listing = add("list", _list, "list installed and pulled bundles and their sizes")
    listing.add_argument("--json", action="store_true", help="print JSON, for programs")

    remove = add("remove", _remove, "delete a pulled bundle, or an unfinished download")
    remove.add_argument("name", metavar="NAME", help="as `tiue-runtime list` shows it")

    sign = add("sign", _sign, "sign a bundle with a private key, offline")
    sign.add_argument("bundle", metavar="BUNDLE", help="a bundle's directory or name")
    sign.add_argument(
        "--private-key",
        type=Path,
        required=True,
        metavar="PEM",
        help=f"on an elliptic curve; {PASSWORD_VARIABLE} holds the password, if it has one",
    )
    sign.add_argument("--certificate", type=Path, metavar="PEM", help="of the key, if trust comes from certificates")
    sign.add_argument("--chain", type=Path, nargs="+", default=[], metavar="PEM", help="certificates up to the root")

    verify = add("verify", _verify, "compare every file of a bundle with its sha256")
    verify.add_argument(
        "bundle", nargs="?", metavar="BUNDLE", help="a bundle's directory or name (default: as --bundle)"
    )
    bundle_flag(verify, "bundle_flag")
    _trust_flags(verify)


def _trust_flags(parser: argparse.ArgumentParser) -> None:
    trust = parser.add_mutually_exclusive_group()
    trust.add_argument(
        "--key", type=Path, metavar="PEM", help="refuse a bundle that the holder of this key did not sign"
    )
    trust.add_argument(
        "--certificates", type=Path, nargs="+", default=[], metavar="PEM", help="the same, by root certificates"
    )


def _trust(given: argparse.Namespace) -> "Trust | None":
    from tiue_runtime.hub.signature import Trust, demanded_trust

    if given.key or given.certificates:
        return Trust(given.key, given.certificates)
    return demanded_trust()


def _pull(given: argparse.Namespace) -> int:
    from tiue_runtime.bundle import Bundle
    from tiue_runtime.hub.pull import pull
    from tiue_runtime.hub.sources import HubSource, parse_source

    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", str(int(not on_terminal)))
    of_hub = isinstance(parse_source(given.source, given.allow_http), HubSource)  # It draws bars of its own.
    progress = _Bar() if on_terminal and not of_hub else None
    try:
        pulled = pull(
            given.source,
            given.name,
            trust=_trust(given),
            offline=given.offline,
            allow_http=given.allow_http,
            report=progress,
        )
    finally:
        if progress:
            progress.end()
    bundle = Bundle.load(pulled.directory)
    write(f"{pulled.name}  {_megabytes(bundle.manifest.size)}  {bundle.manifest.license}  {pulled.directory}")
    return 0


class _Bar:
    """One line on stderr that counts megabytes."""

    def __init__(self) -> None:
        self._shown = -1

    def __call__(self, there: int, total: int) -> None:
        tenths = there * 1000 // max(total, 1)
        if tenths != self._shown:
            self._shown = tenths
            print(f"\rpulling: {there / 1e6:,.1f} of {total / 1e6:,.1f} MB", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._shown >= 0:
            print(file=sys.stderr)


def _list(given: argparse.Namespace) -> int:
    from tiue_runtime.bundle import Bundle
    from tiue_runtime.bundle.find import find_bundle, installed_bundles
    from tiue_runtime.bundle.pulled import pulled_bundles
    from tiue_runtime.errors import TiueError
    from tiue_runtime.hub.pulled_files import unfinished

    names = {name: f"package {package}" for name, package in installed_bundles().items()}
    pulled = pulled_bundles()
    names |= {name: f"pulled from {record.source}" for name, record in pulled.items() if name not in names}
    rows: list[dict[str, Any]] = []
    for name, origin in names.items():
        row: dict[str, Any] = {"name": name, "origin": origin}
        try:
            bundle = Bundle.load(find_bundle(name))
            row |= {
                "bytes": bundle.manifest.size,
                "license": bundle.manifest.license,
                "directory": str(bundle.directory),
            }
        except TiueError as error:
            row |= {"problem": str(error)}
        rows.append(row)
    rows += [{"name": source, "origin": "unfinished", "bytes": size} for source, size in unfinished().items()]
    if given.json:
        write(json.dumps(rows, indent=2))
        return 0
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        size = _megabytes(row["bytes"]) if "bytes" in row else "damaged"
        facts = [row["name"].ljust(width), size.rjust(11), row["origin"]]
        write("  ".join([*facts, row.get("license", ""), row.get("directory", ""), row.get("problem", "")]).rstrip())
    if not rows:
        write("no bundle is installed or pulled; get one: tiue-runtime pull OWNER/NAME")
    return 0


def _remove(given: argparse.Namespace) -> int:
    from tiue_runtime.hub.pulled_files import remove

    freed = remove(given.name)
    write(f"{given.name}: removed, {_megabytes(freed)} freed")
    return 0


def _sign(given: argparse.Namespace) -> int:
    from tiue_runtime.bundle import Bundle
    from tiue_runtime.bundle.find import find_bundle
    from tiue_runtime.hub.signature import sign

    password = os.environ.get(PASSWORD_VARIABLE)
    key: Path = given.private_key
    locked = password is None and key.is_file() and b"ENCRYPTED" in key.read_bytes()
    if locked and sys.stdin is not None and sys.stdin.isatty():
        password = getpass.getpass("password of the private key: ")
    bundle = Bundle.load(find_bundle(given.bundle))
    path = sign(bundle, given.private_key, password=password, certificate=given.certificate, chain=given.chain)
    write(f"{path}: signs {len(bundle.manifest.files) + 1} files")
    return 0


def _verify(given: argparse.Namespace) -> int:
    from tiue_runtime.bundle import Bundle
    from tiue_runtime.bundle.find import find_bundle
    from tiue_runtime.hub.signature import check_signature

    bundle = Bundle.load(find_bundle(given.bundle or given.bundle_flag))
    trust = _trust(given)
    if trust:
        check_signature(bundle, trust)
        write(f"{bundle.directory}: {len(bundle.manifest.files)} files are as the trusted key signed them")
    else:
        bundle.verify()
        write(f"{bundle.directory}: {len(bundle.manifest.files)} files are as the exporter wrote them")
    return 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 50_000 else f"{size / 1e3:,.1f} kB"
