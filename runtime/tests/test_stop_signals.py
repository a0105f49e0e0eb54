"""Signals of the command line."""

import os
import signal

import pytest
from tiue_runtime.tools import cli, generate_command, stop_signals

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that can be handled")


class Lossy:
    """Python drops an exception that is raised while this is destroyed."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        for _ in range(1000):  # The handler runs between two of these.
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_whose_exception_is_lost_still_stops_the_command(number, code, word, monkeypatch, capsys):
    drawn = []

    def generate(*_):
        for picture in range(3):
            stop_signals.check()
            drawn.append(picture)
            Lossy(number)
        return 0

    monkeypatch.setattr(generate_command, "generate", generate)
    assert cli.main(["generate", "a red heart"]) == code
    assert (drawn, capsys.readouterr().err) == ([0], f"tiue-runtime: error: {word}\n")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_is_lost_at_the_end_is_reported_once(monkeypatch, capsys):
    def generate(*_):
        Lossy(signal.SIGINT)
        return 0

    monkeypatch.setattr(generate_command, "generate", generate)
    assert cli.main(["generate", "a"]) == 130
    monkeypatch.setattr(generate_command, "generate", lambda *_: 0)
    assert cli.main(["generate", "a"]) == 0


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_signals.handled():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
