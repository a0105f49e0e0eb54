from pathlib import Path

import pytest

from tiue.prompts import PromptOrder, load_prompts


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_txt_drops_blank_lines_and_repetitions_in_order(tmp_path):
    path = write(tmp_path / "p.txt", "b cat\n\n  a dog \nb cat\nçedilla\n")
    assert load_prompts(path) == ["b cat", "a dog", "çedilla"]


def test_jsonl_takes_prompt_then_caption_then_text(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"caption": "two", "prompt": "one"}\n{"text": "three"}\n\n')
    assert load_prompts(path) == ["one", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.txt", b"caf\xe9\n", "not UTF-8 at byte 3"),
        ("p.jsonl", '{"prompt": "x"}\n{"prompt": 1}\n', "line 2: expected an object"),
        ("p.jsonl", "{\n", "line 1"),
        ("p.csv", "x", "a .txt or a .jsonl"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(write(tmp_path / name, content))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.txt: No such file"):
        load_prompts(tmp_path / "gone.txt")


def test_order_is_a_new_permutation_each_epoch_and_needs_no_history():
    prompts = [str(i) for i in range(10)]
    order = PromptOrder(prompts, seed=3)
    epochs = [[order[10 * e + i] for i in range(10)] for e in range(3)]
    assert all(sorted(epoch) == prompts for epoch in epochs) and len({tuple(e) for e in epochs}) == 3
    assert PromptOrder(prompts, seed=3)[25] == epochs[2][5]
    assert [PromptOrder(prompts, seed=4)[i] for i in range(10)] != epochs[0]
