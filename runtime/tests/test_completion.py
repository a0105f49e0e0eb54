"""Scripts for the completion of shells: bash itself is asked what it offers."""

import shutil
import subprocess
import sys

import pytest
from tiue_runtime.tools.cli import main

shtab = pytest.importorskip("shtab", reason="the scripts need shtab: the extra [completion]")

ASK = """
source "$1"; shift
COMP_WORDS=(tiue-runtime "$@"); COMP_CWORD=$#
$(complete -p tiue-runtime | sed -n 's/.* -F \\([^ ]*\\) .*/\\1/p') tiue-runtime "${COMP_WORDS[COMP_CWORD]}" "$@"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def offered(tmp_path, capsys):
    """offered(*words) => what bash offers for the last of the words."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)

    def ask(*words):
        command = ["bash", "-c", ASK, "bash", str(tmp_path / "script"), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return {line.rstrip() for line in done.stdout.splitlines()} - {""}

    return ask


def test_commands_are_completed(offered):
    assert {"generate", "batch", "info", "pull", "completion"} <= offered("")
    assert offered("gen") == {"generate"}


def test_flags_and_their_values_are_completed(offered):
    assert offered("generate", "--prom") == {"--prompts"}
    assert offered("generate", "--mem") == {"--memory"}
    assert {"parallel", "low"} <= offered("generate", "--memory", "")
    assert offered("batch", "--for") == {"--format"} and offered("batch", "--format", "w") == {"webp"}
    assert not offered("generate", "--guid")  # flags of diffusers, which only teach


def test_files_and_directories_are_completed(offered, tmp_path):
    (tmp_path / "prompts.txt").touch()
    (tmp_path / "pictures").mkdir()
    assert offered("generate", "--prompts", "prom") == {"prompts.txt"}
    assert "pictures" in {name.rstrip("/") for name in offered("batch", "p.jsonl", "--out", "p")}
    assert "prompts.txt" not in offered("batch", "p.jsonl", "--out", "p")


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_their_scripts(capsys, shell):
    assert main(["completion", shell]) == 0
    said = capsys.readouterr().out
    assert "tiue-runtime" in said and "--prompts" in said
    if shutil.which(shell):
        assert subprocess.run([shell, "-n", "/dev/stdin"], input=said, text=True).returncode == 0


def test_without_shtab_the_remedy_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr() == (
        "",
        "tiue-runtime: error: completion: expected shtab, which is not installed: pip install shtab\n",
    )
    assert main(["completion", "dash"]) == 2
    assert "invalid choice: 'dash'" in capsys.readouterr().err
