"""Pictures in files: written whole or not at all, with a record that makes them again, and a mark that says "by AI"."""

import json
import os
import pickle
import stat
import warnings
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from tiue_runtime import Pipeline, Result
from tiue_runtime.bundle.replacing import replacing
from tiue_runtime.errors import RequestError
from tiue_runtime.record import Record
from tiue_runtime.saving import MARK, Picture, check_picture_path, read_record

POSIX = pytest.mark.skipif(os.name != "posix", reason="links and permissions of POSIX")


HEART, STAR = "a red heart", "a blue star"
STRANGE = 'a "red" <heart>, & a\n\tstar \0 \u2665 \U0001f600'
FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".PNG")
RECORD = Record(
    prompts=(HEART,),
    num_images=1,
    index=0,
    seed=7,
    steps=4,
    height=2,
    width=2,
    memory="parallel",
    vae="kl",
    variant="portable",
    device="cpu",
    bundle="tiny",
    bundle_sha256="0" * 64,
    versions={"tiue-runtime": "0.1.0", "onnxruntime": "1.32.0", "numpy": "2.4.6"},
)


@pytest.fixture
def picture():
    return Picture.of(Image.new("RGB", (2, 2), "red"), RECORD)


def is_red(path):
    with Image.open(path) as image:
        return image.getpixel((0, 0)) == (255, 0, 0)


def test_the_folder_is_tested_and_left_unchanged(tmp_path):
    check_picture_path(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_the_longest_legal_name(tmp_path, picture):
    path = tmp_path / ("x" * 251 + ".png")
    check_picture_path(path)
    picture.save(path)
    assert is_red(path) and len(list(tmp_path.iterdir())) == 1


def test_files_left_by_a_killed_process_do_no_harm(tmp_path, picture, monkeypatch):
    """Names are random. If one is taken, another one is tried."""
    names = iter(["taken", "taken", "free"])
    monkeypatch.setattr("tiue_runtime.bundle.replacing.secrets.token_hex", lambda _: next(names))
    (tmp_path / ".taken.tmp").write_text("left behind")
    picture.save(tmp_path / "a.png")
    assert is_red(tmp_path / "a.png") and (tmp_path / ".taken.tmp").read_text() == "left behind"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".taken.tmp", "a.png"]


@POSIX
def test_a_link_is_followed(tmp_path, picture):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.png").symlink_to(tmp_path / "folder" / "b.png")
    for _ in range(2):  # First the link points to nothing, then to a file.
        check_picture_path(tmp_path / "a.png")
        picture.save(tmp_path / "a.png")
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
        picture.save(path)
    assert path.read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


@POSIX
def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(RequestError, match="is not a regular file"):
        check_picture_path(tmp_path / "a.png")


@POSIX
def test_permissions_of_the_file_stay(tmp_path, picture):
    path = tmp_path / "a.png"
    picture.save(path)
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600
    path.chmod(0o640)
    picture.save(path)
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


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("prompt", [HEART, STRANGE, "", "x" * 20_000])
def test_the_record_comes_back_from_every_format(tmp_path, suffix, prompt):
    record = replace(RECORD, prompts=(HEART, prompt), index=1)
    path = tmp_path / f"a{suffix}"
    Picture.of(Image.new("RGB", (2, 2), "red"), record).save(path)
    assert read_record(path) == record
    assert (record.prompt, record.own_seed) == (prompt, 8)


def test_a_record_that_jpeg_cannot_hold_is_refused_and_nothing_is_written(tmp_path, picture):
    picture.record = replace(RECORD, prompts=("x" * 70_000,))
    with pytest.raises(RequestError, match=r"JPEG holds at most 64 KiB of it, .* save a PNG, or without metadata"):
        picture.save(tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())
    picture.save(tmp_path / "a.jpg", metadata=False)
    picture.save(tmp_path / "a.png")
    assert read_record(tmp_path / "a.png") == picture.record


def xmp_of(path):
    with Image.open(path) as image:
        image.load()
        xmp = image.info.get("xmp")
    return ElementTree.fromstring(xmp.decode() if isinstance(xmp, bytes) else xmp) if xmp else None


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_says_that_ai_made_the_picture_unless_switched_off(tmp_path, picture, suffix):
    path = tmp_path / f"a{suffix}"
    name = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    for metadata in (True, False):
        picture.save(path, metadata=metadata)
        assert [node.get(name) for node in xmp_of(path).iter() if node.get(name)] == [MARK]
    picture.save(path, ai_mark=False)
    assert MARK.encode() not in path.read_bytes() and read_record(path) == RECORD
    picture.save(path, ai_mark=False, metadata=False)
    assert xmp_of(path) is None
    with pytest.raises(RequestError, match="has no record of its making"):
        read_record(path)


def test_web_uis_find_their_text(tmp_path, picture):
    text = f"{HEART}\nSteps: 4, Seed: 7, Size: 2x2, Model hash: 0000000000, Model: tiny, Version: tiue-runtime 0.1.0"
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.png") as image:
        assert image.text["parameters"] == text
        assert json.loads(image.text["tiue"])["prompt"] == HEART
    with Image.open(tmp_path / "a.jpg") as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + text.encode("utf-16-be")


def test_a_picture_is_still_one_of_pil(tmp_path, picture):
    picture.save(tmp_path / "a.gif")
    picture.save(str(tmp_path / "b"), "webp", quality=30)
    with (tmp_path / "c").open("wb") as file:
        picture.save(file, format="PNG", optimize=True)
    assert read_record(tmp_path / "b") == read_record(tmp_path / "c") == RECORD
    changed = picture.resize((4, 4))
    changed.save(tmp_path / "d.png")  # No longer the picture of the record.
    with pytest.raises(RequestError, match="no record"):
        read_record(tmp_path / "d.png")
    assert pickle.loads(pickle.dumps(picture)).getpixel((0, 0)) == (255, 0, 0)


BROKEN = {
    "no file": (None, "expected a file"),
    "text": (b"hello", "expected a PNG, JPEG or WebP file"),
    "empty": (b"", "expected a PNG, JPEG or WebP file"),
    "cut": ("cut", "cannot be read"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_other_files_are_refused_in_one_line(tmp_path, picture, content, message):
    path = tmp_path / "a.png"
    if content == "cut":
        picture.save(path)
        path.write_bytes(path.read_bytes()[:60])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match=f"^picture: .*{message}") as refused:
        read_record(path)
    assert "\n" not in str(refused.value)


DAMAGED = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "list": "[]",
    "format": json.dumps({"format": 2}),
    "nothing in it": json.dumps({"format": 1}),
    "steps text": RECORD.to_json().replace('"steps": 4', '"steps": "4"'),
    "index": RECORD.to_json().replace('"index": 0', '"index": 5'),
    "negative index": RECORD.to_json().replace('"index": 0', '"index": -1'),
    "no pictures": RECORD.to_json().replace('"num_images": 1', '"num_images": 0'),
    "true": RECORD.to_json().replace('"seed": 7', '"seed": true'),
    "hash": RECORD.to_json().replace("0" * 64, "0" * 63),
    "twice": RECORD.to_json().replace('"steps": 4', '"steps": 4, "steps": 5'),
    "huge": RECORD.to_json().replace('"steps": 4', '"steps": ' + "9" * 5000),
    "unknown field": RECORD.to_json().replace('"steps": 4', '"steps": 4, "guidance": 7'),
    "versions": RECORD.to_json().replace('"numpy": "2.4.6"', '"numpy": 2'),
    "no prompts": RECORD.to_json().replace(f'"prompts": ["{HEART}"]', '"prompts": []'),
    "too long": RECORD.to_json().replace(HEART, "x" * 2**20),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_refused_in_one_line(text):
    with pytest.raises(RequestError, match=r"^record: ") as refused:
        Record.from_json(text)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("options", [{}, {"memory": "sequential"}, {"num_images": 3, "height": 16, "width": 8}])
def test_a_saved_picture_is_made_again_bit_for_bit(pipe, tmp_path, options):
    result = pipe([HEART, STAR], seed=5, steps=2, **options)
    paths = result.save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path, image, seed in zip(paths, result.images, result.seeds, strict=True):
            again = pipe.repeat(path)
            assert again.seeds == (seed,)
            np.testing.assert_array_equal(again.images[0], image)


def test_repeat_says_what_differs(pipe, heavy_pipe, tmp_path):
    (path,) = pipe(HEART, seed=5).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match=r"may differ, because it was made with bundle tiny instead of heavy; bundle"):
        heavy_pipe.repeat(path)
    with Image.open(path) as image:
        edited, record = image.convert("L").convert("RGB"), read_record(path)
    Picture.of(edited, record).save(path)
    with pytest.warns(UserWarning, match="made again as recorded, and its pixels differ"):
        pipe.repeat(path)


@pytest.mark.parametrize("name", ["latents", "prompt_embeds"])
def test_arrays_of_the_caller_cannot_be_repeated(pipe, tmp_path, name):
    given = {"latents": np.ones((1, 4, 4, 6)), "prompt": HEART} if name == "latents" else {
        "prompt_embeds": np.ones((1, 8, 3)), "seed": 1}  # fmt: skip
    (path,) = pipe(**given).save(tmp_path / "a.png")
    with pytest.raises(RequestError, match=f"made from the caller's own {name}"):
        pipe.repeat(path)


def test_a_result_names_its_files_and_refuses_wrong_ones(pipe, tmp_path):
    result = pipe(HEART, num_images=2, seed=1)
    assert [path.name for path in result.save(tmp_path / "a.webp")] == ["a-1.webp", "a-2.webp"]
    for path, message in ((tmp_path / "a.gif", r"ends in \.png"), (tmp_path / "none/a.png", "cannot write")):
        with pytest.raises(RequestError, match=message):
            result.save(path)
    arrays: Result = pipe(HEART, output_type="np")
    with pytest.raises(RequestError, match="give arrays"):
        arrays.save(tmp_path / "b.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_no_path_of_this_machine_is_in_a_file(copy, tmp_path):
    with Pipeline.load(copy, device="cpu") as pipe:
        (path,) = pipe(HEART, seed=1).save(tmp_path / "a.png")
    assert str(tmp_path).encode() not in path.read_bytes()
