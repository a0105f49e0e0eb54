"""A few hundred damaged files of every kind: refused in one line by an error of ours, or accepted and harmless.

`python tests/fuzzer.py --cases 20000` runs more of them (docs/robustness.md).
"""

import pytest
from fuzz.driver import TARGETS, drive, undamaged
from fuzz.pool import Outcome, Worker

CASES = {
    "manifests": 80,
    "tokenizers": 60,
    "graphs": 80,
    "external": 40,
    "students": 12,
    "pipelines": 12,
    "captions": 60,
    "pictures": 40,
}
SEED = 20_261


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files_are_refused_in_one_line_or_harmless(target):
    with Worker(target) as worker:
        report = drive(worker, CASES[target], SEED)
    assert report.outcomes.total() >= CASES[target] // 2, "too few cases were drawn"
    assert not report.failures, "\n".join(map(str, report.failures))
    kinds = {kind.partition(":")[0] for kind in report.outcomes}
    assert kinds == {"accepted", "refused"}, "a fuzzer that sees one side only is broken"


@pytest.mark.parametrize("target", sorted({*TARGETS} - {"students"}))
def test_undamaged_files_are_accepted(target):
    with Worker(target) as worker:
        assert worker.run(undamaged(target)).kind.startswith("accepted: ")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("import os; os.abort()", "CRASHED SIGABRT"),
        ("while True: pass", "HUNG"),
        ("x = bytearray(2**40)", "FOREIGN MemoryError"),
        ("raise KeyError('name')", "FOREIGN KeyError"),
        ("raise ValueError('two' + chr(10) + 'lines')", "MESSAGE"),
        ("raise ValueError('x' * 1001)", "MESSAGE"),
        ("raise ValueError('no')", "refused: ValueError"),
        ("pass", "accepted: code"),
    ],
)
def test_the_fuzzer_sees_every_way_to_fail(code, kind, monkeypatch):
    monkeypatch.setattr("fuzz.pool.DEADLINE", 3.0)
    with Worker("code") as worker:
        outcome = worker.run(undamaged("code", {"code": code}))
        assert outcome.kind == kind
        assert outcome.bad == kind.split()[0].isupper()
        assert worker.run(undamaged("code")).kind == "accepted: code", "the worker that follows works"


def test_a_seed_and_a_number_give_the_same_case():
    def drawn() -> list[str]:
        seen: list[str] = []

        class Reader(Worker):
            def run(self, case) -> Outcome:
                seen.append(repr((case, case.files)))
                return Outcome("accepted: nothing")

        with Reader("manifests") as reader:
            drive(reader, 20, SEED)
        return seen

    assert len(drawn()) >= 10 and drawn() == drawn()
