"""The command `batch`: pictures of many prompts in a directory, whole after a kill at any moment."""

import gc
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiue_runtime import InferenceError, read_record
from tiue_runtime.pipeline import Pipeline
from tiue_runtime.tools.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:the model knows no word")

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
LINES = ['{"prompt": "a red heart"}', "", '{"prompt": "a blue star", "num_images": 2, "seed": 5, "name": "sub/star"}']


@pytest.fixture
def run(capsys, monkeypatch, tiny, tmp_path):
    """run(lines, *flags) => (exit code, stdout, stderr) of a batch of these lines into "out"."""
    monkeypatch.setenv("TIUE_BUNDLE", str(tiny))
    monkeypatch.chdir(tmp_path)

    def call(lines, *flags):
        text = lines if isinstance(lines, bytes) else "\n".join(lines).encode()
        (tmp_path / "p.jsonl").write_bytes(text)
        code = main(["batch", "p.jsonl", "--out", "out", *map(str, flags)])
        return code, *capsys.readouterr()

    return call


def content(folder):
    """The bytes of each file of a batch, without the lock."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != ".batch.lock"}


def rows(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_lines_become_pictures_and_a_manifest(run, tmp_path, pipe):
    code, out, err = run(LINES, "--seed", 3, "--steps", 2)
    assert (code, out, err) == (0, "out: 3 pictures, 3 new\n", "")
    made = [
        ("000001.png", "a red heart", 3, 1),
        ("sub/star-1.png", "a blue star", 5, 3),
        ("sub/star-2.png", "a blue star", 6, 3),
    ]
    assert set(content(tmp_path / "out")) == {name for name, *_ in made} | {"manifest.jsonl", "batch.json"}
    for row, (name, prompt, seed, line) in zip(rows(tmp_path / "out"), made, strict=True):
        path = tmp_path / "out" / name
        assert (row["file"], row["line"], row["sha256"]) == (name, line, hashlib.sha256(path.read_bytes()).hexdigest())
        assert (row["record"]["prompt"], row["record"]["seed"], row["record"]["steps"]) == (prompt, seed, 2)
        assert json.loads(read_record(path).to_json()) == row["record"]
        with Image.open(path) as image:
            np.testing.assert_array_equal(image, pipe(prompt, seed=seed, steps=2).images[0])


def test_pictures_without_a_seed_get_different_ones(run, tmp_path):
    assert run(['{"prompt": "a", "num_images": 2}', '{"prompt": "b"}', '{"prompt": "c", "seed": 1}'])[0] == 0
    seeds = [row["record"]["seed"] for row in rows(tmp_path / "out")]
    assert seeds[:3] == [seeds[0], seeds[0] + 1, seeds[0] + 2] and seeds[3] == 1


FAILING = {
    "guidance": ('{"prompt": "a", "guidance_scale": 7}', "guidance_scale: guidance was distilled"),
    "unknown field": (
        '{"prompt": "a", "sede": 1}',
        "unknown field 'sede'; expected some of prompt, name, num_images, seed",
    ),
    "not a flag": ('{"prompt": "a", "latents": []}', "unknown field 'latents'"),
    "no prompt": ('{"seed": 1}', "prompt: expected a string, got None"),
    "prompt": ('{"prompt": ["a"]}', "prompt: expected a string, got ['a']"),
    "seed": ('{"prompt": "a", "seed": -1}', "seed: expected an integer in"),
    "seed text": ('{"prompt": "a", "seed": "1"}', "seed: expected an integer or None, got '1'"),
    "steps": ('{"prompt": "a", "steps": 3}', "steps: this bundle was trained for 2, 4, got 3"),
    "width": ('{"prompt": "a", "width": 5}', "width: expected a multiple of 4"),
    "num_images": ('{"prompt": "a", "num_images": 0}', "num_images: expected an integer from 1"),
    "too many": ('{"prompt": "a", "num_images": 100000}', "num_images: expected at most 4,096"),
    "memory": ('{"prompt": "a", "memory": "big"}', "memory: expected one of"),
    "no object": ("[1]", "expected an object such as"),
    "no JSON": ("a red heart", "expected JSON"),
    "NaN": ('{"prompt": "a", "timeout": NaN}', "expected finite numbers"),
    "twice": ('{"prompt": "a", "prompt": "b"}', "expected every key once"),
    "half a pair": ('{"prompt": "\\ud800"}', "expected text, got bytes that are not UTF-8"),
    "upwards": ('{"prompt": "a", "name": "../a"}', "name: expected a file name inside of the directory"),
    "absolute": ('{"prompt": "a", "name": "/tmp/a"}', "name: expected a file name"),
    "hidden": ('{"prompt": "a", "name": ".a"}', "name: expected a file name"),
    "reserved": ('{"prompt": "a", "name": "con"}', "name: expected a file name"),
    "long": (f'{{"prompt": "a", "name": "{"x" * 254}"}}', "name: expected a shorter name"),
    "no text": ('{"prompt": "a", "name": 1}', "name: expected a file name"),
    "taken": (
        '{"prompt": "a", "name": "FIRST.PNG"}',
        "name: FIRST.PNG would be a second picture of the name in line 1",
    ),
    "below a picture": ('{"prompt": "a", "name": "first.png/a"}', "name: first.png is the name of a picture in line 1"),
}


def test_every_failing_line_is_reported_and_the_others_are_made(run, tmp_path):
    code, out, err = run(
        ['{"prompt": "a red heart", "name": "first"}', *(line for line, _ in FAILING.values()), '{"prompt": "the sea"}']
    )
    said = err.splitlines()
    assert code == 1 and len(said) == len(FAILING) and out.endswith(f"; {len(FAILING)} lines failed\n")
    for number, (line, (_, message)) in enumerate(zip(said, FAILING.values(), strict=True), start=2):
        assert line.startswith(f"tiue-runtime: error: line {number} of p.jsonl: ") and len(line) < 500
        assert message in line
    assert len(rows(tmp_path / "out")) == 2


def test_fail_fast_makes_nothing_of_a_wrong_file(run, tmp_path):
    code, out, err = run(['{"prompt": "a"}', "{}"], "--fail-fast")
    assert (code, out) == (2, "") and "line 2" in err and not (tmp_path / "out").exists()
    assert run(["{}"])[0] == 2 and not (tmp_path / "out").exists()


def test_a_line_that_fails_while_it_runs_is_tried_again(run, tmp_path, monkeypatch):
    call = Pipeline.__call__

    def fail(self, prompt, **options):
        if prompt == "star":
            raise InferenceError("unet_decoder failed")
        return call(self, prompt, **options)

    lines = [f'{{"prompt": "{word}"}}' for word in ("heart", "star", "sea")]
    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "__call__", fail)
        code, _, err = run(lines, "--seed", 1)
        assert code == 1 and err == "tiue-runtime: error: line 2 of p.jsonl: unet_decoder failed\n"
        assert run(lines, "--seed", 1, "--fail-fast")[0] == 1
    assert run(lines)[:2] == (0, "out: 3 pictures, 1 new\n")
    assert [row["file"] for row in rows(tmp_path / "out")] == ["000001.png", "000002.png", "000003.png"]


def test_the_same_command_makes_nothing_again_and_mends_what_is_missing(run, tmp_path, monkeypatch):
    run(LINES, "--seed", 1)
    before = content(tmp_path / "out")
    assert run(LINES, "--timeout", 99)[0] == 0
    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "load", lambda *_, **__: pytest.fail("loaded"))
        assert run(LINES)[:2] == (0, "out: 3 pictures, 0 new\n")
    (tmp_path / "out/000001.png").unlink()
    (tmp_path / "out/sub/star-2.png").write_bytes(b"damaged")
    (tmp_path / "out/.0123456789abcdef.tmp").write_bytes(b"half")
    with (tmp_path / "out/manifest.jsonl").open("ab") as file:
        file.write(b'{"file": "0000')
    assert run(LINES)[:2] == (0, "out: 3 pictures, 2 new\n")
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lines": [*LINES, '{"prompt": "c"}']}, "the file of prompts has changed since (2 lines then, 3 now)"),
        ({"flags": ["--steps", 2]}, "steps was None, now 2"),
        ({"flags": ["--format", "jpg"]}, "format was png, now jpg"),
        ({"flags": ["--no-metadata"]}, "metadata was True, now False"),
        ({"flags": ["--seed", 2]}, "seed was 1, now 2"),
        ({"flags": ["--shards", 2]}, "shards was None, now 2"),
    ],
)
def test_a_batch_of_another_kind_is_not_continued(run, tmp_path, change, message):
    run(LINES, "--seed", 1)
    before = content(tmp_path / "out")
    code, out, err = run(change.get("lines", LINES), *change.get("flags", ()))
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err and "choose another directory" in err
    assert content(tmp_path / "out") == before


def test_another_bundle_is_noticed(run, tmp_path, heavy):
    run(LINES)
    assert "the bundle was tiny, and heavy is another one" in run(LINES, "--bundle", heavy)[2]


def test_a_directory_of_other_files_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/000001.png").write_text("precious")
    code, _, err = run(LINES)
    assert code == 2 and "expected an empty or new directory" in err and "000001.png" in err
    assert content(tmp_path / "out") == {"000001.png": b"precious"}
    (tmp_path / "out/batch.json").write_text("{}")
    assert "damaged batch.json" in run(LINES)[2]


@pytest.mark.parametrize("damage", [{"options": []}, {"seed": "one"}, {"seed": None}], ids=str)
def test_a_damaged_state_is_one_line(run, tmp_path, damage):
    run(LINES)
    path = tmp_path / "out/batch.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    code, _, err = run(LINES)
    assert code == 2 and "damaged batch.json" in err


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "has none"), (b"\n\n", "has none"), (b"\xff\n", "expected UTF-8"), (b"x" * (2**20 + 1), "is longer")],
)
def test_input_that_is_no_batch_is_one_line(run, tmp_path, data, message):
    code, out, err = run(data)
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err and not (tmp_path / "out").exists()


def test_lines_come_from_stdin(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b'{"prompt": "a"}')))
    assert main(["batch", "-", "--out", "out", "--json", "--format", "webp"]) == 0
    said = capsys.readouterr().out
    assert [json.loads(said)] == rows(tmp_path / "out") and json.loads(said)["file"] == "000001.webp"


def test_two_batches_at_once_in_one_directory_are_refused(run, tmp_path):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.batch.lock"):
        code, _, err = run(LINES)
    assert code == 2 and "another batch is writing into out" in err
    assert run(LINES)[0] == 0


def test_a_full_disk_stops_with_a_remedy_and_leaves_whole_files(run, tmp_path, monkeypatch):
    from tiue_runtime import saving

    replacing, count = saving.replacing, iter(range(10))

    def full(*arguments):
        if next(count) == 2:
            raise OSError(28, "No space left on device")
        return replacing(*arguments)

    monkeypatch.setattr(saving, "replacing", full)
    code, _, err = run(LINES, "--seed", 1)
    assert code == 2 and "free some space" in err and err.count("\n") == 1
    assert len(rows(tmp_path / "out")) == 2
    assert run(LINES)[1] == "out: 3 pictures, 1 new\n"


# Shards.


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves closing to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_are_what_webdataset_reads(run, tmp_path):
    lines = [json.dumps({"prompt": f"heart {i}", "name": f"sub/h{i}" if i % 2 else None}) for i in range(5)]
    lines = [line.replace(', "name": null', "") for line in lines]
    assert run(lines, "--shards", 2, "--seed", 1)[0] == 0
    names = ["shard-000000.tar", "shard-000001.tar"]
    assert set(content(tmp_path / "out")) == {*names, "manifest.jsonl", "batch.json"}
    assert not (tmp_path / "out/sub").exists()
    made = rows(tmp_path / "out")
    assert [row["shard"] for row in made] == [names[0]] * 3 + [names[1]] * 2
    for row in made:
        with tarfile.open(tmp_path / "out" / row["shard"]) as tar:
            picture = tar.extractfile(row["file"]).read()
            assert hashlib.sha256(picture).hexdigest() == row["sha256"]
            assert json.load(tar.extractfile(row["file"].replace(".png", ".json"))) == row["record"]
    webdataset = pytest.importorskip("webdataset")
    read = list(webdataset.WebDataset([str(tmp_path / "out" / name) for name in names], shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [row["file"].removesuffix(".png") for row in made]
    assert [json.loads(sample["json"]) for sample in read] == [row["record"] for row in made]
    with Image.open(io.BytesIO(read[0]["png"])) as image:
        assert image.size == (12, 8)
    gc.collect()


def test_a_damaged_shard_is_made_again_and_keys_have_no_dots(run, tmp_path):
    run(LINES, "--shards", 2, "--seed", 1)
    before = content(tmp_path / "out")
    path = tmp_path / "out/shard-000000.tar"
    path.write_bytes(path.read_bytes()[:700])
    assert run(LINES, "--shards", 2)[:2] == (0, "out: 3 pictures, 2 new\n")
    assert content(tmp_path / "out") == before
    assert "may hold no dot" in run(['{"prompt": "a", "name": "v1.5"}'], "--shards", 1)[2]


def test_more_shards_than_pictures(run, tmp_path):
    assert run(LINES, "--shards", 9)[0] == 0
    assert len([name for name in content(tmp_path / "out") if name.endswith(".tar")]) == 3


# Stops.


def start(tiny, folder, *flags):
    command = [
        sys.executable,
        "-m",
        "tiue_runtime",
        "batch",
        "p.jsonl",
        "--out",
        "out",
        "--bundle",
        tiny,
        "--seed",
        "1",
    ]
    return subprocess.Popen([*command, *flags], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    process.communicate(timeout=60)
    return process.returncode


def size(path):
    return path.stat().st_size if path.exists() else 0


@POSIX
@pytest.mark.parametrize("flags", [[], ["--shards", "7"]], ids=["files", "shards"])
def test_killed_at_any_moment_it_continues_to_the_same_files(tiny, tmp_path, flags):
    lines = [json.dumps({"prompt": f"heart {i}", "num_images": 1 + i % 2}) for i in range(150)]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.jsonl").write_text("\n".join(lines))
    assert ended(start(tiny, tmp_path / "whole", *flags)) == 0
    moment, kills = random.Random(0), 0
    while True:
        process = start(tiny, tmp_path / "killed", *flags)
        known = size(tmp_path / "killed/out/manifest.jsonl")
        more = moment.randrange(12_000)  # bytes, of 150,000
        while process.poll() is None and size(tmp_path / "killed/out/manifest.jsonl") <= known + more:
            time.sleep(0.001)
        process.kill()
        process.communicate()
        for file, data in content(tmp_path / "killed/out").items():
            if file.endswith(".png"):
                with Image.open(io.BytesIO(data)) as image:
                    image.load()
        if process.returncode == 0:
            break
        kills += 1
        if kills >= 3:
            assert ended(start(tiny, tmp_path / "killed", *flags)) == 0
            break
    assert kills >= 2
    assert content(tmp_path / "killed/out") == content(tmp_path / "whole/out")


@POSIX
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_half_written(tiny, tmp_path, number, code):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red heart"}\n' * 5000)
    process = start(tiny, tmp_path)
    while not (tmp_path / "out/manifest.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    word = "interrupted" if code == 130 else "terminated"
    assert (process.returncode, err) == (code, f"tiue-runtime: error: {word}\n")
    made = content(tmp_path / "out")
    assert not [name for name in made if name.endswith(".tmp")]
    for row in rows(tmp_path / "out"):
        assert hashlib.sha256(made[row["file"]]).hexdigest() == row["sha256"]
