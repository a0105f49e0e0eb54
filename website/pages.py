"""Gather the pages of the site: documents as they are, and a page for each file or folder that a document links to."""

import os
import posixpath
import re
import shutil
from pathlib import Path

import yaml

_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"^(```.*?^```)", re.M | re.S)
PICTURES = {".png", ".svg", ".webp", ".jpg"}
_LANGUAGES = {".py": "python", ".ts": "typescript", ".js": "javascript", ".mjs": "javascript"}
_LANGUAGES |= {name: name[1:] for name in (".json", ".toml", ".sh", ".html", ".css")}


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, and leaves its tags for Python objects to the site generator."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def navigation(root: Path) -> list[str]:
    """Return the documents that the navigation of mkdocs.yml names, in order."""
    config = yaml.load((root / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)

    def leaves(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [leaf for part in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(part)]

    return leaves(config["nav"])


def gather(root: Path, start: list[str], out: Path) -> list[str]:
    """Write the pages that are reached from some documents by links.

    The folder has the form of the repository, so links between documents hold as they are written. A link to another
    file, for example a program, leads to a page that shows the file. A link to a folder leads to a list of its files.

    Args:
        root: the repository.
        start: paths of documents within it.
        out: the folder, which is made anew.

    Returns:
        The paths that were gathered.

    Raises:
        FileNotFoundError: a document links to something that does not exist.
        ValueError: a document links to a file that is neither text nor a picture.
    """
    shutil.rmtree(out, ignore_errors=True)
    waiting, done = list(start), dict.fromkeys(start)
    while waiting:
        path = waiting.pop()
        source, target = root / path, out / page(path, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix in PICTURES:
            shutil.copyfile(source, target)
            continue
        if source.is_dir():
            text = _listing(source, path)
        elif source.suffix == ".md":
            text = source.read_text(encoding="utf-8")
        else:
            target.write_text(_shown(source, path), encoding="utf-8")
            continue
        text, linked = _follow(text, path, root)
        target.write_text(text, encoding="utf-8")
        waiting += [link for link in linked if link not in done]
        done |= dict.fromkeys(linked)
    return list(done)


def page(path: str, root: Path) -> str:
    """Return the path of the page that shows a file or folder of the repository."""
    if (root / path).is_dir():
        return posixpath.join(path, "README.md")
    return path if Path(path).suffix in {".md", *PICTURES} else f"{path}.md"


def _follow(text: str, document: str, root: Path) -> tuple[str, list[str]]:
    """Return a document whose links lead to pages, and the paths that it links to. Code blocks stay as they are."""
    folder, linked = posixpath.dirname(document), []
    if (root / document).is_dir():
        folder = document

    def rewrite(match: re.Match[str]) -> str:
        before, link, after = match.groups()
        if "://" in link:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, link))
        if not (root / path).exists():
            raise FileNotFoundError(f"{document} links to {link}, which does not exist")
        linked.append(path)
        return before + posixpath.relpath(page(path, root), folder or ".") + after

    parts = [part if part.startswith("```") else _LINK.sub(rewrite, part) for part in _FENCE.split(text)]
    return "".join(parts), linked


_UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n"


def _shown(source: Path, path: str) -> str:
    """Return a page that shows a text file."""
    try:
        text = source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: a document can link to text files and pictures") from error
    return f"{_UNSEARCHED}# {path}\n\n````{_LANGUAGES.get(source.suffix, 'text')}\n{text}````\n"


def _listing(folder: Path, path: str) -> str:
    """Return a page that lists the files of a folder, or the folder's own README."""
    if (folder / "README.md").is_file():
        return (folder / "README.md").read_text(encoding="utf-8")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))
    lines = "\n".join(f"- [{name}]({name})" for name in names if Path(name).suffix in {".md", *_LANGUAGES})
    return f"{_UNSEARCHED}# {path}\n\n{lines}\n"
