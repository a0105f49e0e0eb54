"""PNG files: written under a random name and renamed, through links, and never over a read-only file."""

import os
import stat

import pytest
from PIL import Image
from tiue_runtime.bundle.replacing import replacing
from tiue_runtime.errors import RequestError
from tiue_runtime.png import check_png_path, save_png

POSIX = pytest.mark.skipif(os.name != "posix", reason="links and permissions of POSIX")


@pytest.fixture
def picture():
    return Image.new("RGB", (2, 2), "red")


def is_red(path):
    with Image.open(path) as image:
        return image.getpixel((0, 0)) == (255, 0, 0)


def test_the_folder_is_tested_and_left_unchanged(tmp_path):
    check_png_path(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_the_longest_legal_name(tmp_path, picture):
    path = tmp_path / ("x" * 251 + ".png")
    check_png_path(path)
    save_png(picture, path, {})
    assert is_red(path) and len(list(tmp_path.iterdir())) == 1


def test_files_left_by_a_killed_process_do_no_harm(tmp_path, picture, monkeypatch):
    """Names are random. If one is taken, another one is tried."""
    names = iter(["taken", "taken", "free"])
    monkeypatch.setattr("tiue_runtime.bundle.replacing.secrets.token_hex", lambda _: next(names))
    (tmp_path / ".taken.tmp").write_text("left behind")
    save_png(picture, tmp_path / "a.png", {})
    assert is_red(tmp_path / "a.png") and (tmp_path / ".taken.tmp").read_text() == "left behind"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".taken.tmp", "a.png"]


@POSIX
def test_a_link_is_followed(tmp_path, picture):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.png").symlink_to(tmp_path / "folder" / "b.png")
    for _ in range(2):  # First the link points to nothing, then to a file.
        check_png_path(tmp_path / "a.png")
        save_png(picture, tmp_path / "a.png", {})
        assert (tmp_path / "a.png").is_symlink() and is_red(tmp_path / "folder" / "b.png")


@POSIX
def test_a_link_to_itself_is_an_error(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(RequestError, match="out: cannot write"):
        check_png_path(tmp_path / "a.png")


@POSIX
def test_a_read_only_file_is_not_replaced(tmp_path, picture):
    path = tmp_path / "a.png"
    path.write_text("precious")
    path.chmod(0o444)
    with pytest.raises(RequestError, match=r"out: cannot write .*a\.png is read-only"):
        check_png_path(path)
    with pytest.raises(PermissionError, match="read-only"):
        save_png(picture, path, {})
    assert path.read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


@POSIX
def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(RequestError, match="is not a regular file"):
        check_png_path(tmp_path / "a.png")


@POSIX
def test_permissions_of_the_file_stay(tmp_path, picture):
    path = tmp_path / "a.png"
    save_png(picture, path, {})
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600
    path.chmod(0o640)
    save_png(picture, path, {})
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
        check_png_path(tmp_path / name)
    assert len(str(refused.value)) < 500
