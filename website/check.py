"""Read the built pages: every link leads somewhere, and a browser fetches nothing from another host."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes whose files a browser loads by itself. A reader follows <a href>, which may lead elsewhere.
_LOADED = {"src", "srcset", "poster", "data"}
_STYLES = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")


class _Page(HTMLParser):
    """The anchors of a page, the links that a reader follows, and the files that a browser loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._style = tag == "style"
        for name, value in attrs:
            if not value:
                continue
            if name in ("id", "name"):
                self.anchors.add(value)
            elif name == "href" and tag == "a":
                self.links.append(value)
            elif name == "srcset":
                self.loaded += [part.split()[0] for part in value.split(",") if part.strip()]
            elif name in _LOADED or (name == "href" and tag == "link"):
                self.loaded.append(value)
            elif name == "style":
                self.loaded += _styled(value)

    def handle_data(self, data: str) -> None:
        if self._style:
            self.loaded += _styled(data)


def problems(site: Path) -> Iterator[str]:
    """Yield one line for each dead link, missing anchor and foreign file in a folder of built pages."""
    site = site.resolve()
    for path in sorted(site.rglob("*.css")):
        yield from _foreign(path.relative_to(site).as_posix(), _styled(path.read_text(encoding="utf-8")))
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        yield from _foreign(name, page.loaded)
        if name == "404.html":
            continue  # Its links begin at the root of the host, because it is shown in place of any page.
        for link in [*page.links, *page.loaded]:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                yield f"{name}: {link} does not exist"
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].anchors:
                yield f"{name}: {link} has no such anchor"


def _foreign(name: str, loaded: list[str]) -> Iterator[str]:
    yield from (f"{name}: a browser would load {link}" for link in loaded if urlsplit(link).netloc)


def _styled(text: str) -> list[str]:
    """Return what a style sheet loads, data in the sheet itself left out."""
    found = (first or second for first, second in _STYLES.findall(text))
    return [link for link in found if not link.startswith(("data:", "#"))]
