"""The documentation site: pages are gathered by their links, and the built pages are checked."""

import ast
import html
import re
from types import SimpleNamespace

import pytest
import tiue_runtime
from PIL import Image
from tiue_runtime.options import RequestOptions, described

from website import __main__ as website
from website import wall
from website.check import problems
from website.pages import gather


@pytest.fixture
def repository(tmp_path):
    """A small repository: two documents, a program, and a folder."""
    for name, text in {
        "README.md": "# Home\n\n[a](docs/a.md#b) [away](https://example.org) ![p](docs/p.png) [x](code/x.py)\n",
        "docs/a.md": "# A\n\n## B\n\n[back](../README.md) [code](../code)\n\n```\n[not](a-link.md)\n```\n",
        "docs/p.png": "pixels",
        "code/x.py": "x = 1\n",
        "code/unlinked.bin": "",
        "secret.md": "no document links here",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_gathered_pages_are_those_that_links_reach(repository, tmp_path_factory):
    out = tmp_path_factory.mktemp("pages")
    gather(repository, ["README.md"], out)
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {"README.md", "docs/a.md", "docs/p.png", "code/x.py.md", "code/README.md"}
    assert "[x](code/x.py.md)" in (out / "README.md").read_text()
    assert "[away](https://example.org)" in (out / "README.md").read_text()
    assert "[code](../code/README.md)" in (out / "docs/a.md").read_text()
    assert "[not](a-link.md)" in (out / "docs/a.md").read_text()
    assert "```python\nx = 1\n```" in (out / "code/x.py.md").read_text()
    assert "(x.py.md)" in (out / "code/README.md").read_text()
    assert "unlinked" not in (out / "code/README.md").read_text()


@pytest.mark.parametrize("link", ["gone.md", "docs/gone.png", "code/gone.py", "gone/"])
def test_a_link_to_nothing_stops_the_gathering(repository, tmp_path_factory, link):
    (repository / "README.md").write_text(f"[x]({link})")
    with pytest.raises(FileNotFoundError, match=r"README\.md links to"):
        gather(repository, ["README.md"], tmp_path_factory.mktemp("pages"))


def test_a_link_to_a_file_that_is_no_text_stops_the_gathering(repository, tmp_path_factory):
    (repository / "code/unlinked.bin").write_bytes(b"\xff\xfe\x00")
    (repository / "README.md").write_text("[x](code/unlinked.bin)")
    with pytest.raises(ValueError, match=r"unlinked\.bin is no text"):
        gather(repository, ["README.md"], tmp_path_factory.mktemp("pages"))


GOOD = (
    '<h1 id="top">A</h1><a href="#top">x</a><a href="b/">b</a><a href="b/#c">c</a><a href="https://example.org">y</a>'
)
FAULTS = {
    "dead page": ('<a href="gone/">x</a>', "gone/ does not exist"),
    "dead picture": ('<img src="gone.png">', "gone.png does not exist"),
    "anchor here": ('<a href="#gone">x</a>', "#gone has no such anchor"),
    "anchor there": ('<a href="b/#gone">x</a>', "b/#gone has no such anchor"),
    "script": ('<script src="https://cdn.example.org/a.js"></script>', "a browser would load https://cdn"),
    "fonts": ('<link rel="stylesheet" href="https://fonts.example.org/a.css">', "a browser would load https://fonts"),
    "preconnect": ('<link rel="preconnect" href="//fonts.example.org">', "a browser would load //fonts"),
    "picture": ('<img src="https://example.org/count.gif">', "a browser would load https://example.org/count"),
    "pictures": ('<img srcset="https://example.org/a.png 2x">', "a browser would load https://example.org/a.png"),
    "style": (
        "<style>@import url(https://example.org/a.css)</style>",
        "a browser would load https://example.org/a.css",
    ),
    "iframe": ('<iframe src="https://example.org"></iframe>', "a browser would load https://example.org"),
}


def built(folder, more=""):
    (folder / "b").mkdir()
    (folder / "index.html").write_text(GOOD + more)
    (folder / "b" / "index.html").write_text('<h2 id="c">C</h2><a href="..">up</a><a href="../index.html#top">top</a>')
    return list(problems(folder))


def test_sound_pages_have_no_problems(tmp_path):
    assert built(tmp_path) == []


@pytest.mark.parametrize("html, said", FAULTS.values(), ids=FAULTS)
def test_faults_of_built_pages_are_found(tmp_path, html, said):
    (problem,) = built(tmp_path, html)
    assert problem.startswith(f"index.html: {said}") or problem == f"index.html: {said}"


def test_stylesheets_load_nothing_from_elsewhere(tmp_path):
    (tmp_path / "a.css").write_text("@font-face{src:url('https://fonts.example.org/a.woff2')} b{background:url(c.png)}")
    assert list(problems(tmp_path)) == ["a.css: a browser would load https://fonts.example.org/a.woff2"]


def test_a_document_may_link_to_files_of_the_site(repository, monkeypatch):
    (repository / "website").mkdir()
    (repository / "website/site.css").write_text("")
    (repository / "README.md").write_text("[style](website/site.css)")
    (repository / "mkdocs.yml").write_text("nav: [README.md]")
    monkeypatch.setattr(website, "ROOT", repository)
    monkeypatch.setattr(website.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    assert website.main() == 1  # Here, the generator fails.
    assert (repository / "build/pages/website/site.css.md").exists()


def test_the_site_builds(capfd):
    """`make docs`, with the environment of the tests. It needs no network and takes a few seconds."""
    assert website.main() == 0, capfd.readouterr().err
    api = html.unescape((website.ROOT / "build/site/docs/api/index.html").read_text(encoding="utf-8"))
    for name in set(tiue_runtime.__all__) - {"__version__"}:
        assert re.search(rf'id="tiue_runtime\.[\w.]*\b{name}"', api), name
    assert "{options}" not in api
    assert described(RequestOptions)["timeout"].option.help in api  # from an annotation
    assert "seconds: each graph that ran" in api  # from a comment: Result.timings


MESSAGE_TABLES = ("Installing", "Bundles", "Devices", "Requests", "Memory and numbers", "Files")


def test_messages_of_the_errors_page_are_those_of_the_runtime():
    """Each quoted message occurs in the runtime's code, and every exception has its row."""
    page = (website.ROOT / "docs/errors.md").read_text(encoding="utf-8")
    strings = [
        node.value
        for path in (website.ROOT / "runtime/tiue_runtime").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    sections = dict(re.findall(r"^## (.+?)$\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    for title in MESSAGE_TABLES:
        quoted = re.findall(r"^\| `(.+?)` \|", sections[title], re.M)
        assert quoted
        for part in (part.strip() for message in quoted for part in message.split("...")):
            assert any(part in string for string in strings), part
    rows = set(re.findall(r"^\| `(\w+)` \|", sections["The exceptions"], re.M))
    assert rows == {name for name in tiue_runtime.__all__ if name.endswith("Error") or name == "Cancelled"}


@pytest.mark.parametrize(
    "names, count, expected",
    [("abcd", 2, "ac"), ("abc", 3, "abc"), ("ab", 5, "ababa"), ("abcdefg", 3, "ace")],
)
def test_the_wall_goes_through_the_prompts_in_even_steps(names, count, expected):
    assert "".join(wall.prompts(tuple(names), count)) == expected


def test_the_wall_is_a_grid_of_cards():
    sheet = wall.wall([Image.new("RGB", (64, 64), "red")] * (wall.COLUMNS * wall.ROWS))
    colors = sheet.getpixel((sheet.width - 75, sheet.height - 75)), sheet.getpixel((145, 20))
    assert colors == ((255, 0, 0, 255), (0, 0, 0, 0))  # the last picture, and a gap


def test_the_wall_names_a_wrong_bundle_or_place_in_one_line(tmp_path, capsys, monkeypatch):
    for arguments in (["--bundle", str(tmp_path)], ["--out", str(tmp_path / "nowhere/wall.webp")]):
        monkeypatch.setattr(wall, "COLUMNS", 1)
        monkeypatch.setattr(wall, "ROWS", 1)
        with pytest.raises(SystemExit) as ended:
            wall.main(arguments)
        assert ended.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("python -m website.wall: error: ")


def test_the_wall_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(wall, "COLUMNS", 2)
    monkeypatch.setattr(wall, "ROWS", 1)
    assert wall.main(["--out", str(tmp_path / "wall.webp")]) == 0
    with Image.open(tmp_path / "wall.webp") as picture:
        assert picture.format == "WEBP" and picture.width > picture.height
