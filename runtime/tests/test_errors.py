import pickle

from tiue_runtime.errors import BundleError, clip
from tiue_runtime.ort.sessions import first_line

HOSTILE = f"name \x1b[31m\u202e\0 {'x' * 10_000}\nsecond line"


def test_a_message_is_one_printable_line():
    message = str(BundleError(f"a  b.onnx: {HOSTILE}"))
    assert message.startswith(r"a  b.onnx: name \x1b[31m\u202e\x00 xxx") and message.isprintable()
    assert len(message) <= 1000
    assert str(BundleError("x" * 1000)) == "x" * 1000 and str(BundleError("x" * 1001)) == "x" * 997 + "..."


def test_an_error_survives_a_pickle():
    error = BundleError(HOSTILE)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_values_and_reasons_of_libraries_are_cut():
    assert clip(HOSTILE).isprintable() and len(clip(HOSTILE)) == 100
    assert first_line(ValueError(HOSTILE)).isprintable() and len(first_line(ValueError(HOSTILE))) == 400
