from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tiue.distill.prompt_store import PromptOrder, Prompts, store_prompts
from tiue.prompts import BLANK, FOLDERS, HIDDEN, NOT_TEXT, NULL, OTHER_FILES, in_words, load_prompts, read_prompts


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_table(path: Path, **columns: list) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_txt_drops_blank_lines_and_repetitions_in_order(tmp_path):
    path = write(tmp_path / "p.txt", "b cat\n\n  a dog \nb cat\nçedilla\n")
    assert load_prompts(path) == ["b cat", "a dog", "çedilla"]


def test_jsonl_takes_prompt_then_caption_then_text(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"caption": "two", "prompt": "one"}\n{"text": "three"}\n\n')
    assert load_prompts(path) == ["one", "three"]


def test_journeydb_has_prompts_and_captions(tmp_path):
    record = '{"img_path": "./000/a.jpg", "prompt": "castle --ar 2:3", "Task2": {"Caption": "A castle."}}\n'
    path = write(tmp_path / "train_anno.jsonl", record + '{"prompt": " ", "Task2": {"Caption": "A cat."}}\n')
    assert load_prompts(path) == ["castle --ar 2:3", "A cat."]
    assert load_prompts(path, "Task2.Caption") == ["A castle.", "A cat."]


def test_records_with_a_blank_caption_are_skipped(tmp_path):
    assert load_prompts(write(tmp_path / "p.jsonl", '{"prompt": ""}\n{"prompt": "x"}\n')) == ["x"]


def test_parquet(tmp_path):
    path = write_table(tmp_path / "p.parquet", id=[1, 2, 3], caption=["a", None, " b "])
    assert load_prompts(path) == ["a", "b"]
    with pytest.raises(ValueError, match=r"p\.parquet: expected a column prompt, found id, caption"):
        load_prompts(path, "prompt")
    with pytest.raises(ValueError, match="column id holds int at row 0"):
        load_prompts(path, "id")


def test_a_directory_of_shards_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "b.txt", "two\n")
    write(tmp_path / "a.jsonl", '{"text": "one"}\n')
    write_table(tmp_path / "c.parquet", text=["three"])
    write(tmp_path / "README.md", "not this\n")
    assert load_prompts(tmp_path) == ["one", "two", "three"]


def test_reading_goes_no_further_than_asked(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"text": "one"}\n{broken\n')
    assert next(read_prompts(path)) == "one"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.txt", b"ok\ncaf\xe9\n", r"p\.txt, line 2: expected UTF-8"),
        ("p.TXT", b"ok\n\0\n", r"p\.TXT, line 2: .*NUL"),
        ("p.txt", "a cat\n".encode("utf-16-le"), "line 1: .*byte order mark"),
        ("p.txt", b"\xff\xfea", "line 1: expected UTF-16"),
        ("p.txt", "x" * 100_001, "line 1: expected a caption of at most 100,000 characters, got 100,001"),
        ("p.jsonl", "[" * 100_000 + "\n", "line 1: the record is nested too deeply"),
        ("p.jsonl", '{"prompt": ' + "9" * 5000 + "}\n", "line 1"),
        ("p.jsonl", "null\n", r"holds no prompt \(skipped: 1 null\)"),
        ("p.jsonl", b'{"prompt": "caf\xe9"}\n', "line 1: expected UTF-8"),
        ("p.jsonl", '{"prompt": "x"}\n{"prompt": 1}\n', "line 2: expected an object"),
        ("p.jsonl", "{\n", "line 1"),
        ("p.jsonl", "[1]\n", "line 1: expected an object with prompt or caption"),
        ("p.csv", "x", r"p\.csv: prompts come from \.txt, \.jsonl, \.parquet or a directory"),
        ("p.parquet", "x", r"p\.parquet: "),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(write(tmp_path / name, content))


def test_suffixes_may_be_in_capitals(tmp_path):
    write(tmp_path / "A.TXT", "one\n")
    write(tmp_path / "B.JsonL", '{"text": "two"}\n')
    assert load_prompts(tmp_path) == ["one", "two"]
    assert load_prompts(tmp_path / "A.TXT") == ["one"]


def test_files_that_operating_systems_leave_are_passed_over(tmp_path):
    for name in ("._a.txt", ".hidden.txt", "Thumbs.db", ".DS_Store"):
        write(tmp_path / name, b"\x00\x05\x16\x07")
    (tmp_path / "__MACOSX").mkdir()
    write(tmp_path / "a.txt", "one\n")
    assert load_prompts(tmp_path) == ["one"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_with_a_byte_order_mark(tmp_path, encoding):
    text = "\u00e7edilla\r\na dog\r\n\U0001f600\n"
    path = write(tmp_path / "p.txt", text.encode(encoding))
    assert load_prompts(path) == ["\u00e7edilla", "a dog", "\U0001f600"]
    path = write(tmp_path / "p.jsonl", '{"text": "\u00e7a"}\r\n'.encode(encoding))
    assert load_prompts(path) == ["\u00e7a"]


def test_skipped_captions_are_counted(tmp_path, caplog):
    records = ['{"prompt": "\\ud83d"}', "null", '{"prompt": null}', '{"prompt": ""}', '{"prompt": "x"}']
    path = write(tmp_path / "p.jsonl", "\n".join(records))
    skipped = Counter()
    assert list(read_prompts(path, skipped=skipped)) == ["x"]
    assert skipped == {NOT_TEXT: 1, NULL: 2, BLANK: 1}
    assert not caplog.records
    (tmp_path / "folder").mkdir()
    assert load_prompts(tmp_path) == ["x"]
    said = caplog.messages[0]
    assert "1 not Unicode text" in said and "2 null" in said and "1 folder" in said and "blank" not in said


def test_files_that_are_passed_over_are_counted(tmp_path):
    for name in ("a.txt", "b.TXT", ".hidden.txt", "._a.txt", "Thumbs.db", "picture.png", "captions.csv"):
        write(tmp_path / name, "one\n")
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "c.txt", "two\n")
    skipped = Counter()
    assert list(read_prompts(tmp_path, skipped=skipped)) == ["one", "one"]
    assert skipped == {HIDDEN: 3, OTHER_FILES: 2, FOLDERS: 1}
    assert in_words(skipped) == "3 hidden files, 2 files of other kinds, 1 folders, whose files are not read"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a\u2028b\n", ["a\u2028b"]),  # no end of a line in a text file
        ("a\x0cb\x0bc\x1cd\u0085e\n", ["a\x0cb\x0bc\x1cd\u0085e"]),
        ("\u3000a\u00a0\n\u2003\n", ["a"]),
        ("a\rb\r\nc", ["a", "b", "c"]),
        ("null\n", ["null"]),
        ("x" * 100_000, ["x" * 100_000]),
    ],
)
def test_lines_of_text_end_where_editors_end_them(tmp_path, content, expected):
    assert load_prompts(write(tmp_path / "p.txt", content)) == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ('{"prompt": "a", "prompt": "b"}', "b"),
        ('{"prompt": "a", "size": 1e999, "other": NaN}', "a"),
        ('{"prompt": "a\\u0000b"}', "a\0b"),
        ('{"prompt": "a\\nb"}', "a\nb"),
        ('{"prompt": "a", "deep": ' + "[" * 500 + "]" * 500 + "}", "a"),
    ],
)
def test_odd_records_with_a_caption_are_read(tmp_path, record, expected):
    assert load_prompts(write(tmp_path / "p.jsonl", record)) == [expected]


def test_a_line_without_an_end_is_refused_before_memory_is_full(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"prompt": "a"}\n{"x": "' + "x" * 10_000_000)
    with pytest.raises(ValueError, match="line 2: expected at most 10,000,000 characters in a line"):
        load_prompts(path)


def test_nulls_of_a_table_are_counted(tmp_path):
    skipped = Counter()
    path = write_table(tmp_path / "p.parquet", text=["a", None, " "])
    assert list(read_prompts(path, skipped=skipped)) == ["a"]
    assert skipped == {NULL: 1, BLANK: 1}


def test_whole_surrogate_pairs_are_characters(tmp_path):
    assert load_prompts(write(tmp_path / "p.jsonl", '{"prompt": "\\ud83d\\ude00"}')) == ["\U0001f600"]


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os = pytest.importorskip("posix")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"pipe\.txt: expected a regular file"):
        load_prompts(tmp_path / "pipe.txt")
    write(tmp_path / "a.txt", "one\n")
    assert load_prompts(tmp_path) == ["one"]
    (tmp_path / "lost.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"lost\.txt: No such file"):
        load_prompts(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300 + ".txt", "x\0.txt", "loop.txt"])
def test_paths_that_no_system_opens(tmp_path, name):
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    with pytest.raises(ValueError) as refused:
        load_prompts(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.txt: No such file"):
        load_prompts(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match=r"holds no \.txt, \.jsonl, \.parquet"):
        load_prompts(tmp_path)


def test_stored_prompts_are_unique_and_read_one_by_one(tmp_path):
    given = ["a red heart", "çedilla", "a red heart", "", "x"]
    assert store_prompts(iter(given), tmp_path / "s") == 1
    stored = Prompts(tmp_path / "s")
    assert list(stored) == ["a red heart", "çedilla", "", "x"] and stored[1:3] == ["çedilla", ""]
    assert len(stored) == 4 and stored[-1] == "x"
    with pytest.raises(IndexError):
        stored[4]
    store_prompts(given[::-1], tmp_path / "other")
    assert Prompts(tmp_path / "other").digest != stored.digest
    store_prompts([*given, "x"], tmp_path / "same")
    assert Prompts(tmp_path / "same").digest == stored.digest
    store_prompts(["other"], tmp_path / "s")  # by a second process, while the first one trains
    assert list(stored) == ["a red heart", "çedilla", "", "x"] and list(Prompts(tmp_path / "s")) == ["other"]


def test_prompts_that_are_half_written_cannot_be_opened(tmp_path):
    def broken():
        yield "a"
        raise OSError("gone")

    store_prompts(["b"], tmp_path)
    with pytest.raises(OSError, match="gone"):
        store_prompts(broken(), tmp_path)
    with pytest.raises(FileNotFoundError):
        Prompts(tmp_path)


def test_order_is_a_new_permutation_each_epoch_and_needs_no_history():
    order = PromptOrder(10, seed=3)
    epochs = [[order[10 * e + i] for i in range(10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len({tuple(e) for e in epochs}) == 3
    assert PromptOrder(10, seed=3)[25] == epochs[2][5]
    assert [PromptOrder(10, seed=4)[i] for i in range(10)] != epochs[0]
