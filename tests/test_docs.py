"""Documents agree with the repository: links, paths, commands, flags and spelling."""

import ast
import contextlib
import dataclasses
import importlib
import io
import itertools
import re
from functools import cache
from pathlib import Path

import pytest
from tiue_runtime.bundle import Manifest
from tiue_runtime.record import Record
from tiue_runtime.tools import batch_lines, serve_command
from tiue_runtime.tools import cli as runtime_cli

from website.pages import navigation

ROOT = Path(__file__).parents[1]
PATTERNS = ("*.md", "docs/*.md", "models/*.md", "models/emoji/*.md", "runtime/*.md", "tests/data/*.md")
DOCUMENTS = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
FOLDERS = "website|tiue|export|runtime|recipes|benchmarks|evaluation|examples|docs|tests|models"
# The spelling that docs/glossary.md decides, and American spelling elsewhere; the pattern finds other ones.
MISSPELLED = re.compile(
    r"\b(?:licence\w*|distil(?!l)\w*|\w*(?:col|neighb|behavi|fav|hon)our\w*|grey\w*|centre\w*|catalogue\w*|\w*metre"
    r"|(?:de|re|un)?(?:quant|normal|initial|optim|recogn|serial|summar|organ|real|minim|maxim|token|random)is(?:e|ing|ation)"
    r"\w*)",
    re.I,
)
LONGEST_LINE = 120

every_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix().replace("/", "-")
)


@cache
def parts(document):
    """Split a document into its prose, and its fenced blocks as (language, content)."""
    prose, fenced, language = [], [], None
    for line in document.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            language = line[3:] if language is None else None
            if language is not None:
                fenced.append((language, []))
        elif language is None:
            prose.append(line)
        else:
            fenced[-1][1].append(line)
    return "\n".join(prose), [(language, "\n".join(lines)) for language, lines in fenced]


def blocks(document, language):
    """The fenced blocks of one language; "" is the language of commands."""
    return [content for name, content in parts(document)[1] if name == language]


def code_words(document):
    """The text of each pair of backticks in sentences and tables."""
    return re.findall(r"`([^`\n]+)`", parts(document)[0])


def anchors(document):
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", parts(document)[0], re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", parts(document)[0]):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@every_document
def test_paths_exist(document):
    sources = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("[!.]*/**/*.*") if "runs" not in path.parts]
    for word in code_words(document):
        if re.fullmatch(rf"(?:{FOLDERS})/[\w./-]*", word):
            assert (ROOT / word).exists(), word
        elif re.fullmatch(r"\w+/[\w/]*\w\.py", word):  # within a package
            assert any(source.endswith(f"/{word}") for source in sources), word


def commands(document):
    """Yield the words of each command of ours, where it stands in a block or between backticks."""
    lines = [line for block in blocks(document, "") for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *code_words(document)]:
        words = re.sub(r"\s#.*", "", line).split()
        for start, word in enumerate(words):
            if word.endswith("tiue-runtime") or (word == "-m" and start):
                yield words[start:] if word != "-m" else words[start + 1 :]
                break


@cache
def flags_of(command, verb=""):
    """The flags of a command, from its help, or from its source if it needs packages that are not here."""
    if command.startswith("examples.scale."):
        source = ROOT.joinpath(*command.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        return frozenset(re.findall(r'add_argument\("(--[\w-]+)"', source))
    return frozenset(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", help_of(command, verb)))


def help_of(command, verb):
    arguments = [verb, "--help"] if verb else ["--help"]
    if command == "tiue-runtime":
        main = runtime_cli.main
    else:
        module = importlib.import_module(command)
        if not hasattr(module, "main"):
            module = importlib.import_module("tiue.distill.cli" if command == "tiue" else f"{command}.__main__")
        main = module.main
    with contextlib.redirect_stdout(io.StringIO()) as written, pytest.raises(SystemExit):
        main(arguments)
    return written.getvalue()


WITH_VERBS = ("tiue-runtime", "recipes.baselines")
# Commands that pass their flags on, and commands of others.
OTHERS = ("venv", "pip", "pytest", "nuitka", "benchmarks.exporting", "http.server")


@every_document
def test_commands_have_the_flags_that_are_shown(document):
    for words in commands(document):
        command = "tiue-runtime" if words[0].endswith("tiue-runtime") else words[0]
        if command in OTHERS:
            continue
        verb = words[1] if command in WITH_VERBS and len(words) > 1 else ""
        known = flags_of(command, verb)
        assert known, command
        for word in words[1:]:
            if word.startswith("--"):
                assert word.partition("=")[0] in known, " ".join(words)


@every_document
def test_flags_that_are_named_exist(document):
    known = flags_of("tiue") | flags_of("export.onnx") | flags_of("tiue-runtime", "generate")
    for verb in ("batch", "info", "mcp", "pull", "sign", "verify", "serve"):
        known |= flags_of("tiue-runtime", verb)
    known |= flags_of("tiue-runtime", "info") | flags_of("recipes.emoji") | flags_of("recipes.quality")
    known |= flags_of("benchmarks.latency")
    known |= flags_of("benchmarks.memory") | flags_of("evaluation") | flags_of("evaluation.encoder")
    known |= flags_of("examples.scale.serve_replicas") | flags_of("examples.scale.draw_shards")
    for words in code_words(document):
        if words.startswith("--"):
            assert {word for word in words.split() if word.startswith("--")} <= known, words


def found(folder, pattern):
    """What a pattern finds in the files of a folder, or in one file."""
    files = [folder] if folder.is_file() else folder.rglob("*.py")
    return {name for file in files for name in re.findall(pattern, file.read_text(encoding="utf-8"), re.M)}


def modules(folder):
    return {path.stem for path in (ROOT / folder).glob("[!_]*.py")}


# The names that a document must have, because it is the place that describes them.
COMPLETE = {
    "architecture": lambda: modules("tiue") | modules("tiue/distill") | modules("export"),
    "bundle": lambda: {field.name for field in dataclasses.fields(Manifest)},
    "command-line": lambda: {
        *found(ROOT / "runtime/tiue_runtime", r'"(TIUE_\w+)"'),
        *re.findall(r"^    (\w+) ", help_of("tiue-runtime", ""), re.M),
        *batch_lines.FIELDS,
    },
    "server": lambda: {"--" + name.replace("_", "-") for name in serve_command.NAMES},
    "traceability": lambda: {field.name for field in dataclasses.fields(Record)},
    "web": lambda: found(ROOT / "runtime/web/src/options.ts", r"^  (\w+)\?:"),
}


@pytest.mark.parametrize("document", COMPLETE)
def test_a_document_has_every_name_of_the_code(document):
    text = (ROOT / f"docs/{document}.md").read_text(encoding="utf-8")
    names = COMPLETE[document]()
    assert names
    assert not {name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", text)}


@every_document
def test_python_blocks_are_python(document):
    for block in blocks(document, "python"):
        ast.parse(block)


@every_document
def test_lines_are_short(document):
    lines = document.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > LONGEST_LINE and not line.startswith("|")]


@every_document
def test_lists_and_tables_begin_after_an_empty_line(document):
    """GitHub shows them anyhow. The site shows them as text."""
    lines = parts(document)[0].splitlines()
    for before, line in itertools.pairwise(lines):
        begins = line.startswith("|") and not before.startswith(("|", "#"))
        begins |= bool(re.match(r"- |\d+\. ", line)) and not re.match(r"- |\d+\. |  |#", before)
        assert not (begins and before.strip()), line


def test_the_navigation_has_every_document():
    """A new document needs a line in mkdocs.yml."""
    named = navigation(ROOT)
    assert {path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")} <= set(named)
    assert len(named) == len(set(named))


@every_document
def test_words_have_one_spelling(document):
    assert not MISSPELLED.findall(document.read_text(encoding="utf-8"))


def test_code_has_one_spelling():
    """Names and comments of the programs that documents show, and of the packages."""
    for folder in ("benchmarks", "evaluation", "examples", "runtime/tiue_runtime", "website"):
        for path in ROOT.glob(f"{folder}/**/*.py"):
            assert not MISSPELLED.findall(path.read_text(encoding="utf-8")), path
