from pathlib import Path

import pytest

from tiue import files


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    with files.written_whole(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path and not path.exists()
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_could_not_be_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.written_whole(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link", tmp_path / "there/a.txt"
    link.symlink_to(target)
    files.write_text(link, "ü")
    assert link.is_symlink() and target.read_text(encoding="utf-8") == "ü"


def test_the_longest_legal_name_can_be_written(tmp_path):
    files.write_text(path := tmp_path / ("x" * 255), "whole")
    assert path.read_text() == "whole"


def test_a_written_file_has_the_mode_of_any_new_file(tmp_path: Path):
    files.write_text(tmp_path / "a", "")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_an_error_is_one_short_line():
    assert files.one_line(ValueError("two\n  lines")) == "two lines"
    assert files.one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(files.one_line(ValueError("x" * 1000))) == 300
    assert files.shortened("x" * 100) == "x" * 100 and len(files.shortened("x" * 101)) == 100
