"""Programs of several processes, and programs on a screen: a failure says at once what they printed."""

import subprocess
import sys
import time

import processes
import pytest
import screens
from screens import screen, why_no_screen

on_a_screen = pytest.mark.skipif(bool(why_no_screen()), reason=why_no_screen() or "-")


@on_a_screen
def test_a_program_that_ends_is_reported_at_once():
    command = [sys.executable, "-c", "print('hello'); raise SystemExit('no display')"]
    begun = time.monotonic()
    with screen() as shown, shown.running(command), pytest.raises(AssertionError) as failure:
        shown.window("^TiUE")
    assert time.monotonic() - begun < 20
    for part in ("no window ^TiUE", "has ended with status 1", "hello", "no display", "Visible windows: none"):
        assert part in str(failure.value)


@on_a_screen
def test_a_program_without_a_window_is_reported_when_patience_ends(monkeypatch):
    monkeypatch.setattr(screens, "PATIENCE", 1)
    command = [sys.executable, "-c", "import time; print('I wait', flush=True); time.sleep(60)"]
    with screen() as shown, shown.running(command) as program, pytest.raises(AssertionError, match=r"runs\. .*I wait"):
        shown.window("^TiUE")
    assert program.process.returncode is not None


@on_a_screen
def test_a_screen_that_ends_is_reported_at_once():
    with screen() as shown, pytest.raises(AssertionError, match="Xvfb has ended with status"):
        shown._programs[0].process.kill()
        shown.until("window", lambda: False)


@on_a_screen
def test_a_screen_that_does_not_start_is_reported():
    with pytest.raises(AssertionError, match=r"no screen\. Xvfb .*It printed: .*nonsense"), screen("nonsense"):
        pass


@on_a_screen
def test_a_screen_outlives_its_clients():
    """Every client that leaves would otherwise start Xvfb again, and the next one could be refused."""
    with screen() as shown:
        for _ in range(20):
            several = [
                subprocess.Popen(["xdotool", "getdisplaygeometry"], env=shown.environment, stdout=subprocess.DEVNULL)
                for _ in range(5)
            ]
            assert [client.wait() for client in several] == [0] * 5


def test_a_process_that_fails_ends_the_others(tmp_path):
    processes.start(["-c", ""], tmp_path / "printed").join()  # The first one waits until torch is imported.
    program = "import os, sys, time; print('I am', os.environ['RANK'], flush=True); time.sleep(1)\n"
    program += "if os.environ['RANK'] == '1': sys.exit('out of luck')\n"
    program += "time.sleep(100)"
    begun = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)Process 0 still ran.*I am 0.*ended with status 1.*out of luck"):
        processes.launched(["-c", program], [], 2)
    assert time.monotonic() - begun < 60


def test_processes_that_wait_forever_are_killed(monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 1)
    with pytest.raises(AssertionError, match="Process 1 still ran"):
        processes.launched(["-c", "import time; time.sleep(100)"], [], 2)
