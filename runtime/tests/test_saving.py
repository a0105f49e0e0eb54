"""Files of pictures: written under a random name and renamed, with their metadata, and read back."""

import errno
import io
import json
import os
import pickle
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from tiue_runtime import Pipeline, RequestError, read_record
from tiue_runtime.bundle.replacing import replacing
from tiue_runtime.images import Picture
from tiue_runtime.metadata import AI_SOURCE
from tiue_runtime.saving import check_picture_path, save_picture

pytestmark = pytest.mark.filterwarnings("ignore:the model knows no word")  # the prompts are strange on purpose

POSIX = pytest.mark.skipif(os.name != "posix", reason="links and permissions of POSIX")


@pytest.fixture
def picture():
    return Image.new("RGB", (2, 2), "red")


def is_red(path):
    with Image.open(path) as image:
        return image.getpixel((0, 0)) == (255, 0, 0)


def test_the_folder_is_tested_and_left_unchanged(tmp_path):
    check_picture_path(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_the_longest_legal_name(tmp_path, picture):
    path = tmp_path / ("x" * 251 + ".png")
    check_picture_path(path)
    save_picture(picture, path)
    assert is_red(path) and len(list(tmp_path.iterdir())) == 1


def test_files_left_by_a_killed_process_do_no_harm(tmp_path, picture, monkeypatch):
    """Names are random. If one is taken, another one is tried."""
    names = iter(["taken", "taken", "free"])
    monkeypatch.setattr("tiue_runtime.bundle.replacing.secrets.token_hex", lambda _: next(names))
    (tmp_path / ".taken.tmp").write_text("left behind")
    save_picture(picture, tmp_path / "a.png")
    assert is_red(tmp_path / "a.png") and (tmp_path / ".taken.tmp").read_text() == "left behind"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".taken.tmp", "a.png"]


@POSIX
def test_a_link_is_followed(tmp_path, picture):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.png").symlink_to(tmp_path / "folder" / "b.png")
    for _ in range(2):  # First the link points to nothing, then to a file.
        check_picture_path(tmp_path / "a.png")
        save_picture(picture, tmp_path / "a.png")
        assert (tmp_path / "a.png").is_symlink() and is_red(tmp_path / "folder" / "b.png")


@POSIX
def test_a_link_to_itself_is_an_error(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(RequestError, match="out: cannot write"):
        check_picture_path(tmp_path / "a.png")


@POSIX
def test_a_read_only_file_is_not_replaced(tmp_path, picture):
    path = tmp_path / "a.png"
    path.write_text("precious")
    path.chmod(0o444)
    with pytest.raises(RequestError, match=r"out: cannot write .*a\.png is read-only"):
        check_picture_path(path)
    with pytest.raises(PermissionError, match="read-only"):
        save_picture(picture, path)
    assert path.read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


@POSIX
def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(RequestError, match="is not a regular file"):
        check_picture_path(tmp_path / "a.png")


@POSIX
def test_permissions_of_the_file_stay(tmp_path, picture):
    path = tmp_path / "a.png"
    save_picture(picture, path)
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600
    path.chmod(0o640)
    save_picture(picture, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a.png").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.png") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.png", "old")]


@pytest.mark.parametrize("name", ["x" * 252 + ".png", "x" * 9000 + ".png", "a\0.png"])
def test_a_name_that_no_system_has_is_refused_in_a_short_line(tmp_path, name):
    with pytest.raises(RequestError, match=r"^out: cannot write ") as refused:
        check_picture_path(tmp_path / name)
    assert len(str(refused.value)) < 500


ENDINGS = ("png", "jpg", "jpeg", "webp")
HOSTILE = {
    "plain": "a red heart",
    "lines": "a\nNegative prompt: b\nSteps: 1, Seed: 2, Size: 3x3\r\n",
    "marks": """a, "red": 'heart' & <b>&quot;</b> \\ tiue:Record="x" ]]>""",
    "scripts": "ein rotes Herz \u2665 \U0001f600 \u202e \ufffe",
    "control": "a\0b\x1b[31m\x7f\x85",
    "empty": "",
    "long": "red " * 3000,
}
every_ending = pytest.mark.parametrize("ending", ENDINGS)
cut = pytest.mark.filterwarnings("ignore:prompt longer than")


def fields(path):
    """Return the text `parameters`, the XMP, and the size of a file."""
    with Image.open(path) as image:
        comment = image.getexif().get_ifd(0x8769).get(0x9286, b"")
        parameters = image.info.get("parameters", comment.removeprefix(b"UNICODE\0").decode("utf-16-be"))
        xmp = image.info.get("xmp", b"")
        return parameters, xmp if isinstance(xmp, str) else xmp.decode(), image.size


@cut
@every_ending
@pytest.mark.parametrize("prompt", HOSTILE.values(), ids=HOSTILE)
def test_every_prompt_is_read_back_as_given(pipe, tmp_path, ending, prompt):
    result = pipe(prompt, seed=5, steps=2)
    (path,) = result.save(tmp_path / f"a.{ending}")
    record = read_record(path)
    assert record == result.images[0].record
    ElementTree.fromstring(fields(path)[1])  # XML, whatever the prompt holds
    assert (record.prompt, record.seed, record.steps, record.bundle) == (prompt, 5, 2, "tiny")
    assert (record.bundle_sha256, record.height, record.width) == (pipe.bundle.sha256, 8, 12)
    assert record.versions["numpy"] == np.__version__ and "onnxruntime" in " ".join(record.versions)


@every_ending
def test_parameters_are_text_that_webui_reads(pipe, tmp_path, ending):
    (path,) = pipe("a red heart,\nof \u2665", seed=5).save(tmp_path / f"a.{ending}")
    parameters, xmp, _ = fields(path)
    *prompt, last = parameters.split("\n")
    assert prompt == ["a red heart,", "of \u2665"]
    found = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert (found["Steps"], found["Seed"], found["Size"], found["Model"]) == ("4", "5", "12x8", "tiny")
    assert len(found["Model hash"]) == 10 and found["Version"].startswith("tiue-runtime ")
    assert f'Iptc4xmpExt:DigitalSourceType="{AI_SOURCE}"' in xmp


@every_ending
@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("mark", [True, False])
def test_record_and_mark_are_switched_off_each_by_itself(pipe, tmp_path, ending, metadata, mark):
    path = tmp_path / f"a.{ending}"
    pipe("a red heart", seed=5).images[0].save(path, metadata=metadata, ai_mark=mark)
    content = path.read_bytes()
    assert (b"trainedAlgorithmicMedia" in content) == mark
    assert (b"bundle_sha256" in content) == metadata
    assert ("Seed: 5" in fields(path)[0]) == metadata
    if not metadata:
        with pytest.raises(RequestError, match="found none"):
            read_record(path)


@every_ending
def test_no_file_holds_a_path_of_this_computer(pipe, tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    pipe("a red heart", seed=5).save(path)
    content = path.read_bytes()
    for place in (pipe.bundle.directory, tmp_path, Path.home()):
        assert str(place).encode() not in content and str(place).encode("utf-16-be") not in content


def test_pixels_of_a_png_are_those_of_the_result(pipe, tmp_path):
    result = pipe("a red heart", seed=5)
    result.images[0].save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(image, result.images[0])


def test_results_save_all_pictures_and_arrays_too(pipe, tmp_path):
    paths = pipe("a red heart", seed=5, num_images=2).save(tmp_path / "a.png")
    arrays = pipe("a red heart", seed=5, num_images=2, output_type="np").save(str(tmp_path / "b.png"))
    assert [path.name for path in paths + arrays] == ["a-1.png", "a-2.png", "b-1.png", "b-2.png"]
    assert [read_record(path) for path in paths] == [read_record(path) for path in arrays]
    assert [read_record(path).seed for path in paths] == [5, 6]
    with pytest.raises(RequestError, match="got latents"):
        pipe("a red heart", output_type="latent").save(tmp_path / "c.png")
    assert len(list(tmp_path.iterdir())) == 4


def test_copies_crops_and_pickles_keep_the_record(pipe, tmp_path):
    picture = pipe("a red heart", seed=5).images[0]
    for derived in (picture.copy(), picture.resize((30, 20)), picture.crop((0, 0, 4, 4)), picture.convert("L")):
        assert isinstance(derived, Picture)
        assert pickle.loads(pickle.dumps(derived)).record == picture.record
        derived.save(tmp_path / "a.png")
        assert read_record(tmp_path / "a.png") == picture.record


def test_options_of_pillow_reach_the_format(pipe, tmp_path):
    picture = pipe("a red heart", seed=5, height=64, width=64).images[0]
    sizes = []
    for quality in (5, 100):
        picture.save(tmp_path / "a.jpg", quality=quality)
        sizes.append((tmp_path / "a.jpg").stat().st_size)
    assert sizes[0] < sizes[1]
    buffer = io.BytesIO()
    picture.save(buffer, "png", compress_level=0)
    assert buffer.getvalue().startswith(b"\x89PNG")
    with pytest.raises(RequestError, match=r"exif: .*metadata=False"):
        picture.save(tmp_path / "a.jpg", exif=b"mine")
    picture.save(tmp_path / "a.jpg", exif=b"Exif\0\0mine", metadata=False)
    assert b"mine" in (tmp_path / "a.jpg").read_bytes()


def test_chunks_of_the_caller_stand_beside_ours(pipe, tmp_path):
    """Gradio and other programs pass a PngInfo with every picture."""
    from PIL.PngImagePlugin import PngInfo

    picture, theirs = pipe("a red heart", seed=5).images[0], PngInfo()
    theirs.add_text("Title", "mine")
    theirs.add_text("tiue", "not a record")
    chunks = list(theirs.chunks)
    for given in (PngInfo(), theirs):
        picture.save(tmp_path / "a.png", pnginfo=given)
        assert read_record(tmp_path / "a.png") == picture.record
        assert AI_SOURCE.encode() in (tmp_path / "a.png").read_bytes()
    assert Image.open(tmp_path / "a.png").text["Title"] == "mine" and theirs.chunks == chunks
    with pytest.raises(RequestError, match=r"pnginfo: .*metadata=False"):
        picture.save(tmp_path / "a.png", pnginfo="mine")


@pytest.mark.parametrize("name", ["a.gif", "a", "a.png.txt", ".png", "a.heic"])
def test_other_formats_are_refused_with_the_ones_that_work(pipe, tmp_path, name):
    for save in (pipe("a", seed=5).save, pipe("a", seed=5).images[0].save):
        with pytest.raises(RequestError, match=r"(path|out): expected a file name that ends in \.png, .*\.webp"):
            save(tmp_path / name)
    with pytest.raises(RequestError, match="format: expected one of PNG"):
        pipe("a", seed=5).images[0].save(io.BytesIO(), "GIF")
    assert not list(tmp_path.iterdir())


@cut
def test_a_prompt_too_long_for_jpeg_is_refused_and_fits_elsewhere(pipe, tmp_path):
    result = pipe("red " * 50_000, seed=5)
    with pytest.raises(RequestError, match=r"prompt: it is too long .* PNG or WebP"):
        result.save(tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())
    for name in ("a.png", "a.webp"):
        assert read_record(*result.save(tmp_path / name)[:1]).prompt == "red " * 50_000
    result.save(tmp_path / "a.jpg", metadata=False)


def test_a_prompt_of_half_a_pair_is_refused_before_anything_runs(pipe):
    with pytest.raises(RequestError, match="not UTF-8"):
        pipe("a \ud800")


def test_a_picture_larger_than_the_format_is_one_line(tmp_path):
    with pytest.raises(RequestError, match="cannot be written as WEBP"):
        save_picture(Image.new("RGB", (16_500, 1)), tmp_path / "a.webp")
    assert not list(tmp_path.iterdir())


# Reading what others wrote.


@pytest.fixture
def record(pipe):
    return pipe("a red heart", seed=5).images[0].record


def with_text(**chunks):
    """Return a PNG with text chunks."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in chunks.items():
        info.add_itxt(key, value)
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def damaged(record, **values):
    return with_text(tiue=json.dumps({**json.loads(record.to_json()), **values}))


def bomb():
    """Return a PNG that claims 4 * 10**9 pixels."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 65_000, 65_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")


WEBUI = "a cat, night\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x768"
FOREIGN = {
    "empty": (lambda _: b"", "it is none"),
    "text": (lambda _: b"hello", "it is none"),
    "gif": (lambda _: b"GIF89a" + bytes(100), "it is none"),
    "bomb": (lambda _: bomb(), "size that can be decoded"),
    "no record": (lambda _: with_text(), "found none"),
    "webui": (lambda _: with_text(parameters=WEBUI), r"'a cat, night', steps 20, seed 965400086, size 512x768"),
    "no json": (lambda _: with_text(tiue="hello"), "record is damaged: expected JSON"),
    "a list": (lambda _: with_text(tiue="[]"), "JSON object"),
    "nested": (lambda _: with_text(tiue="[" * 100_000), "record is damaged"),
    "digits": (lambda _: with_text(tiue='{"seed": 1' + "0" * 5000 + "}"), "record is damaged"),
    "newer": (lambda r: damaged(r, format=2), "Upgrade tiue-runtime"),
    "no format": (lambda r: damaged(r, format=None), "format 1"),
    "seed": (lambda r: damaged(r, seed=-1), "record.seed"),
    "size": (lambda r: damaged(r, width=2**40), "record.width"),
    "memory": (lambda r: damaged(r, memory="low"), "record.memory"),
    "unknown": (lambda r: damaged(r, command="rm"), "unknown field record.command"),
    "surrogate": (lambda r: damaged(r, prompt="\ud800"), "record.prompt"),
    "index": (lambda r: damaged(r, index=7), "outside of its request"),
    "too long": (lambda _: with_text(tiue=" " * (17 * 2**20)), "at most 16,777,216 bytes"),
}


@pytest.mark.parametrize("make, message", FOREIGN.values(), ids=FOREIGN)
def test_files_without_a_sound_record_are_refused_in_one_line(tmp_path, record, pipe, make, message):
    path = tmp_path / "a.png"
    path.write_bytes(make(record))
    for read in (read_record, pipe.repeat):
        with pytest.raises(RequestError, match=message) as refused:
            read(path)
        assert str(refused.value).startswith(str(path)) and len(str(refused.value)) < 700


@every_ending
def test_damaged_files_are_read_or_refused(pipe, tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    pipe("a red heart", seed=5).save(path)
    content = path.read_bytes()
    draws = np.random.default_rng(0)
    refused = 0
    for i in range(200):
        data = bytearray(content[: draws.integers(len(content))] if i % 2 else content)
        for at in draws.integers(max(len(data), 1), size=3):
            if data:
                data[at] = draws.integers(256)
        path.write_bytes(data)
        try:
            read_record(path)
        except RequestError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 20


def test_paths_that_are_no_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.png", tmp_path / "a\0.png", tmp_path / ("x" * 5000)):
        with pytest.raises(RequestError):
            read_record(path)


@POSIX
def test_nothing_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(RequestError, match="regular file"):
        read_record(tmp_path / "a.png")


def test_xmp_that_another_program_has_rewritten_is_read(record):
    from html import escape

    from tiue_runtime.metadata import read_metadata

    file = io.BytesIO()
    element = f"<tiue:Record>{escape(record.to_json())}</tiue:Record>"
    Image.new("RGB", (2, 2)).save(file, "JPEG", xmp=element.encode())
    assert read_metadata(file.getvalue()) == record


# Faults.

SAVE = """
import sys, tiue_runtime
picture = tiue_runtime.Pipeline.load({bundle!r}, device="cpu")("a", seed=1, height=256, width=256).images[0]
print("ready", flush=True)
while True:
    picture.save({path!r})
"""


@POSIX
@every_ending
def test_a_file_is_whole_after_a_kill_during_save(tiny, tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    for wait in (0.0, 0.013, 0.05):
        code = SAVE.format(bundle=str(tiny), path=str(path))
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout and process.stdout.readline() == b"ready\n"
        while not path.exists():
            time.sleep(0.001)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with Image.open(path) as image:
            image.load()
        assert read_record(path).seed == 1


LIMITED = """
import resource, signal, sys, tiue_runtime
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
result = tiue_runtime.Pipeline.load({bundle!r}, device="cpu")("a", seed=1, height=256, width=256)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    result.save({path!r})
except OSError as error:
    print(error)
"""


@POSIX
@every_ending
def test_a_disk_that_takes_no_more_leaves_the_old_file_and_no_other(tiny, tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    path.write_bytes(b"old")
    code = LIMITED.format(bundle=str(tiny), path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert path.name in done.stdout and "too large" in done.stdout.lower()
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == b"old"


def test_a_full_disk_names_the_file(pipe, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tiue_runtime.bundle.replacing.os.fdopen", full)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.png"):
        pipe("a", seed=1).images[0].save(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@POSIX
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="administrators may write everywhere")
def test_a_read_only_folder_is_refused_before_anything_is_written(pipe, tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(RequestError, match=r"out: cannot write .* Permission denied"):
        pipe("a", seed=1).save(tmp_path / "a.png")
    tmp_path.chmod(0o755)


@POSIX
def test_a_result_is_not_saved_over_a_read_only_file(pipe, tmp_path):
    (tmp_path / "a-2.png").write_text("precious")
    (tmp_path / "a-2.png").chmod(0o444)
    with pytest.raises(RequestError, match="read-only"):
        pipe("a", seed=1, num_images=2).save(tmp_path / "a.png")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


@POSIX
@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_pictures_are_made_and_saved_without_a_home(tiny, tmp_path, home):
    path = tmp_path / "a.png"
    environment = {name: value for name, value in os.environ.items() if name != "HOME" and not name.startswith("XDG_")}
    command = [sys.executable, "-m", "tiue_runtime", "generate", "a", "--out", str(path), "--bundle", str(tiny)]
    done = subprocess.run(command, env=environment | ({"HOME": home} if home else {}), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert read_record(path).prompt == "a"


def can_mount():
    return bool(
        shutil.which("unshare") and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not can_mount(), reason="a file system of its own needs root")
@pytest.mark.parametrize("options, message", [("-o size=8k", "No space left on device"), ("-o ro", "Read-only file")])
@every_ending
def test_a_full_or_read_only_file_system_is_one_line(tiny, tmp_path, options, message, ending):
    generate = [sys.executable, "-m", "tiue_runtime", "generate", "a", "--bundle", str(tiny)]
    script = f'mount -t tmpfs {options} none "$1" && shift && {{ "$@"; code=$?; ls -A "$0" >&2; exit $code; }}'
    size = ["--out", str(tmp_path / f"a.{ending}"), "--width", "256", "--height", "256"]
    line = ["unshare", "--mount", "sh", "-c", script, str(tmp_path), str(tmp_path), *generate, *size]
    done = subprocess.run(line, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "warning: --width" not in line]
    assert done.returncode == 2 and message in done.stderr
    assert len(lines) == 1 and lines[0].startswith("tiue-runtime: error: ")  # and no file


# Making it again.


@every_ending
@pytest.mark.parametrize("memory", ["parallel", "partial", "sequential", "low"])
def test_every_picture_of_a_batch_is_repeated_bit_for_bit(pipe, tmp_path, ending, memory):
    result = pipe(["a red heart", "a blue star"], num_images=2, seed=5, steps=2, height=16, width=4, memory=memory)
    for path, picture in zip(result.save(tmp_path / f"a.{ending}"), result.images, strict=True):
        again = pipe.repeat(path)
        assert len(again.images) == len(again.records) == 1
        assert again.seeds == (picture.record.seed,)
        np.testing.assert_array_equal(again.images[0], picture)
        assert pipe.repeat(picture.record).images[0].tobytes() == picture.tobytes()


def test_a_picture_in_tiles_is_repeated(heavy, tmp_path):
    pipe = Pipeline.load(heavy, device="cpu", vae="tiny")
    result = pipe("a", seed=1, vae_tiling=True, height=160, width=128)
    (path,) = result.save(tmp_path / "a.webp")
    assert read_record(path).tile == (128, 128)
    np.testing.assert_array_equal(pipe.repeat(path).images[0], result.images[0])


class Dependent:
    """A pipeline whose pixels depend on the shape of the batch, as on some GPUs."""

    def __init__(self, pipe):
        self._pipe, self.bundle, self.vae, self.shapes = pipe, pipe.bundle, pipe.vae, []

    def __call__(self, prompts, **options):
        from tiue_runtime.images import attach

        count = len(prompts) * options["num_images"]
        self.shapes.append((len(prompts), options["num_images"]))
        result = self._pipe(prompts, **options)
        pictures = [picture.point(lambda level: (level + count) % 256) for picture in result.images]
        attach(pictures, result.records)
        return replace(result, images=pictures)


def test_where_a_batch_changes_values_the_same_batch_is_made_again(pipe):
    from tiue_runtime.repeating import repeat

    dependent = Dependent(pipe)
    made = dependent(["a red heart", "a blue star"], num_images=2, seed=5).images[3]
    again = repeat(dependent, made.record)
    assert again.images[0].tobytes() == made.tobytes() and again.seeds == (8,)
    assert dependent.shapes == [(2, 2), (1, 1), (2, 2)]


def test_what_differs_is_said_if_the_picture_does(pipe, record, edit):
    other = Pipeline.load(edit(lambda content: content["schedules"]["4"].update(noise_weight=0.9)), device="cpu")
    with pytest.warns(UserWarning, match="the bundle tiny was another one"):
        other.repeat(record)
    old = replace(record, pixels_sha256="0" * 64, device="cuda:1", versions={**record.versions, "numpy": "1.0"})
    with pytest.warns(UserWarning, match=r"device was cuda:1, now cpu; numpy was 1\.0, now "):
        pipe.repeat(old)
    with pytest.warns(UserWarning, match="another processor may compute other values"):
        pipe.repeat(replace(record, pixels_sha256="0" * 64))
    same = replace(record, device="cuda:1")  # The pixels are equal, so nothing needs to be said.
    assert pipe.repeat(same).images[0].record.pixels_sha256 == record.pixels_sha256


def test_what_cannot_be_repeated_is_refused_with_the_reason(pipe, heavy_pipe, tmp_path, record):
    noise = np.zeros((1, 4, 4, 6), np.float32)
    for options, reason in (({"latents": noise}, "latents"), ({"prompt_embeds": np.zeros((1, 8, 3))}, "prompt_embeds")):
        prompt = None if "prompt_embeds" in options else "a"
        (path,) = pipe(prompt, **options).save(tmp_path / "a.png")
        with pytest.raises(RequestError, match=f"{reason} again"):
            pipe.repeat(path)
    with pytest.raises(RequestError, match="made with bundle tiny, got heavy: load tiny"):
        heavy_pipe.repeat(record)
    with pytest.raises(RequestError, match='load with vae="tiny"'):
        pipe.repeat(replace(record, vae="tiny"))
    with pytest.raises(RequestError, match="steps"):
        pipe.repeat(replace(record, steps=3))


def test_without_c2pa_the_remedy_is_named(pipe, tmp_path, monkeypatch):
    from tiue_runtime.credentials import Credentials

    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(RequestError, match=r'credentials: .*pip install "c2pa-python'):
        pipe("a", seed=1).save(tmp_path / "a.png", credentials=Credentials(b"", b""))
    assert not list(tmp_path.iterdir())


def test_a_file_cannot_ask_for_a_batch_that_takes_all_memory(pipe, record):
    hostile = replace(record, prompts=2**20, num_images=2**20, pixels_sha256="0" * 64)
    with pytest.warns(UserWarning, match="it was made in a batch of 1099511627776, and made alone here"):
        assert len(pipe.repeat(hostile).images) == 1


@every_ending
def test_a_file_holds_the_prompt_of_no_other_picture(pipe, tmp_path, ending):
    first, _ = pipe(["a red heart", "secret words"], seed=5).save(tmp_path / f"a.{ending}")
    content = first.read_bytes()
    assert b"secret" not in content and "secret".encode("utf-16-be") not in content


def test_a_record_too_long_to_be_read_back_is_not_written(tmp_path, record):
    picture = Picture.of(Image.new("RGB", (2, 2)))
    picture.info["tiue"] = replace(record, prompt="x" * 2**24)
    with pytest.raises(RequestError, match="prompt: it is too long"):
        picture.save(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
