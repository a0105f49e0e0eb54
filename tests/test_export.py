import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from tiue_runtime import Pipeline, bundle
from tokenizers import Tokenizer
from tolerances import GOLDEN_IMAGE_LEVELS, GOLDEN_LATENTS, WEIGHTS_ONCE
from tracing import traced_once

from export import assemble as assembling
from export import parity, publish
from export import writer as files
from export.errors import ExportError
from export.onnx import main
from tiue.checkpoint import Student, save_student

SCHEDULES = {4: [751, 501, 251, 1], 2: [751, 251]}
LITTLE_NOISE = "ignore:.*almost no noise to remove"  # in the golden pipeline's one step, at timestep 1


def export(*arguments):
    return main([str(argument) for argument in arguments])


def assert_refused(capsys, status, message, beside=None, left=()):
    """Check that stderr has one line besides progress and warnings, and that nothing is left beside the target."""
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if not line.endswith(" ...") and not line.startswith("export.onnx: warning: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("export.onnx: error: ")
    assert message in lines[0]
    assert status == 2
    if beside is not None:
        assert sorted(path.name for path in beside.iterdir()) == sorted(left)


# Bundles of the golden pipeline, run as an application runs them. Each is traced for these tests.


@pytest.fixture(scope="session")
def golden_bundles(golden_directory, tmp_path_factory):
    """Bundles by step count. Each is exported when a test first asks for it."""
    root, made = tmp_path_factory.mktemp("bundles"), {}

    def bundle_for(steps):
        if steps not in made:
            made[steps] = root / str(steps)
            assert export("--ckpt", golden_directory, "--steps", steps, "--out", made[steps]) == 0
        return made[steps]

    return bundle_for


# Each number of steps is an export of its own. test_golden.py has all of them in PyTorch.
GOLDEN = [
    pytest.param(f"steps{steps}.{shape}", marks=() if steps == 4 else pytest.mark.slow)
    for steps in (1, 2, 4)
    for shape in ("batch1.size16", "batch3.size24")
]


@pytest.mark.filterwarnings(LITTLE_NOISE)
@pytest.mark.parametrize("golden", GOLDEN, indirect=True)
@pytest.mark.parametrize("memory", ["parallel", "sequential"])
def test_golden_latents_and_images(golden, golden_bundles, memory):
    pipeline = Pipeline.load(golden_bundles(golden.steps), device="cpu")
    size = {"height": golden.image_uint8.shape[2], "width": golden.image_uint8.shape[3]}
    given = {"latents": golden.noise.numpy(), "prompt_embeds": golden.prompt_embeds.numpy()}
    latents = pipeline(**given, **size, memory=memory, output_type="latent").images
    np.testing.assert_allclose(latents, golden.latents.numpy(), atol=GOLDEN_LATENTS, rtol=0)
    images = pipeline(**given, **size, memory=memory).images
    expected = golden.image_uint8.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(np.stack(images).astype(int), expected.astype(int), atol=GOLDEN_IMAGE_LEVELS, rtol=0)


@pytest.mark.filterwarnings(LITTLE_NOISE)
@pytest.mark.parametrize("golden", GOLDEN, indirect=True)
def test_golden_prompts(golden, golden_bundles):
    tokenizer = Tokenizer.from_file(str(golden_bundles(golden.steps) / bundle.TOKENIZER))
    assert [e.ids for e in tokenizer.encode_batch(golden.prompts)] == golden.input_ids.tolist()
    pipeline = Pipeline.load(golden_bundles(golden.steps), device="cpu")
    by_prompt = pipeline(golden.prompts, latents=golden.noise.numpy(), output_type="latent").images
    np.testing.assert_allclose(by_prompt, golden.latents.numpy(), atol=GOLDEN_LATENTS, rtol=0)


# Other kinds of models, from a student checkpoint, and the content of a bundle.


@pytest.fixture(scope="session")
def students(tmp_path_factory):
    """A checkpoint of every tiny model."""
    root, paths = tmp_path_factory.mktemp("students"), {}
    for make in (tiny.sd15, tiny.v_prediction, tiny.emoji):
        paths[make.__name__] = root / f"{make.__name__}.safetensors"
        shared = int(make is tiny.v_prediction)  # up blocks
        save_student(paths[make.__name__], Student(make(), 751, SCHEDULES, "tiny-teacher", shared_up_blocks=shared))
    return paths


@pytest.fixture(scope="session")
def emoji_bundle(students, tmp_path_factory):
    out = tmp_path_factory.mktemp("emoji") / "bundle"
    with traced_once():
        assert export("--ckpt", students["emoji"], "--out", out) == 0
    return out


@torch.no_grad()
def latents_of(components, prompts, noise, steps):
    from tiue.text_encoder import encode_text

    return Student(components, 751, SCHEDULES).tiue(steps)(noise, encode_text(components, prompts))


@pytest.mark.parametrize("steps", [2, 4])
def test_one_emoji_bundle_serves_every_schedule(emoji_bundle, steps):
    noise, prompts = torch.randn(2, 16, 12, 8, generator=torch.Generator().manual_seed(0)), ["a cat", "Fox"]
    pipeline = Pipeline.load(emoji_bundle, device="cpu")
    made = pipeline(prompts, latents=noise.numpy(), steps=steps, output_type="latent").images
    expected = latents_of(tiny.emoji(), prompts, noise, steps).numpy()
    np.testing.assert_allclose(made, expected, atol=GOLDEN_LATENTS, rtol=0)


def test_what_a_bundle_says(emoji_bundle):
    made = bundle.Bundle.load(emoji_bundle)
    made.verify()
    manifest = made.manifest
    assert (manifest.name, manifest.license) == ("tiny-emoji", "apache-2.0")
    assert (manifest.precision, manifest.weights) == ("fp32", "fp32")
    assert manifest.created_from["base_model"] == "tiny-teacher"
    assert (manifest.latent_channels, manifest.pixels_per_latent, manifest.size_multiple) == (16, 2, 4)
    assert (manifest.default_height, manifest.default_width, manifest.text_length) == (16, 16, 32)
    assert manifest.decoder_timesteps == (751, 501, 251, 1)
    assert {n: list(s.timesteps) for n, s in manifest.schedules.items()} == SCHEDULES
    assert manifest.default_steps == 4
    assert "tiny-emoji" in (emoji_bundle / "README.md").read_text()


def test_graphs_have_the_contracts_inputs_and_outputs(emoji_bundle):
    def signature(name):
        graph = onnx.load(emoji_bundle / bundle.GRAPH_FILES[name]).graph
        return [[value.name for value in values] for values in (graph.input, graph.output)]

    assert signature(bundle.TEXT_ENCODER) == [[bundle.INPUT_IDS, bundle.ATTENTION_MASK], [bundle.TEXT]]
    inputs, features = signature(bundle.UNET_ENCODER)
    assert inputs == [bundle.LATENTS, bundle.TEXT]
    given = [*features, bundle.STEP_INDEX, bundle.STEP_WEIGHT]  # the text is done with, once
    assert signature(bundle.UNET_DECODER) == [given, [bundle.CONTRIBUTION]]
    assert signature(bundle.VAE_DECODER) == [[bundle.LATENTS], [bundle.IMAGE]]


def test_weights_are_in_the_files_once_and_nothing_of_this_machine(emoji_bundle):
    weights = sum(4 * p.numel() for p in tiny.emoji().unet.parameters())
    graphs = [emoji_bundle / bundle.GRAPH_FILES[g] for g in (bundle.UNET_ENCODER, bundle.UNET_DECODER)]
    initializers = sum(len(i.raw_data) for g in graphs for i in onnx.load(g).graph.initializer)
    assert initializers < WEIGHTS_ONCE * weights
    home = str(Path(torch.__file__).parents[1]).encode()
    for path in emoji_bundle.iterdir():
        assert home not in path.read_bytes()
        assert b"stack_trace" not in path.read_bytes()


def test_v_prediction(students, tmp_path):
    assert export("--ckpt", students["v_prediction"], "--steps", "4", "--out", tmp_path / "v") == 0


@pytest.mark.usefixtures("traced_once")
def test_reduced_precision_and_external_data(students, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "EXTERNAL_ABOVE", 20_000)
    reduced = ("--weights", "fp16", "--text-encoder", "int8", "--name", "small")
    assert export("--ckpt", students["sd15"], "--out", tmp_path / "small", *reduced) == 0
    assert "PSNR" in capsys.readouterr().out
    made = bundle.Bundle.load(tmp_path / "small")
    assert (made.manifest.name, made.manifest.precision, made.manifest.weights) == ("small", "fp32", "fp16")
    assert made.manifest.created_from["text_encoder"] == "int8"
    assert "unet_decoder.onnx.data" in made.manifest.files
    assert len(Pipeline.load(tmp_path / "small", device="cpu")("a cat").images) == 1


# The gate, and the files that are left when something goes wrong.


@pytest.fixture
def quick(monkeypatch):
    """Let the export fail, in place of its slow part, with the error that a test sets."""

    def fail_with(error):
        def raising(*_):
            raise error

        monkeypatch.setattr(assembling, "unet_graphs", raising)

    return fail_with


@pytest.mark.usefixtures("traced_once")
def test_a_bundle_that_computes_something_else_is_not_published(students, tmp_path, monkeypatch, capsys):
    def wrong(components, dtype):
        components.text_encoder.text_model.final_layer_norm.weight.data *= 1.01
        graph = exported(components, dtype)
        components.text_encoder.text_model.final_layer_norm.weight.data /= 1.01
        return graph

    exported = assembling.text_encoder_graph
    monkeypatch.setattr(assembling, "text_encoder_graph", wrong)
    assert export("--ckpt", students["sd15"], "--out", tmp_path / "out") == 1
    assert "parity failed" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("floor_db", [None, 35.0, 30.0])
def test_the_gate_closes_on_nan_and_on_what_is_not_close(floor_db):
    good = parity.Row("portable", "g", "z", "1", max_diff=1e-4, std=1.0, psnr_db=40.0, gated=True)
    parity.judge([good], floor_db)
    for bad in (
        parity.Row("portable", "g", "z", "1", float("nan"), 1.0, float("nan"), gated=True),
        parity.Row("portable", "g", "z", "1", 0.1, 1.0, 29.9, gated=True),
    ):
        with pytest.raises(parity.ParityError, match="1 of 2 outputs"):
            parity.judge([good, bad], floor_db)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
    ],
    ids=["interrupt", "disk full", "permission"],
)
@pytest.mark.parametrize("out", ["out", "new/parents/out"])
def test_nothing_is_left_when_the_export_stops(students, tmp_path, quick, capsys, error, message, out):
    quick(error)
    assert_refused(capsys, export("--ckpt", students["sd15"], "--out", tmp_path / out), message, tmp_path)


@pytest.mark.usefixtures("traced_once")
def test_parents_are_made_and_an_empty_directory_is_filled(students, tmp_path):
    out = tmp_path / "new" / "out"
    assert export("--ckpt", students["sd15"], "--out", out) == 0
    bundle.Bundle.load(out).verify()
    (tmp_path / "empty").mkdir()
    building = tmp_path / "building"
    out.rename(building)
    publish.check_target(tmp_path / "empty", bundle.MANIFEST, overwrite=False)
    publish.publish(building, tmp_path / "empty")
    bundle.Bundle.load(tmp_path / "empty").verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


def test_an_existing_bundle_is_replaced_only_on_demand_and_only_by_a_good_one(
    students, emoji_bundle, tmp_path, quick, capsys
):
    out = tmp_path / "out"
    out.symlink_to(emoji_bundle)
    assert_refused(capsys, export("--ckpt", students["sd15"], "--out", out), "--overwrite")
    quick(OSError(28, "No space left on device"))
    assert_refused(capsys, export("--ckpt", students["sd15"], "--out", out, "--overwrite"), "No space")
    bundle.Bundle.load(out).verify()
    assert list(tmp_path.iterdir()) == [out]


def test_a_directory_that_is_not_a_bundle_is_never_replaced(students, tmp_path, capsys):
    (tmp_path / "holiday.jpg").write_text("")
    status = export("--ckpt", students["sd15"], "--out", tmp_path, "--overwrite")
    assert_refused(capsys, status, "is not a bundle", tmp_path, ["holiday.jpg"])


@pytest.mark.usefixtures("traced_once")
def test_a_link_is_followed_and_its_target_replaced(students, emoji_bundle, tmp_path):
    there, out = tmp_path / "there", tmp_path / "out"
    shutil.copytree(emoji_bundle, there)
    (there / "old").touch()
    out.symlink_to(there)
    assert export("--ckpt", students["sd15"], "--out", out, "--overwrite") == 0
    assert out.is_symlink()
    bundle.Bundle.load(there).verify()
    assert {path.name for path in tmp_path.iterdir()} == {"there", "out"} and not (there / "old").exists()


def test_overwrite_swaps(emoji_bundle, tmp_path):
    building, out = tmp_path / "building", tmp_path / "out"
    building.mkdir()
    (building / "new").touch()
    out.mkdir()
    (out / "old").touch()
    publish.publish(building, out)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]


@pytest.fixture
def directories(tmp_path):
    """A finished directory and a bundle that it replaces."""
    built, out = tmp_path / "built", tmp_path / "out"
    for path, name in ((built, "new"), (out, "old")):
        path.mkdir()
        (path / name).touch()
        (path / bundle.MANIFEST).touch()
    return built, out


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_at_every_moment_there_is_a_bundle(directories):
    built, out = directories
    seen, stop = [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.append((out / bundle.MANIFEST).exists())

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(200):
        publish.publish(built, out)
        built.mkdir()
        (built / bundle.MANIFEST).touch()
    stop.set()
    thread.join()
    assert len(seen) > 200 and all(seen)


def test_without_an_exchange_a_failed_rename_puts_the_old_one_back(directories, monkeypatch):
    built, out = directories
    monkeypatch.setattr(publish.ctypes, "CDLL", lambda *_, **__: object())
    rename = Path.rename

    def fail(self, target):
        if self == built:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="No space"):
            publish.publish(built, out)
    assert (out / "old").exists() and (built / "new").exists()
    publish.publish(built, out)
    assert {path.name for path in out.iterdir()} == {"new", bundle.MANIFEST} and not built.exists()


KILLED = """
import os, sys
from pathlib import Path
from export.publish import building
with building(Path(sys.argv[1]), print) as directory:
    (directory / "half").touch()
    if sys.argv[2] == "wait":
        print("ready", flush=True)
        sys.stdin.read()
    os._exit(9)
"""


def test_leftovers_of_a_killed_export_are_named_and_removed(tmp_path):
    out, said = tmp_path / ("x" * 255), []
    assert subprocess.run([sys.executable, "-c", KILLED, out, "die"]).returncode == 9
    (left,) = (path.name for path in tmp_path.iterdir() if path.is_dir())
    with publish.building(tmp_path / "other", said.append) as directory:
        assert directory.is_dir() and len(list(tmp_path.iterdir())) == 2
    assert said == [f"removing {left}, which a killed export left"]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_without_a_directory_is_removed(tmp_path):
    said = []
    (tmp_path / ".tiue-export-00000000.lock").touch()
    with publish.building(tmp_path / "out", said.append):
        pass
    assert said == [] and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows locks in another way")
def test_a_lock_that_another_export_takes_for_a_leftover_is_given_up(tmp_path, monkeypatch):
    import fcntl

    answers = [BlockingIOError(), None]

    def flock(*_):
        if error := answers.pop(0):
            raise error

    monkeypatch.setattr(fcntl, "flock", flock)
    with publish.building(tmp_path / "out", print) as directory:
        assert {path.name for path in tmp_path.iterdir()} == {directory.name, f"{directory.name}.lock"}
    assert answers == [] and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows locks in another way")
def test_where_files_cannot_be_locked_an_export_works_and_removes_nothing(tmp_path, monkeypatch):
    import fcntl

    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    left = tmp_path / ".tiue-export-00000000"
    left.mkdir()
    (tmp_path / f"{left.name}.lock").touch()
    with publish.building(tmp_path / "out", print) as directory:
        assert directory.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {left.name, f"{left.name}.lock"}


def test_an_export_that_is_at_work_is_left_alone(tmp_path):
    command = [sys.executable, "-c", KILLED, tmp_path / "out", "wait"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        theirs = {path for path in tmp_path.iterdir() if path.is_dir()}
        said = []
        with publish.building(tmp_path / "out", said.append) as directory:
            assert directory not in theirs
        assert said == [] and theirs == {path for path in tmp_path.iterdir() if path.is_dir()}
        other.communicate("")


def test_a_bundle_that_a_killed_export_moved_aside_comes_back(directories):
    _, out = directories
    assert subprocess.run([sys.executable, "-c", KILLED, out, "die"]).returncode == 9
    (left,) = (path for path in out.parent.iterdir() if path.name.startswith(".tiue-export-") and path.is_dir())
    out.rename(left.with_name(f"{left.name}.old"))
    with publish.building(out.with_name("other"), print):
        assert (out / "old").exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".tiue-export-")]


def test_a_bundle_that_appears_during_the_export_is_not_replaced(students, emoji_bundle, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def compare(*_):
        shutil.copytree(emoji_bundle, out)
        return parity.Comparison()

    monkeypatch.setattr(assembling, "compare_with_pytorch", compare)
    with traced_once():
        assert_refused(capsys, export("--ckpt", students["emoji"], "--out", out), "--overwrite", tmp_path, ["out"])
    bundle.Bundle.load(out).verify()


def test_a_link_to_itself_is_refused(students, tmp_path, capsys):
    out = tmp_path / "out"
    out.symlink_to(out)
    assert_refused(capsys, export("--ckpt", students["sd15"], "--out", out), "--out", tmp_path, ["out"])


@pytest.mark.skipif(sys.platform != "linux", reason="the table of mounts is Linux's")
def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ExportError, match=r"/proc is a mount point, .* name a directory in it"):
        publish.check_target(Path("/proc"), bundle.MANIFEST, overwrite=True)
    out, table = tmp_path / "a volume", tmp_path / "mountinfo"
    out.mkdir()
    table.write_text(f"36 35 8:1 /b {str(out).replace(' ', chr(92) + '040')} rw shared:1 - ext4 /dev/sda1 rw\n")
    monkeypatch.setattr(publish, "_MOUNTS", table)
    with pytest.raises(ExportError, match="a volume is a mount point"):
        publish.check_target(out, bundle.MANIFEST, overwrite=False)


def test_a_read_only_bundle_is_not_replaced(directories):
    _, out = directories
    out.chmod(0o555)
    with pytest.raises(ExportError, match="read-only"):
        publish.check_target(out, bundle.MANIFEST, overwrite=True)
    out.chmod(0o755)
    (out / bundle.MANIFEST).chmod(0o444)
    with pytest.raises(ExportError, match="read-only"):
        publish.check_target(out, bundle.MANIFEST, overwrite=True)


def no_checkpoint(path):
    return path / "none.safetensors"


def not_a_checkpoint(path):
    (path / "text.safetensors").write_text("hello")
    return path / "text.safetensors"


def empty_directory(path):
    (path / "empty").mkdir()
    return path / "empty"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (no_checkpoint, "no such checkpoint"),
        (not_a_checkpoint, "not a safetensors file"),
        (empty_directory, "model_index.json is missing"),
    ],
)
def test_a_bad_source_is_refused_in_one_line(tmp_path, capsys, source, message):
    path, out = source(tmp_path), tmp_path / "made"
    out.mkdir()
    assert_refused(capsys, export("--ckpt", path, "--out", out / "bundle"), message, out)


def test_steps_the_student_was_not_trained_for(students, tmp_path, capsys):
    status = export("--ckpt", students["sd15"], "--out", tmp_path / "out", "--steps", "3")
    assert_refused(capsys, status, "--steps 3", tmp_path)


def test_parts_that_do_not_fit(tmp_path, capsys):
    components = tiny.sd15()
    for name, changed, message in (
        ("vae", tiny.emoji().vae, "4 latent channels but the VAE 16"),
        ("unet", tiny.unet(cross_attention_dim=8), "expects text embeddings of 8"),
    ):
        parts = {**vars(components), name: changed}
        save_student(tmp_path / "s.safetensors", Student(type(components)(**parts), 751, SCHEDULES))
        status = export("--ckpt", tmp_path / "s.safetensors", "--out", tmp_path / "out")
        assert_refused(capsys, status, message, tmp_path, ["s.safetensors"])


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ((), "--ckpt"),
        (("--ckpt", "x", "--steps", "four"), "--steps"),
        (("--ckpt", "x", "--steps", "0"), "--steps"),
        (("--ckpt", "x", "--target", "gpu"), "--target"),
        (("--ckpt", "x", "--target", "cpu,cpu"), "--target"),
        (("--ckpt", "x", "--precision", "fp16", "--weights", "fp32"), "--weights"),
        (("--ckpt", "x", "--vae", "tiny"), "--vae-path"),
        (("--ckpt", "x", "--target", "cpu,web", "--precision", "fp16"), "targets cpu and web compute in fp32"),
        (("--ckpt", "x", "--no-safety-checker", "--safety-checker-path", "y"), "--safety-checker-path"),
    ],
)
def test_usage(arguments, flag, capsys):
    try:
        status = export(*arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert flag in capsys.readouterr().err.splitlines()[-1]


def test_the_module_runs_and_help_does_not_load_torch():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "export.onnx", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert "--ckpt" in shown.stdout
    assert "torch" not in shown.stderr


@pytest.mark.parametrize(
    ("folder", "start"),
    [("export", "-m export.onnx"), ("export", "-m onnx"), ("export", "onnx.py"), (".", "export/onnx.py")],
)
def test_starting_inside_the_folder_says_what_to_do(folder, start):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "runtime")])}
    command = [sys.executable, *start.split(), "--help"]
    done = subprocess.run(command, cwd=root / folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "python -m export.onnx" in done.stderr
