"""Where bundles come from: a directory, a URL, or a repository of the Hugging Face Hub.

A source hands out bundle.json first. Then it fetches single files, by names that bundle.json lists. It may leave parts
of files behind when it fails, and it continues them the next time. It checks nothing: `pull` does.
"""

import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, cast
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener, url2pathname

from tiue_runtime import __version__
from tiue_runtime.bundle import MANIFEST, Bundle
from tiue_runtime.bundle.directory import SIGNATURE, read_limited
from tiue_runtime.bundle.manifest import MANIFEST_LIMIT
from tiue_runtime.bundle.pulled import NAME
from tiue_runtime.errors import BundleError, clip, shorten

_TIMEOUT = 30.0  # seconds without a byte
_TRIES = 3
_BLOCK = 2**20  # bytes
_HUB = "https://huggingface.co"
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
SIGNATURE_LIMIT = 16 * 2**20  # bytes

T = TypeVar("T")
Progress = Callable[[int], None]
"""Called with the bytes that arrived since the last call."""


class Source(Protocol):
    """A place that holds one bundle."""

    text: str  # the same for the same place: a canonical form of the user's words
    remote: bool  # whether it needs the network
    commit: str  # of the Hub, once bundle.json was read

    def default_name(self) -> str | None:
        """The name of the pulled bundle, or None if that is the name in bundle.json."""
        ...

    def manifest(self) -> bytes:
        """Return the content of bundle.json. Raises BundleError."""
        ...

    def fetch(self, name: str, size: int, place: Path, progress: Progress) -> None:
        """Write the file `name` of `size` bytes to `place`. Raises BundleError or OSError."""
        ...

    def signature(self) -> bytes | None:
        """Return the signature, or None if there is none. Raises BundleError."""
        ...


def parse_source(text: str, allow_http: bool = False) -> Source:
    """Return the source that a user's words mean.

    Args:
        text: a directory, a URL of a directory or of its bundle.json, or OWNER/NAME[@revision] of the Hub.
        allow_http: whether URLs may begin with http:// for other hosts than this computer.

    Raises:
        BundleError: it is none of these.
    """
    path = Path(os.path.expanduser(text))  # noqa: PTH111 (unlike Path.expanduser, also of a user that does not exist)
    try:
        if text and (path / MANIFEST).is_file():
            return DirectorySource(path)
        if text.lower().startswith("file:"):
            return DirectorySource(Path(url2pathname(urlsplit(text).path)))
    except (OSError, ValueError):
        pass  # It cannot name a directory.
    if "://" in text:
        check_url(text, allow_http)
        return _hub_page(text) or UrlSource(text, allow_http)
    if NAME.fullmatch(text) and "/" in text.partition("@")[0] and ".." not in text:
        repository, _, revision = text.partition("@")
        return HubSource(repository, revision or None)
    if path.is_absolute() or text.startswith("."):
        raise BundleError(f"source: expected a directory with a {MANIFEST}, got {shorten(text)}")
    raise BundleError(f"source: expected OWNER/NAME[@revision], a URL or a directory, got {shorten(text)}")


def _hub_page(url: str) -> "HubSource | None":
    """Return the repository whose page on the Hub a URL shows."""
    parts = urlsplit(url)
    if parts.netloc != urlsplit(_endpoint()).netloc:
        return None
    found = re.fullmatch(r"/([\w.-]+/[\w.-]+?)(?:/(?:tree|blob|resolve)/([\w.-]+)(?:/bundle\.json)?)?/?", parts.path)
    return HubSource(found[1], found[2]) if found else None


def _endpoint() -> str:
    """Return the address of the Hub. huggingface_hub reads the variable only when it is imported."""
    return (os.environ.get("HF_ENDPOINT") or _HUB).rstrip("/")


@dataclass
class DirectorySource:
    """A directory of this computer."""

    path: Path
    remote = False
    commit = ""

    def __post_init__(self) -> None:
        self.path = Path(os.path.abspath(self.path))  # noqa: PTH100 (unlike Path.resolve, links keep their names)
        self.text = str(self.path)

    def default_name(self) -> None:
        """The name is that of bundle.json."""

    def manifest(self) -> bytes:
        """Read bundle.json, and check that every file is there."""
        Bundle.load(self.path)
        return _read_small(self.path / MANIFEST, MANIFEST_LIMIT)

    def fetch(self, name: str, size: int, place: Path, progress: Progress) -> None:
        """Copy a file. Links are followed."""
        path = self.path / name
        try:
            source = path.open("rb")
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror or error}") from error
        with source, place.open("wb") as target:
            shutil.copyfileobj(source, target, _BLOCK)
        progress(size)

    def signature(self) -> bytes | None:
        """Read the signature."""
        path = self.path / SIGNATURE
        return _read_small(path, SIGNATURE_LIMIT) if path.is_file() else None


def _read_small(path: Path, most: int) -> bytes:
    try:
        return read_limited(path, most)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error


class UrlSource:
    """A directory on a web server. Files are continued where they were left, if the server can do so."""

    remote = True
    commit = ""

    def __init__(self, url: str, allow_http: bool = False) -> None:
        parts = urlsplit(url)
        path = parts.path.removesuffix(MANIFEST)
        if re.search(r"\.(zip|tar|t?gz|7z)$", path):
            raise BundleError(
                f"source: expected the URL of a directory with a {MANIFEST}, got an archive {shorten(url)}"
            )
        self._base = parts._replace(path=path if path.endswith("/") else f"{path}/", fragment="")
        self.text = self._base.geturl()
        self._opener = build_opener(_Redirects(allow_http))

    def default_name(self) -> None:
        """The name is that of bundle.json."""

    def manifest(self) -> bytes:
        """Download bundle.json."""
        return self._small(MANIFEST, MANIFEST_LIMIT)

    def signature(self) -> bytes | None:
        """Download the signature."""
        try:
            return self._small(SIGNATURE, SIGNATURE_LIMIT)
        except _MissingError:
            return None

    def fetch(self, name: str, size: int, place: Path, progress: Progress) -> None:
        """Download a file. What `place` holds already is kept, and the rest is asked for."""
        self._insist(name, lambda: self._download(name, size, place, progress))

    def _insist(self, name: str, request: Callable[[], T]) -> T:
        """Try a request again after errors of the network."""
        tries = 0
        while True:
            try:
                return request()
            except (OSError, HTTPException) as error:
                tries += 1
                if tries == _TRIES or not _is_transient(error):
                    raise self._error(name, error) from error
            time.sleep(tries - 0.5)

    def _small(self, name: str, most: int) -> bytes:
        def request() -> bytes:
            with self._open(name) as answer:
                content = answer.read(most + 1)
                if len(content) > most:
                    raise BundleError(f"{clip(self.url(name), 300)}: expected at most {most:,} bytes, got more")
                if answer.length:
                    raise HTTPException(f"the connection ended {answer.length:,} bytes early")
                return content

        return self._insist(name, request)

    def _download(self, name: str, size: int, place: Path, progress: Progress) -> None:
        have = place.stat().st_size if place.is_file() else 0
        if have >= size > 0:
            have = 0  # It is not what bundle.json describes, or it would not be asked for again.
        with self._open(name, have) as answer, self._continued(answer, place, have) as file:
            progress(file.tell())
            left = size - file.tell()
            while block := answer.read1(min(_BLOCK, left + 1)):
                left -= len(block)
                if left < 0:
                    raise BundleError(f"{clip(self.url(name), 300)}: expected {size:,} bytes, got more")
                file.write(block)
                progress(len(block))
        if left:
            raise HTTPException(f"the connection ended {left:,} bytes early")

    def _continued(self, answer: HTTPResponse, place: Path, have: int) -> IO[bytes]:
        continues = answer.status == 206 and (answer.headers.get("Content-Range") or "").startswith(f"bytes {have}-")
        if answer.status == 206 and not continues:
            raise HTTPException("the server sent another part of the file than it was asked for")
        return place.open("ab" if continues else "wb")

    def _open(self, name: str, have: int = 0) -> HTTPResponse:
        headers = {"User-Agent": f"tiue-runtime/{__version__}", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        return cast(HTTPResponse, self._opener.open(Request(self.url(name), headers=headers), timeout=_TIMEOUT))

    def url(self, name: str) -> str:
        """Return the URL of a file of the bundle."""
        return self._base._replace(path=self._base.path + quote(name)).geturl()

    def _error(self, name: str, error: Exception) -> BundleError:
        """Return the error for a user. Errors of the disk stay what they are."""
        url = clip(self.url(name), 300)
        if isinstance(error, HTTPError):
            hint = {404: f": is this the URL of a directory with a {MANIFEST}?", 401: ": it asks for a login"}
            kind = BundleError if _is_transient(error) else _MissingError  # Some servers answer 403 instead of 404.
            return kind(f"{url}: the server answered {error.code} {clip(str(error.reason))}{hint.get(error.code, '')}")
        if isinstance(error, OSError) and not _is_transient(error):
            raise error
        reason = error.reason if isinstance(error, URLError) else error
        return BundleError(f"{url} cannot be fetched: {clip(str(reason))}. Pull again to continue")


class _MissingError(BundleError):
    """The server has no such file."""


def _is_transient(error: Exception) -> bool:
    """Say whether an error is the network's, so that another try may help."""
    if isinstance(error, HTTPError):
        return error.code in (408, 429) or error.code >= 500
    return isinstance(error, URLError | HTTPException | ConnectionError | TimeoutError)


class _Redirects(HTTPRedirectHandler):
    """Follow five redirects at most, each to a URL that the user could have given. No header holds a secret."""

    max_redirections = 5

    def __init__(self, allow_http: bool) -> None:
        self._allow_http = allow_http

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> Request | None:
        check_url(newurl, self._allow_http)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # pyright: ignore[reportArgumentType]


def check_url(url: str, allow_http: bool = False) -> None:
    """Refuse a URL that is not https, or that holds a password. Raises BundleError."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise BundleError(f"source: {shorten(url)} is no URL: {error}") from error
    if parts.username or parts.password:
        raise BundleError(f"source: expected a URL without a user name or password, got one for host {host}")
    if parts.scheme not in ("https", "http") or not host or not url.isascii() or re.search(r"\s", url):
        raise BundleError(f"source: expected a URL that begins with https://, got {shorten(url)}")
    if parts.scheme == "http" and not allow_http and host not in _LOCAL_HOSTS:
        raise BundleError(
            f"source: expected https, because others can change what http carries, got {shorten(url)}; "
            "`allow_http` accepts it"
        )


class HubSource:
    """A model repository of the Hugging Face Hub. huggingface_hub finds the host, the token and the proxy."""

    remote = True

    def __init__(self, repository: str, revision: str | None) -> None:
        self.repository, self.revision = repository, revision
        self.text = f"{repository}@{revision}" if revision else repository
        self.commit = ""
        self._sizes: dict[str, int | None] = {}

    def default_name(self) -> str:
        """The name is that of the repository, with the revision if one was asked for."""
        return self.text

    def manifest(self) -> bytes:
        """Download bundle.json of the revision, and fix the commit for all other files."""
        from huggingface_hub import HfApi

        found: Any = self._ask(
            lambda: HfApi(_endpoint()).model_info(
                self.repository, revision=self.revision, files_metadata=True, timeout=_TIMEOUT
            )
        )
        self.commit = str(found.sha)
        self._sizes = {str(file.rfilename): file.size for file in found.siblings or ()}
        if MANIFEST not in self._sizes:
            raise BundleError(f"{self.text} on the Hub is no bundle: expected a file {MANIFEST} in it, found none")
        return self._small(MANIFEST, MANIFEST_LIMIT)

    def signature(self) -> bytes | None:
        """Download the signature."""
        return self._small(SIGNATURE, SIGNATURE_LIMIT) if SIGNATURE in self._sizes else None

    def fetch(self, name: str, size: int, place: Path, progress: Progress) -> None:
        """Download a file. huggingface_hub keeps parts of files beside `place`, and continues them."""
        found = self._sizes.get(name)
        if found is not None and found != size:
            raise BundleError(f"{self.text}: expected {clip(name)} of {size:,} bytes, the Hub has {found:,}")
        self._to(place.parent, name).replace(place)
        progress(size)

    def _small(self, name: str, most: int) -> bytes:
        from tempfile import TemporaryDirectory

        if (self._sizes.get(name) or 0) > most:
            raise BundleError(f"{self.text}: expected {name} of at most {most:,} bytes")
        with TemporaryDirectory() as folder:
            return _read_small(self._to(Path(folder), name), most)

    def _to(self, folder: Path, name: str) -> Path:
        import huggingface_hub

        download = partial(cast(Any, huggingface_hub).hf_hub_download, self.repository, name)
        place = folder / ".hub"
        return Path(self._ask(lambda: download(revision=self.commit, local_dir=place, endpoint=_endpoint())))

    def _ask(self, call: Callable[[], Any]) -> Any:
        """Call huggingface_hub, and turn its errors into one line. They share no base below Exception."""
        from huggingface_hub import errors

        try:
            return call()
        except errors.GatedRepoError as error:
            remedy = "accept its terms on its page, then log in with: hf auth login"
            raise BundleError(f"{self.text} on the Hub is open to members only: {remedy}") from error
        except errors.RevisionNotFoundError as error:
            raise BundleError(f"{self.repository} on the Hub has no revision {clip(str(self.revision))}") from error
        except errors.RepositoryNotFoundError as error:
            hint = "check the name; a private one needs: hf auth login"
            raise BundleError(f"the Hub has no model {self.text}, or none that this user may see: {hint}") from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
                raise  # The disk, not the network.
            raise BundleError(
                f"{self.text} cannot be fetched from the Hub: {clip(str(error) or type(error).__name__, 300)}. "
                "Pull again to continue"
            ) from error
