"""Signatures of bundles in OpenSSF's format (model-signing), made and verified with keys or certificates, offline.

The signature is the file model.sig in the bundle. It covers every other file. Keyless signing through Sigstore needs
the network and is left to the `model_signing` command.
"""

import base64
import importlib
import json
import os
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiue_runtime.bundle import MANIFEST, Bundle
from tiue_runtime.bundle.directory import SIGNATURE
from tiue_runtime.bundle.replacing import replacing
from tiue_runtime.errors import BundleError, clip
from tiue_runtime.host.forks import FILTERS

KEY_VARIABLE = "TIUE_KEY"


@dataclass(frozen=True)
class Trust:
    """The signer that a bundle must have: the holder of a private key, or of a certificate below one of these.

    Args:
        key: a PEM file with a public key on an elliptic curve.
        certificates: PEM files with root certificates.
    """

    key: Path | None = None
    certificates: Sequence[Path] = ()

    def __post_init__(self) -> None:
        if bool(self.key) == bool(self.certificates):
            raise BundleError("signature: expected either a public `key` or `certificates` to trust")


def sign(
    bundle: Bundle,
    private_key: Path,
    *,
    password: str | None = None,
    certificate: Path | None = None,
    chain: Sequence[Path] = (),
) -> Path:
    """Sign a bundle. An older signature is replaced.

    Args:
        bundle: its files must be as bundle.json describes them.
        private_key: a PEM file with a private key on an elliptic curve.
        password: of the private key, if it is encrypted.
        certificate: a PEM file with the certificate of the key, if trust comes from certificates.
        chain: PEM files with the certificates between it and the root.

    Returns:
        The file of the signature.

    Raises:
        BundleError: the bundle is damaged, the key cannot be used, or model-signing is not installed.
    """
    from tempfile import TemporaryDirectory

    signing, hashing = _library("signing"), _library("hashing")
    _check_readable(private_key, certificate, *chain)
    bundle.verify()
    config = signing.Config().set_hashing_config(_hashing(hashing, bundle))
    target = bundle.directory / SIGNATURE
    with _one_line(f"{bundle.directory} cannot be signed"):
        if certificate is None:
            # model-signing hands the password on to cryptography, which takes bytes.
            secret = None if password is None else password.encode()
            config.use_elliptic_key_signer(private_key=private_key, password=secret)
        else:
            config.use_certificate_signer(
                private_key=private_key, signing_certificate=certificate, certificate_chain=list(chain)
            )
        with TemporaryDirectory() as folder:
            config.sign(bundle.directory, Path(folder) / SIGNATURE)
            content = (Path(folder) / SIGNATURE).read_bytes()
    with replacing(target) as file:
        file.write(content)
    return target


def check_signature(bundle: Bundle, trust: Trust) -> None:
    """Check that a bundle is signed, and that its files are those that were signed.

    The signature covers bundle.json, and bundle.json holds the sha256 of every file that the runtime opens.

    Raises:
        BundleError: there is no signature, it is another one's, a file differs, or model-signing is not installed.
    """
    path = bundle.directory / SIGNATURE
    if not path.is_file():
        raise BundleError(f"{bundle.directory} is not signed, and a signature is demanded: refused")
    verifying = _library("verifying")
    _check_readable(trust.key, *trust.certificates)
    config = verifying.Config()
    with _one_line(f"{bundle.directory}: the signature is not valid for the demanded key"):
        if trust.key:
            config.use_elliptic_key_verifier(public_key=trust.key)
        else:
            config.use_certificate_verifier(certificate_chain=list(trust.certificates))
        config.set_hashing_config(_hashing(_library("hashing"), bundle))
        config.verify(bundle.directory, path)
        statement = json.loads(base64.b64decode(json.loads(path.read_bytes())["dsseEnvelope"]["payload"]))
        signed = {str(resource["name"]) for resource in statement["predicate"]["resources"]}
    if MANIFEST not in signed:
        raise BundleError(f"{bundle.directory}: the signature does not cover {MANIFEST}: refused")
    bundle.verify()


def demanded_trust() -> Trust | None:
    """Return the trust that the environment variable TIUE_KEY demands of every bundle: the path of a public key."""
    key = os.environ.get(KEY_VARIABLE)
    return Trust(Path(key)) if key else None


def _hashing(hashing: Any, bundle: Bundle) -> Any:
    """Return the settings that hash bundle.json and the files that it lists, and nothing else in the directory."""
    directory, listed = bundle.directory, {MANIFEST, *bundle.manifest.files}
    files = (path for path in directory.rglob("*") if path.is_file())
    names = (path.relative_to(directory) for path in files)
    ignored = [name for name in names if name.as_posix() not in listed]
    return hashing.Config().set_ignored_paths(paths=ignored).set_allow_symlinks(True)


def _library(module: str) -> Any:
    """Import a module of model-signing when it is needed."""
    try:
        with FILTERS.hold(), warnings.catch_warnings(action="ignore"):
            return importlib.import_module(f"model_signing.{module}")
    except ImportError as error:
        raise BundleError(f"signatures need model-signing ({error}): pip install model-signing pyopenssl") from error


def _check_readable(*paths: Path | None) -> None:
    for path in filter(None, paths):
        try:
            path.read_bytes()
        except OSError as error:
            raise BundleError(f"key: {clip(str(path), 300)} cannot be read: {error.strerror or error}") from error


@contextmanager
def _one_line(problem: str) -> Generator[None]:
    """Turn the exceptions of model-signing, which share no base, into one line."""
    try:
        yield
    except BundleError:
        raise
    except Exception as error:
        raise BundleError(f"{problem}: {clip(str(error) or type(error).__name__, 300)}") from error
