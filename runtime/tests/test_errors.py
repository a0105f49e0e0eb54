import pickle

import pytest
from tiue_runtime.errors import BundleError, clip
from tiue_runtime.ort.sessions import first_line
from tiue_runtime.serve.jobs import QueueFull
from tiue_runtime.vocabulary import PromptWarning

HOSTILE = f"name \x1b[31m\u202e\0 {'x' * 10_000}\nsecond line"


def test_a_message_is_one_printable_line():
    message = str(BundleError(f"a  b.onnx: {HOSTILE}"))
    assert message.startswith(r"a  b.onnx: name \x1b[31m\u202e\x00 xxx") and message.isprintable()
    assert len(message) <= 1000
    assert str(BundleError("x" * 1000)) == "x" * 1000 and str(BundleError("x" * 1001)) == "x" * 997 + "..."


@pytest.mark.parametrize("error", [BundleError(HOSTILE), QueueFull("full", 2.5), PromptWarning("no word", "a walrus")])
def test_an_error_survives_a_pickle(error):
    """A pool of processes breaks if an exception does not."""
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), vars(copy)) == (str(error), vars(error))


def test_values_and_reasons_of_libraries_are_cut():
    assert clip(HOSTILE).isprintable() and len(clip(HOSTILE)) == 100
    assert first_line(ValueError(HOSTILE)).isprintable() and len(first_line(ValueError(HOSTILE))) == 400
