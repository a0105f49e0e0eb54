import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from busy import wait_until_busy
from PIL import Image
from tiue_runtime import OutOfMemoryError, Pipeline
from tiue_runtime import __main__ as program
from tiue_runtime.bundle import Bundle, Prompts, write_bundle
from tiue_runtime.ort import sessions
from tiue_runtime.ort.graph import Graph
from tiue_runtime.tools.cli import main


@pytest.fixture
def run(capsys, monkeypatch, tiny):
    """run(*argv) => (exit code, stdout, stderr), with the tiny bundle as the default."""
    monkeypatch.setenv("TIUE_BUNDLE", str(tiny))

    def call(*argv):
        code = main([str(argument) for argument in argv])
        return code, *capsys.readouterr()

    return call


def test_generate_writes_the_picture_and_says_how(run, tmp_path, pipe):
    path = tmp_path / "heart.png"
    code, out, err = run("generate", "a red heart", "--out", path, "--seed", 5, "--steps", 2, "--device", "cpu")
    assert (code, err) == (0, "")
    assert f"{path}  12x8  seed 5\n" in out and "s on cpu" in out
    with Image.open(path) as image:
        record = json.loads(image.text["tiue"])
        assert [record[name] for name in ("prompt", "seed", "steps", "bundle")] == ["a red heart", 5, 2, "tiny"]
        np.testing.assert_array_equal(image, pipe("a red heart", seed=5, steps=2).images[0])
    assert [p.name for p in tmp_path.iterdir()] == ["heart.png"]


def test_several_pictures_are_numbered(run, tmp_path, pipe):
    path = tmp_path / "heart.png"
    path.write_bytes(b"old")
    arguments = ("--num-images", 10, "--seed", 1, "--width", 4, "--height", 4, "--memory", "sequential")
    assert run("generate", "a", "--out", path, *arguments)[0] == 0
    assert {p.name for p in tmp_path.iterdir()} == {f"heart-{i:02}.png" for i in range(1, 11)} | {"heart.png"}
    assert path.read_bytes() == b"old"
    with Image.open(tmp_path / "heart-10.png") as image:
        assert (json.loads(image.text["tiue"])["seed"], image.size) == (10, (4, 4))


def test_memory_vae_and_tiles_are_chosen(run, tmp_path, tiny):
    heavy = Pipeline.load(tiny.parent / "heavy", device="cpu", vae="tiny")
    path = tmp_path / "a.png"
    flags = ("--memory", "partial", "--vae", "tiny", "--vae-tiling", "--height", 160, "--width", 128)
    code, _, err = run("generate", "a", "--out", path, "--seed", 1, "--bundle", heavy.bundle.directory, *flags)
    assert code == 0 and err.count("\n") == 1 and "--width, --height: the model was made for" in err
    expected = heavy("a", seed=1, memory="partial", vae_tiling=True, height=160, width=128)
    with Image.open(path) as image:
        np.testing.assert_array_equal(image, expected.images[0])
    code, out, _ = run("bench", "--runs", 1, "--bundle", heavy.bundle.directory, *flags)
    assert code == 0 and "128x160, batch 1, 4 steps, partial, vae tiny, tiles of 128x128" in out
    assert "kl, tiny (default kl)" in run("info", "--bundle", heavy.bundle.directory)[1]


def test_prompt_in_any_script_survives_in_the_metadata(run, tmp_path):
    path = tmp_path / "a.png"
    assert run("generate", "ein rotes Herz ♥", "--out", path)[0] == 0
    with Image.open(path) as image:
        assert json.loads(image.text["tiue"])["prompt"] == "ein rotes Herz ♥"
        assert image.text["parameters"].startswith("ein rotes Herz ♥\n")


def test_an_existing_picture_is_replaced(run, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    assert run("generate", "a", "--out", path)[0] == 0
    with Image.open(path) as image:
        assert image.size == (12, 8)


def test_a_cut_prompt_is_one_warning_line(run, tmp_path):
    code, _, err = run("generate", "a red heart on the blue sea", "--out", tmp_path / "a.png")
    assert code == 0
    assert err == "tiue-runtime: warning: prompt longer than 8 tokens; this part was cut off: 'sea'\n"


MISTAKES = {
    "no folder": (["generate", "a", "--out", "TMP/none/a.png"], "--out: cannot write "),
    "folder is a file": (["generate", "a", "--out", "TMP/file/a.png"], "--out: cannot write "),
    "out is no folder": (["batch", "TMP/lines", "--out", "TMP/file"], "expected a directory, but"),
    "batch of nothing": (["batch", "TMP/file", "--out", "TMP/b", "--shards", "0"], "--shards: expected at least 1"),
    "other format": (["generate", "a", "--out", "TMP/a.gif"], "out: expected a file name that ends in .png"),
    "no prompt": (["generate", "--out", "TMP/a.png"], "--prompts FILE or --from PICTURE, got nothing"),
    "prompt and picture": (["generate", "a", "--from", "TMP/a.png"], "got both"),
    "no such picture": (["generate", "--from", "TMP/a.png"], "a.png: cannot be read"),
    "seed of a picture": (["generate", "--from", "TMP/a.png", "--seed", "1"], "--seed: with --from, the record"),
    "guidance": (["generate", "a", "--guidance-scale", "7"], "--guidance-scale: guidance was distilled"),
    "spelling of diffusers": (["generate", "a", "--guidance_scale", "7"], "--guidance-scale: guidance was distilled"),
    "prompt as a flag": (["generate", "--prompt", "a"], "write the description without a flag"),
    "flag that is close": (["generate", "a", "--sede", "2"], "--sede 2; did you mean --seed? (see"),
    "size in one flag": (["generate", "a", "--size", "512x512"], "--size 512x512; did you mean --width?"),
    "command that is close": (["genrate", "a"], "invalid choice: 'genrate'; did you mean generate? (see"),
    "flag of others": (["generate", "a", "--model", "x"], "did you mean --bundle? (see tiue-runtime generate --help)"),
    "no command": (["a red heart"], "to draw something: tiue-runtime generate a red heart"),
    "steps of diffusers": (["generate", "a", "--num-inference-steps", "4"], "use --steps"),
    "unknown command": (["draw"], "invalid choice: 'draw'"),
    "unknown flag": (
        ["generate", "a", "--out", "TMP/a.png", "--sede", "1"],
        "unrecognized arguments: --sede",
    ),
    "seed text": (["generate", "a", "--out", "TMP/a.png", "--seed", "x"], "--seed: invalid int value: 'x'"),
    "seed": (["generate", "a", "--out", "TMP/a.png", "--seed", "-1"], "--seed: expected an integer"),
    "steps": (["generate", "a", "--out", "TMP/a.png", "--steps", "3"], "--steps: this bundle was trained for"),
    "width": (["generate", "a", "--out", "TMP/a.png", "--width", "5"], "--width: expected a multiple of 4"),
    "num_images": (["generate", "a", "--out", "TMP/a.png", "--num-images", "0"], "--num-images: expected"),
    "device": (["generate", "a", "--out", "TMP/a.png", "--device", "tpu"], "--device: expected"),
    "memory": (["generate", "a", "--out", "TMP/a.png", "--memory", "none"], "--memory: invalid choice: 'none'"),
    "vae": (["generate", "a", "--out", "TMP/a.png", "--vae", "tiny"], "--vae: bundle tiny has kl, got 'tiny'"),
    "vae kind": (["bench", "--vae", "big"], "--vae: invalid choice: 'big'"),
    "bundle name": (["generate", "a", "--out", "TMP/a.png", "--bundle", "nothing"], "neither a directory"),
    "bundle path": (["info", "--bundle", "TMP/none"], "is not a directory"),
    "bundle empty": (["info", "--bundle", ""], "bundle: expected a directory or the name of an installed bundle"),
    "verify": (["verify", "--bundle", "TMP"], "has no bundle.json"),
    "runs": (["bench", "--runs", "0"], "runs: expected at least 1, got 0"),
}


@pytest.mark.parametrize("argv, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(run, tmp_path, argv, message):
    (tmp_path / "file").write_text("x")
    (tmp_path / "lines").write_text('{"prompt": "a"}')
    code, out, err = run(*(argument.replace("TMP", str(tmp_path)) for argument in argv))
    assert (code, out) == (2, "")
    assert err.startswith("tiue-runtime: error: ") and err.count("\n") == 1
    assert message in err
    assert {p.name for p in tmp_path.iterdir()} == {"file", "lines"}


def test_an_unwritable_path_is_reported_before_anything_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tiue_runtime.pipeline.Pipeline.load", lambda *_, **__: pytest.fail("loaded"))
    assert run("generate", "a", "--out", tmp_path / "none" / "a.png")[0] == 2


def test_a_failed_write_leaves_nothing_behind(run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", fail)
    code, _, err = run("generate", "a", "--out", tmp_path / "a.png")
    assert code == 2 and "No space left on device" in err
    assert not list(tmp_path.iterdir())


def test_interrupt_is_no_traceback(run, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tiue_runtime.pipeline.Pipeline.load", interrupt)
    code, _, err = run("generate", "a", "--out", tmp_path / "a.png")
    assert (code, err) == (130, "tiue-runtime: error: interrupted\n")


def test_ctrl_c_while_modules_are_imported_is_one_line(monkeypatch, capsys):
    def leave(code):
        raise SystemExit(code)

    class Importing:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "tiue_runtime.tools.cli", Importing())
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="130"):
        program.run()
    assert capsys.readouterr().err == "tiue-runtime: error: interrupted\n"


def test_info(run, tiny):
    code, out, _ = run("info")
    assert code == 0
    assert "Apache-2.0" in out and "12x8; others are multiples of 4" in out and "2, 4 (default 4)" in out
    assert "kl (default kl)" in out
    code, out, _ = run("info", "--json", "--bundle", tiny)
    content = json.loads(out)
    assert code == 0
    assert content.pop("directory") == str(tiny)
    assert content == json.loads((tiny / "bundle.json").read_text(encoding="utf-8"))


def test_verify(run, copy):
    code, out, _ = run("verify", "--bundle", copy)
    assert code == 0 and "6 files" in out
    content = (copy / "unet_decoder.onnx").read_bytes()
    (copy / "unet_decoder.onnx").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, out, err = run("verify", "--bundle", copy)
    assert (code, out) == (2, "")
    assert "unet_decoder.onnx" in err and err.count("\n") == 1


def test_doctor(run, tiny, monkeypatch):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert "CPUExecutionProvider" in out and str(tiny) in out and "onnxruntime" in out
    monkeypatch.setattr(sessions, "installed_wheels", lambda: {"onnxruntime": "1.0", "onnxruntime-gpu": "1.0"})
    monkeypatch.setenv("TIUE_BUNDLE", "nothing")
    code, out, err = run("doctor")
    assert code == 2 and "python" in out
    first, second = err.splitlines()
    assert "are installed together" in first and "'nothing' is neither" in second


def test_bench_states_its_conditions(run):
    code, out, _ = run("bench", "--runs", 2, "--device", "cpu", "--steps", 2)
    rows = dict(line.split(None, 1) for line in out.splitlines())
    assert code == 0
    assert rows["image"] == "12x8, batch 1, 2 steps, parallel, vae kl"
    assert "threads" in rows["cpu"] and "onnxruntime" in rows["versions"] and "ms" in rows["warm-up"]
    for graph in ("text_encoder", "unet_encoder", "unet_decoder", "vae_decoder", "total"):
        median, least, most = (float(part.strip("().")) for part in rows[graph].replace("..", " ").split())
        assert least <= median <= most


def test_python_dash_m(tiny):
    command = [sys.executable, "-m", "tiue_runtime", "verify", "--bundle", str(tiny)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([*command[:3], "--version"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("tiue-runtime 0.")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_terminal_that_cannot_show_a_name_does_not_stop_a_command(tiny, tmp_path, encoding):
    out = tmp_path / "\u753b\u50cf \u2764.png"
    command = [sys.executable, "-m", "tiue_runtime", "generate", "a \u2764", "--bundle", str(tiny), "--out", str(out)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([*command, "--num-images", "3"], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(list(tmp_path.iterdir())) == 3
    assert len(done.stdout.splitlines()) == 4


@pytest.mark.parametrize("arguments", [["info", "--json"], ["verify"], ["doctor"], ["--help"], ["--version"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_early_causes_no_traceback(tiny, arguments, unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered, "TIUE_BUNDLE": str(tiny)}
    assert without_reader(arguments, environment) == (0, b"")


def test_pictures_are_saved_without_a_reader(tiny, tmp_path):
    arguments = ["generate", "a", "--bundle", str(tiny), "--out", str(tmp_path / "a.png"), "--num-images", "3"]
    assert without_reader(arguments, {**os.environ, "PYTHONUNBUFFERED": "1"}) == (0, b"")
    assert len(list(tmp_path.iterdir())) == 3


def without_reader(arguments, environment):
    """Run a command whose stdout nobody reads. Returns its exit code and stderr."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "tiue_runtime", *arguments]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(write)
    return done.returncode, done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_json_is_json_in_every_encoding(copy, edit, encoding):
    edit(lambda content: content.update(license="caf\u00e9 \u2764 \U0001f600"))
    command = [sys.executable, "-m", "tiue_runtime", "info", "--json", "--bundle", str(copy)]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}, check=True)
    assert json.loads(done.stdout)["license"] == "caf\u00e9 \u2764 \U0001f600"


def test_a_full_disk_behind_stdout_is_an_error(run, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.stdout, "write", fail)
    code, _, err = run("verify")
    assert code == 2 and "No space left on device" in err


def test_errors_name_flags(run, heavy, tmp_path, monkeypatch):
    command = ("generate", "a", "--out", tmp_path / "a.png", "--bundle", heavy, "--device", "cpu")
    said = "tiue-runtime: error: --num-images, --height, --width: "
    assert run(*command, "--num-images", 10**4, "--height", 2**10, "--width", 2**10)[2].startswith(said)
    assert run(*command, "--timeout", 0)[2].startswith("tiue-runtime: error: --timeout: ")

    def fail(*_, **__):
        raise OutOfMemoryError("unet_decoder ran out of memory on cpu")

    monkeypatch.setattr(Graph, "__call__", fail)
    _, _, err = run(*command, "--no-vae-tiling")
    assert "with --memory low, allow --vae-tiling, load with --vae tiny" in err


def test_absurd_numbers_are_refused_at_once(run, tmp_path, heavy):
    command = ("generate", "a", "--out", tmp_path / "a.png", "--bundle", heavy, "--device", "cpu")
    size = ("--height", 2**10, "--width", 2**10)
    for number in (10**4, 2**63, 10**4000, -(10**4000), "9" * 5000, "1e9"):
        code, out, err = run(*command, *size, "--num-images", number)
        assert (code, out) == (2, "") and "--num-images" in err
        assert len(err) < 400 and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_a_command_the_help_is_printed(run):
    code, out, err = run()
    assert (code, err) == (0, "") and out.startswith("usage: tiue-runtime") and "generate" in out


def test_words_are_joined_and_a_new_file_is_named_after_them(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run("generate", "a", "red", "Heart/..", "--seed", 7)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-red-heart-7-again-2.png", "a-red-heart-7.png"]
    for prompt in ("\u2665" * 90, "CON", "/", "é" * 300):
        assert run("generate", prompt, "--seed", 1)[0] == 0
    assert {"con-1.png", "picture-1.png"} < {path.name for path in tmp_path.iterdir()}


def test_a_saved_picture_is_made_again(run, tmp_path):
    run("generate", "a red heart", "-o", tmp_path / "a.png", "--seed", 5, "--steps", 2)
    code, out, err = run("generate", "--from", tmp_path / "a.png", "-o", tmp_path / "b.png")
    assert (code, err) == (0, "") and "seed 5" in out
    with Image.open(tmp_path / "a.png") as first, Image.open(tmp_path / "b.png") as second:
        np.testing.assert_array_equal(first, second)


def test_the_bundle_of_a_picture_is_never_taken_as_a_path(run, tmp_path, heavy, monkeypatch):
    """A picture of a stranger must not choose a directory whose graphs are run."""
    from dataclasses import replace

    with Pipeline.load(heavy, device="cpu") as other:
        picture = other("a", seed=1, height=4, width=4).images[0]
    picture.info["tiue"] = replace(picture.record, bundle=str(heavy))
    picture.save(tmp_path / "a.png")
    code, _, err = run("generate", "--from", tmp_path / "a.png", "-o", tmp_path / "b.png")
    assert code == 2 and "was made with bundle" in err and "got tiny" in err


def test_programs_get_json_and_nothing_else(run, tmp_path):
    code, out, err = run("generate", "a", "-o", tmp_path / "a.webp", "--num-images", 2, "--seed", 3, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and [row["seed"] for row in rows] == [3, 4]
    assert [row["path"] for row in rows] == [str(tmp_path / f"a-{i}.webp") for i in (1, 2)]


def test_metadata_and_mark_can_be_left_out(run, tmp_path):
    run("generate", "a", "-o", tmp_path / "a.png", "--no-metadata", "--no-ai-mark")
    with Image.open(tmp_path / "a.png") as image:
        assert not image.text


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that can be handled")
def test_sigterm_ends_with_143_and_nothing_half_written(tmp_path, heavy):
    command = [sys.executable, "-m", "tiue_runtime", "generate", "a", "--bundle", heavy, "--device", "cpu"]
    flags = ["--num-images", "64", "--width", "512", "--height", "512", "-o", tmp_path / "a.png"]
    with subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True) as process:
        wait_until_busy(process, 1.5)
        process.terminate()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and err.endswith("tiue-runtime: error: terminated\n") and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_without_stderr_errors_do_not_go_to_stdout(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as after 2>&-
    assert run("info", "--bundle", tmp_path)[:2] == (2, "")
    code, out, _ = run("generate", "an elephant", "--json", "--out", tmp_path / "a.png", "--device", "cpu")
    assert code == 0 and json.loads(out)["prompt"] == "an elephant"


def test_info_says_what_a_model_can_draw(run, copy):
    prompts = Prompts(("a red heart", "a rocket"), tuple(f"thing {i}" for i in range(100)))
    write_bundle(copy, replace(Bundle.load(copy).manifest, prompts=prompts))
    code, out, _ = run("info", "--bundle", copy)
    assert code == 0 and "a red heart; a rocket" in out
    assert "100 names, for example thing 0, thing 8" in out and len(max(out.splitlines(), key=len)) < 300
    code, out, _ = run("info", "--all", "--bundle", copy)
    assert code == 0 and out.endswith("".join(f"\n  thing {i}" for i in range(100)) + "\n")
    write_bundle(copy, replace(Bundle.load(copy).manifest, prompts=None))
    assert "the bundle does not say" in run("info", "--all", "--bundle", copy)[1]
    assert "examples" not in run("info", "--bundle", copy)[1]
