"""The documentation site: pages are gathered by their links, and the built pages are checked."""

import pytest

from website import __main__ as website
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


def test_the_site_builds(capfd):
    """`make docs`, with the environment of the tests. It needs no network and takes a few seconds."""
    assert website.main() == 0, capfd.readouterr().err
