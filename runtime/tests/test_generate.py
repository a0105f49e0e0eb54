"""The command `generate`: prompts from files, names, sheets, progress, and signals."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiue_runtime import RequestError, read_record
from tiue_runtime.bundle.replacing import check_writable, replacing
from tiue_runtime.tools.cli import main
from tiue_runtime.tools.file_names import FIELDS, Template, slug
from tiue_runtime.tools.text_lines import LONGEST_LINE

pytestmark = pytest.mark.filterwarnings("ignore:the model knows no word")

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")
VALUES = {"prompt": "A red Heart!", "seed": 7, "index": 2, "width": 12, "height": 8, "steps": 4, "bundle": "tiny"}


@pytest.fixture
def run(capsys, monkeypatch, tiny, tmp_path):
    """run(*argv) => (exit code, stdout, stderr) of generate, in an empty directory."""
    monkeypatch.setenv("TIUE_BUNDLE", str(tiny))
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        code = main(["generate", *map(str, argv)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def stdin(monkeypatch):
    return lambda data: monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Prompts from a file.


def test_prompts_of_a_file_make_the_pictures_of_one_request(run, tmp_path, pipe):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfa red heart\r\n\n   \n a blue star \nthe sea")
    code, out, err = run("--prompts", "p.txt", "--seed", 5, "--num-images", 2, "-o", "pics/")
    assert (code, err) == (0, "") and len(out.splitlines()) == 7
    prompts = ["a red heart", "a blue star", "the sea"]
    together = pipe(prompts, num_images=2, seed=5)
    for i, image in enumerate(together.images):
        path = tmp_path / f"pics/{slug(prompts[i // 2])}-{5 + i}.png"
        with Image.open(path) as saved:
            np.testing.assert_array_equal(saved, image)
        assert read_record(path).prompt == prompts[i // 2]


def test_prompts_come_from_stdin_and_pipes(run, tmp_path, stdin):
    stdin(b"a red heart\na blue star\n")
    assert run("--prompts", "-", "--seed", 1)[0] == 0
    assert files(tmp_path) == ["a-blue-star-2.png", "a-red-heart-1.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected one prompt a line, but p.txt has none"),
        (b"\n \n\r\n", "expected one prompt a line, but p.txt has none"),
        (b"a\n\xff\xfe b\n", "expected UTF-8, but line 2 of p.txt is b'"),
        ("a red heart".encode("utf-16"), "in UTF-8, got UTF-16"),
        (b"a\n" + b"x" * (LONGEST_LINE + 1), "line 2 of p.txt is longer"),
        (b"x" * (LONGEST_LINE + 1) + b"\na", "line 1 of p.txt is longer"),
        (None, "cannot read p.txt: No such file"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_read_is_one_line(run, tmp_path, content, message):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    code, out, err = run("--prompts", "p.txt")
    assert (code, out) == (2, "") and err.startswith("tiue-runtime: error: --prompts: ") and err.count("\n") == 1
    assert message in err and len(err) < 500
    assert files(tmp_path) == ([] if content is None else ["p.txt"])


def test_a_directory_and_a_missing_stdin_are_one_line(run, tmp_path, monkeypatch):
    assert "cannot read" in run("--prompts", tmp_path)[2]
    monkeypatch.setattr("sys.stdin", None)
    assert "this process has none" in run("--prompts", "-")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--prompts", "p.txt"], "got both a description and --prompts FILE"),
        (["--prompts", "p.txt", "--from", "a.png"], "got both --prompts FILE and --from PICTURE"),
        ([], "got nothing"),
        (["--from", "a.png", "--grid"], "--grid: with --from"),
        (["a", "--seed", 2**64 - 1, "--num-images", 2], "--seed: expected an integer"),
        (["a", "--quiet", "--json"], "not allowed with argument"),
        ([b"\xff".decode("utf-8", "surrogateescape")], "expected text, got bytes that are not UTF-8"),
    ],
)
def test_what_contradicts_itself_is_refused(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err


# Names.


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{prompt}-{seed}.png", "a-red-heart-7.png"),
        ("{index:03}_{width}x{height}.jpg", "002_12x8.jpg"),
        ("{bundle}/{steps}/{{x}}.webp", "tiny/4/{x}.webp"),
        ("{seed:4}.png", "   7.png"),
    ],
)
def test_templates(template, name):
    assert Template(template)(VALUES).as_posix() == name


@pytest.mark.parametrize(
    "prompt", ["../../etc/passwd", "a/b\\c", "C:x", "con", "nul.png", "\0", ".hidden", "  ", "é" * 400]
)
def test_no_prompt_leaves_its_folder_or_makes_a_name_that_a_system_refuses(prompt, tmp_path):
    name = Template("{prompt}.png")({**VALUES, "prompt": prompt}).name
    assert not name.startswith((".", "con.", "nul.png")) and "/" not in name and len(name.encode()) < 200
    (tmp_path / name).touch()


@pytest.mark.parametrize(
    "template",
    [
        *(
            "{sede}.png",
            "{}.png",
            "{0}.png",
            "{prompt.__class__}.png",
            "{prompt[0]}.png",
            "{seed!r}.png",
            "{.png",
            "}.png",
        ),
        *("{index:9999999}.png", "{index:x}.png", "{prompt:>9999999}.png", "{seed:{width}}.png", "{index:03d3}.png"),
    ],
)
def test_other_fields_are_refused_with_those_that_exist(run, tmp_path, template):
    code, out, err = run("a", "-o", template)
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("tiue-runtime: error: --out: ")
    assert "{prompt}" in err or "{index:03}" in err
    assert all(f"{{{field}}}" in err for field in FIELDS) or "unknown" not in err
    assert not files(tmp_path)


def test_two_pictures_of_one_name_are_refused_before_drawing(run, tmp_path, monkeypatch, stdin):
    monkeypatch.setattr("tiue_runtime.pipeline.Pipeline.load", lambda *_, **__: pytest.fail("loaded"))
    code, _, err = run("a red heart", "--num-images", 2, "-o", "{prompt}.png")
    assert code == 2 and "pictures 1 and 2 would both be a-red-heart.png; add {index} or {seed}" in err
    stdin(
        "RED \u00e9\nblue\nred e\u0301".encode()
    )  # equal for systems that ignore capitals and ways of writing accents
    assert "pictures 1 and 3" in run("--prompts", "-", "-o", "{prompt}.png")[2]


def test_nothing_is_replaced_unless_asked(run, tmp_path):
    (tmp_path / "a-1.png").write_text("old")
    code, _, err = run("a", "--seed", 1, "-o", "{prompt}-{seed}.png")
    assert (
        code == 2 and "a-1.png exists already; pass --overwrite" in err and (tmp_path / "a-1.png").read_text() == "old"
    )
    for out in ([], ["-o", tmp_path], ["-o", f"{tmp_path}/"]):
        assert run("a", "--seed", 1, *out)[0] == 0
    assert files(tmp_path) == ["a-1-again-2.png", "a-1-again-3.png", "a-1-again-4.png", "a-1.png"]
    assert run("a", "--seed", 1, "-o", "{prompt}-{seed}.png", "--overwrite")[0] == 0
    assert read_record(tmp_path / "a-1.png").seed == 1


def test_a_name_taken_in_the_last_moment_is_not_replaced(run, tmp_path, monkeypatch):
    """Another process saves the same name after this one has looked for it."""
    from tiue_runtime import saving

    write = saving.save_picture

    def late(image, path, **options):
        if path.name == "a-1.png" and not path.exists():
            path.write_text("other")
        write(image, path, **options)

    monkeypatch.setattr("tiue_runtime.saving.save_picture", late)
    assert run("a", "--seed", 1)[1].startswith("a-1-again-2.png ")
    assert (tmp_path / "a-1.png").read_text() == "other" and len(files(tmp_path)) == 2
    code, _, err = run("a", "--seed", 1, "-o", "x/{prompt}-{seed}.png")
    assert code == 2 and "nothing was replaced" in err and files(tmp_path / "x") == ["a-1.png"]


@pytest.mark.parametrize("links", [True, False])
def test_of_several_writers_of_a_new_name_one_succeeds(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError(1, "no links here")))
    with replacing(tmp_path / "a", overwrite=False) as one:
        one.write(b"one")
    with pytest.raises(FileExistsError), replacing(tmp_path / "a", overwrite=False) as two:
        two.write(b"two")
    assert (tmp_path / "a").read_bytes() == b"one" and files(tmp_path) == ["a"]


def test_processes_at_once_choose_different_names(tiny, tmp_path):
    command = [
        sys.executable,
        "-m",
        "tiue_runtime",
        "generate",
        "a",
        "--seed",
        "1",
        "--bundle",
        tiny,
        "--num-images",
        "8",
    ]
    started = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    names = [line.split()[0] for process in started for line in process.communicate()[0].splitlines()[:-1]]
    assert len(set(names)) == 24 == len(files(tmp_path))


# Sheets.


def test_a_sheet_has_the_pictures_in_their_order(run, tmp_path, pipe, stdin):
    stdin(b"a red heart\na blue star\n")
    code, out, err = run("--prompts", "-", "--num-images", 3, "--grid", "--seed", 2)
    assert (code, err) == (0, "") and out.startswith("a-red-heart-2-grid.png  3x2 pictures, seeds 2 to 7, row by row\n")
    assert files(tmp_path) == ["a-red-heart-2-grid.png"]
    result = pipe(["a red heart", "a blue star"], num_images=3, seed=2)
    with Image.open(tmp_path / "a-red-heart-2-grid.png") as sheet:
        assert sheet.size == (3 * 13 + 1, 2 * 9 + 1) and "trainedAlgorithmicMedia" in sheet.text["XML:com.adobe.xmp"]
        for i, image in enumerate(result.images):
            left, top = 1 + i % 3 * 13, 1 + i // 3 * 9
            np.testing.assert_array_equal(sheet.crop((left, top, left + 12, top + 8)), image)
        assert sheet.getpixel((0, 0)) == (255, 255, 255)


def test_a_sheet_of_one_prompt_is_nearly_square_and_programs_hear_of_it(run, tmp_path):
    code, out, _ = run("a", "--num-images", 5, "--grid", "--seed", 2, "-o", "s.webp", "--json")
    row = json.loads(out)
    assert code == 0 and (row["columns"], row["seeds"], row["prompts"]) == (3, [2, 3, 4, 5, 6], ["a"])
    with Image.open(tmp_path / row["path"]) as sheet:
        assert sheet.size == (row["width"], row["height"]) == (40, 19)


def test_a_sheet_too_large_for_its_format_is_refused_before_drawing(run, monkeypatch):
    monkeypatch.setattr("tiue_runtime.pipeline.Pipeline.load", lambda *_, **__: pytest.fail("loaded"))
    code, _, err = run("a", "--num-images", 9, "--width", 6000, "--height", 4, "--grid", "-o", "s.webp")
    assert code == 2 and "--grid: a sheet of 3x3 pictures" in err and "WEBP" in err
    assert "leave out --grid" in run("a", "--num-images", 900, "--width", 4000, "--height", 400, "--grid")[2]


# What is printed.


def test_quiet_prints_nothing(run, tmp_path):
    assert run("a", "--quiet") == (0, "", "") and len(files(tmp_path)) == 1
    assert run("a", "-q", "--grid") == (0, "", "") and len(files(tmp_path)) == 2
    assert "warning" in run("a", "-q", "--width", 16)[2]


@POSIX
@pytest.mark.parametrize(("flags", "expected"), [([], True), (["--quiet"], False), (["--json"], False)])
def test_a_terminal_gets_a_bar_and_the_same_picture(tiny, tmp_path, flags, expected):
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "tiue_runtime", "generate", "a", "--seed", "1", "--bundle", tiny, "-o", "a.png"]
    done = subprocess.run([*command, *flags], cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs)
    os.set_blocking(ours, False)
    try:
        seen = os.read(ours, 65536).decode()
    except BlockingIOError:
        seen = ""
    os.close(ours), os.close(theirs)
    assert done.returncode == 0 and ("picture 1 of 1" in seen) == expected and bool(seen) == expected
    assert seen.endswith("\r") == expected  # The bar is gone.
    assert read_record(tmp_path / "a.png").memory == "parallel"  # as without a bar


def test_a_picture_is_read_once_to_make_it_again(run, tmp_path, monkeypatch):
    run("a red heart", "--seed", 5, "-o", "a.png")
    from tiue_runtime import repeating, saving

    read, calls = saving.read_record, []
    for module in (saving, repeating):
        monkeypatch.setattr(module, "read_record", lambda path: calls.append(path) or read(path))
    code, out, err = run("--from", "a.png")
    assert (code, err, len(calls)) == (0, "", 1) and out.startswith("a-red-heart-5.png ")
    with Image.open(tmp_path / "a.png") as first, Image.open(tmp_path / "a-red-heart-5.png") as second:
        np.testing.assert_array_equal(first, second)


def test_a_picture_is_made_again_within_a_time(run, tmp_path):
    run("a red heart", "--seed", 5, "-o", "a.png")
    assert run("--from", "a.png", "--timeout", 60, "-o", "b.png")[0] == 0
    code, out, err = run("--from", "a.png", "--timeout", 1e-9, "-o", "c.png")
    assert (code, out, err.count("\n")) == (2, "", 1) and "timeout: 1e-09 seconds were over" in err
    code, _, err = run("--from", "a.png", "--timeout", 60, "--steps", 4)
    assert code == 2 and "--steps: with --from, the record of the picture decides this" in err
    assert files(tmp_path) == ["a.png", "b.png"]


# Stops and faults.


@POSIX
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_between_pictures_leaves_whole_ones(tiny, tmp_path, number, code):
    (tmp_path / "p.txt").write_text("a red heart\n" * 5000)
    command = [sys.executable, "-m", "tiue_runtime", "generate", "--prompts", "p.txt", "-o", "pics/", "--bundle", tiny]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "pics").exists() or len(files(tmp_path / "pics")) < 3:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    word = "interrupted" if code == 130 else "terminated"
    assert (process.returncode, err) == (code, f"tiue-runtime: error: {word}\n")
    for path in (tmp_path / "pics").iterdir():
        assert path.suffix == ".png" and read_record(path)


@pytest.mark.parametrize(("number", "advice"), [(28, "free some space"), (30, "another disk"), (13, "may write to")])
def test_a_disk_that_refuses_is_one_line_with_a_remedy(run, tmp_path, monkeypatch, number, advice):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tiue_runtime.saving.replacing", fail)
    code, out, err = run("a", "-o", "a.png")
    assert (code, out) == (2, "") and err.count("\n") == 1 and os.strerror(number) in err and advice in err
    assert not files(tmp_path)


def test_a_key_without_c2pa_or_without_its_certificate_is_refused_before_drawing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tiue_runtime.pipeline.Pipeline.load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setitem(sys.modules, "c2pa", None)
    for name in ("chain.pem", "key.pem"):
        (tmp_path / name).write_text("x")
    assert "--private-key: content credentials need both" in run("a", "--certificates", "chain.pem")[2]
    assert "--certificates: content credentials need both" in run("a", "--private-key", "key.pem")[2]
    assert "pip install" in run("a", "--certificates", "chain.pem", "--private-key", "key.pem")[2]
    assert "--private-key: cannot read" in run("a", "--certificates", "chain.pem", "--private-key", "none.pem")[2]
    with pytest.raises(RequestError):
        Template("{")


def test_an_interrupt_right_after_a_file_is_made_leaves_none(tmp_path, monkeypatch):
    opened = os.open

    def interrupted(*arguments):
        os.close(opened(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr("tiue_runtime.bundle.replacing.os.open", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a"):
        pass
    with pytest.raises(KeyboardInterrupt):
        check_writable(tmp_path / "a")
    assert not files(tmp_path)
