"""Cases drawn from a seed, run, and counted by what came out."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, reject, seed, settings
from hypothesis.strategies import SearchStrategy

from fuzz import bundles, captions, pictures, students
from fuzz.cases import Case
from fuzz.pool import Outcome, Worker

TARGETS: dict[str, Callable[[], SearchStrategy[Case]]] = {
    "manifests": bundles.manifests,
    "tokenizers": bundles.tokenizer_files,
    "graphs": bundles.graph_files,
    "external": bundles.external_files,
    "students": students.student_files,
    "pipelines": students.pipelines,
    "captions": captions.caption_files,
    "pictures": pictures.pictures,
}
SHARES = {
    "manifests": 10,
    "tokenizers": 8,
    "graphs": 12,
    "external": 6,
    "students": 2,
    "pipelines": 1,
    "captions": 8,
    "pictures": 2,
}


@dataclass(frozen=True)
class Failure:
    """A case out of which something came that must not."""

    target: str
    seed: int
    number: int
    case: Case
    outcome: Outcome

    def __str__(self) -> str:
        again = f"python tests/fuzzer.py --target {self.target} --seed {self.seed} --case {self.number}"
        return f"{self.outcome.kind}: {self.outcome.detail}\n  {self.case}\n  {again}"


@dataclass
class Report:
    """Outcomes of many cases of one target."""

    target: str
    outcomes: Counter[str] = field(default_factory=Counter[str])
    failures: list[Failure] = field(default_factory=list[Failure])
    examples: dict[str, str] = field(default_factory=dict[str, str])  # of each outcome, the last detail
    different: set[int] = field(default_factory=set[int])  # hashes of the cases, of which some are drawn twice
    slowest: float = 0.0  # seconds


def drive(worker: Worker, cases: int, number: int, only: int | None = None, shrink: bool = False) -> Report:
    """Run cases of one target.

    Args:
        worker: runs them.
        cases: how many.
        number: the seed.
        only: draw all cases up to this one, and run this one alone.
        shrink: look for a smaller case where one fails, and raise AssertionError for it.
    """
    target, drawn = worker.target, 0
    report = Report(target)
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)

    @seed(number)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(TARGETS[target]())
    def each(case: Case) -> None:
        nonlocal drawn
        known = len(report.different)
        report.different.add(hash((repr(case), *case.files.values())))
        if len(report.different) == known and not shrink:
            reject()  # drawn before
        drawn += 1
        if only not in (None, drawn):
            return
        outcome = worker.run(case)
        report.slowest = max(report.slowest, worker.seconds)
        report.outcomes[outcome.kind] += 1
        report.examples[outcome.kind] = outcome.detail
        if outcome.bad:
            report.failures.append(Failure(target, number, drawn, case, outcome))
            assert not shrink, f"{outcome}"

    each()
    return report


def undamaged(target: str, about: dict[str, Any] | None = None) -> Case:
    """Return a case of which nothing was changed."""
    if target == "students":
        return Case(students.undamaged(), ())
    if target == "pipelines":
        return Case(students.pipeline(), (), {"source": "base"})
    if target in ("manifests", "tokenizers", "graphs", "external"):
        return Case(bundles.read("tiny"), ())
    files = {"captions.jsonl": b'{"prompt": "a red heart"}'} if target == "captions" else {}
    defaults = {"captions": {"field": None}, "pictures": {"prompt": "a red heart"}, "code": {"code": "pass"}}
    return Case(files, (), about or defaults[target])
