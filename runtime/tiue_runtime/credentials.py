"""Content credentials (C2PA): a signed statement in the file that a trained model created the picture.

The extra [c2pa] brings c2pa-python, which signs. Certificate and key are the caller's. No network is used, unless the
caller names a timestamp authority.
"""

import importlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from PIL.Image import new as new_image

from tiue_runtime import __version__
from tiue_runtime.choices import Algorithm
from tiue_runtime.errors import RequestError, clip
from tiue_runtime.metadata import AI_SOURCE

_MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
_SETTINGS = {"verify": {"verify_trust": False, "remote_manifest_fetch": False, "ocsp_fetch": False}}


@dataclass(frozen=True)
class Credentials:
    """Who signs pictures.

    Args:
        certificates: the signer's certificate and its chain, in PEM, the signer's first.
        private_key: in PEM (PKCS 8), without a password.
        algorithm: that fits the key.
        timestamp_url: of a timestamp authority (RFC 3161), which is asked over the network; None asks nobody.
    """

    certificates: bytes = field(repr=False)  # in the wrong order of files, this is the key
    private_key: bytes = field(repr=False)
    algorithm: Algorithm = "es256"
    timestamp_url: str | None = None

    @classmethod
    def load(
        cls,
        certificates: str | Path,
        private_key: str | Path,
        algorithm: Algorithm = "es256",
        timestamp_url: str | None = None,
    ) -> "Credentials":
        """Read certificates and key from PEM files.

        Raises:
            RequestError: a file cannot be read, or the algorithm is unknown.
        """
        if algorithm not in get_args(Algorithm):
            raise RequestError(f"algorithm: expected one of {', '.join(get_args(Algorithm))}, got {clip(algorithm)}")
        contents: list[bytes] = []
        for name, path in (("certificates", certificates), ("private_key", private_key)):
            try:
                contents.append(Path(path).read_bytes())
            except (OSError, ValueError) as error:
                raise RequestError(f"{name}: cannot read {clip(str(path), 300)}: {error}") from error
        return cls(contents[0], contents[1], algorithm, timestamp_url)

    def check(self) -> None:
        """Sign a picture of one pixel and read the signature back, before work is spent on a larger one.

        Raises:
            RequestError: as `sign`.
        """
        pixel = io.BytesIO()
        new_image("RGB", (1, 1)).save(pixel, "PNG")
        self.sign(pixel.getvalue(), "PNG")

    def sign(self, picture: bytes, format: str) -> bytes:
        """Return the bytes of a picture in "PNG", "JPEG" or "WEBP" with a signed manifest in it.

        The signed picture is read back. Whether viewers trust the certificate is not asked.

        Raises:
            RequestError: c2pa-python is not installed, it refuses certificates, key or algorithm, or it reads another
                signature than it wrote.
        """
        try:
            module = importlib.import_module("c2pa")
        except ImportError as error:
            raise RequestError(
                'credentials: expected c2pa-python, which is not installed: pip install "c2pa-python>=0.38,<0.39"'
            ) from error
        c2pa: Any = module
        signed = io.BytesIO()
        url = None if self.timestamp_url is None else self.timestamp_url.encode()
        try:
            info = c2pa.C2paSignerInfo(self.algorithm, self.certificates, self.private_key, url)
            with (
                c2pa.Context.from_dict(_SETTINGS) as context,
                c2pa.Signer.from_info(info) as signer,
                c2pa.Builder.from_json(json.dumps(_manifest()), context) as builder,
            ):
                builder.sign(signer, _MIME[format], io.BytesIO(picture), signed)
                with c2pa.Reader(_MIME[format], io.BytesIO(signed.getvalue()), context=context) as reader:
                    state = json.loads(reader.json()).get("validation_state")
        except (c2pa.C2paError, ValueError, TypeError) as error:
            raise RequestError(
                f"credentials: c2pa-python cannot sign with these certificates and this key: {clip(str(error), 300)}"
            ) from error
        if state not in ("Valid", "Trusted"):
            raise RequestError(f"credentials: expected a valid signature in the picture, but it reads as {state}")
        return signed.getvalue()


def _manifest() -> dict[str, Any]:
    generator = {"name": "tiue-runtime", "version": __version__}
    created = {"action": "c2pa.created", "digitalSourceType": AI_SOURCE, "softwareAgent": generator}
    return {
        "claim_generator_info": [generator],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
    }
