"""What threads change for the whole process is as before when the last of them is done."""

import io
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

from tiue_runtime import metadata, read_record
from tiue_runtime.ort.devices import Device, Settings
from tiue_runtime.ort.sessions import start_session

WAIT = 20.0  # seconds, for what takes milliseconds
SOON = 0.3  # seconds, for what may never come


class Overlap:
    """A function for two threads. The second enters it before the first leaves it, if it can, and leaves it last."""

    def __init__(self, function):
        self._function = function
        self._in, self._both_in, self._left = (threading.Event() for _ in range(3))

    def __call__(self, *arguments, **options):
        if self._in.is_set():
            self._both_in.set()
            self._left.wait(SOON)
        else:
            self._in.set()
            self._both_in.wait(SOON)
        return self._function(*arguments, **options)

    def run(self, call):
        """Call a function, which calls this one, on two threads."""

        def first():
            call()
            self._left.set()

        def second():
            assert self._in.wait(WAIT)
            call()

        with ThreadPoolExecutor(2) as threads:
            for called in [threads.submit(first), threads.submit(second)]:
                called.result(WAIT)


def test_reading_pictures_at_once_leaves_the_filters_of_warnings(pipe, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    pipe("a red heart", seed=1).images[0].save(path)
    overlap = Overlap(metadata.open_image)
    monkeypatch.setattr(metadata, "open_image", overlap)
    before = list(warnings.filters)
    overlap.run(lambda: read_record(path))
    assert warnings.filters == before


def test_loading_at_once_leaves_stdout(onnxruntime_with, monkeypatch):
    class Session:
        def __init__(self, *_, **__):
            pass

        def disable_fallback(self):
            pass

    outputs = [io.StringIO(), io.StringIO()]
    monkeypatch.setattr(sys, "stdout", outputs[0])
    monkeypatch.setattr(sys, "stderr", outputs[1])
    overlap = Overlap(lambda: print("a library is missing"))
    onnxruntime_with(InferenceSession=Session, preload_dlls=overlap)
    overlap.run(lambda: start_session("model.onnx", Device("cuda"), Settings()))
    assert sys.stdout is outputs[0]
    assert [output.getvalue() for output in outputs] == ["", "a library is missing\n" * 2]
