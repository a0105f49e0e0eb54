"""Results as files: one JSON for each part, written after every case, and one summary of all parts."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.agreement import BenchmarkError
from benchmarks.gpu.parts import PARTS
from benchmarks.report import write

SCHEMA = "tiue-gpu/1"  # format of the JSON, whose fields are those of Result
SUMMARY = "summary.md"


@dataclass
class Case:
    """One measurement of a part. Only a case that is done is never measured again."""

    status: str  # "partial", "done", "cannot run" or "failed"
    reason: str = ""  # of the last two
    seconds: float = 0.0  # that the case took, with its preparation
    values: dict[str, Any] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)  # see conditions.py


@dataclass
class Result:
    """The measurements of a part."""

    part: str
    about: str  # what the part measures
    gpu: str  # its name; "" in a dry run
    status: str = "unfinished"  # "unfinished", "done", "cannot run" or "failed"
    reason: str = ""  # why the part is not done
    cases: dict[str, Case] = field(default_factory=dict)
    schema: str = SCHEMA

    def write(self, out: Path) -> None:
        """Write OUT/PART.json and the summary of all parts in `out`."""
        write(path_of(out, self.part), (json.dumps(asdict(self), indent=2) + "\n").encode())
        write_summary(out)

    def finish(self, names: Iterable[str]) -> None:
        """Set status and reason from the cases.

        Args:
            names: of all cases of the part, also of those that were not begun.
        """
        missing = [name for name in names if name not in self.cases or self.cases[name].status == "partial"]
        for status in ("failed", "cannot run"):
            reasons = [f"{name}: {case.reason}" for name, case in self.cases.items() if case.status == status]
            if reasons:
                self.status, self.reason = status, "; ".join(reasons)
                return
        self.status = "unfinished" if missing else "done"
        self.reason = f"not measured yet: {', '.join(missing)}" if missing else ""


def path_of(out: Path, part: str) -> Path:
    """Return the path of a part's JSON."""
    return out / f"{part}.json"


def read(path: Path) -> Result:
    """Read a part's JSON.

    Raises:
        BenchmarkError: the file is no result of this program.
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        content["cases"] = {name: Case(**case) for name, case in content["cases"].items()}
        return Result(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BenchmarkError(f"{path} is no result of this benchmark: remove it, or name another --out") from error


def resumed(out: Path, fresh: Result) -> Result:
    """Return the result to go on with.

    Args:
        out: directory of the results.
        fresh: the result of a part that begins now.

    Returns:
        That of an earlier call, or `fresh`.

    Raises:
        BenchmarkError, OSError: as `read`, or the earlier call ran on another GPU. Its results are not overwritten.
    """
    path = path_of(out, fresh.part)
    if not path.exists():
        return fresh
    found = read(path)
    if found.gpu != fresh.gpu:
        raise BenchmarkError(f"{path} holds the results of {found.gpu or 'a dry run'}: name another --out")
    return found


def write_summary(out: Path) -> None:
    """Write OUT/summary.md from the JSON of all parts."""
    found = [read(path) for path in (path_of(out, part) for part in PARTS) if path.exists()]
    conditions = [case.conditions for result in found for case in result.cases.values()]
    distinct = [c for i, c in enumerate(conditions) if c not in conditions[:i]]
    blocks = ["\n".join(f"- {name}: {_text(value)}" for name, value in one.items()) for one in distinct]
    if any(not result.gpu for result in found):
        blocks += ["**A dry run on the CPU at tiny size. Its figures mean nothing.**"]
    for result in found:
        reason = f" ({result.reason})" if result.reason else ""
        blocks += [f"## {result.part}", f"{result.about}. Status: {result.status}{reason}.", _table(result.cases)]
        blocks += [str(case.values["table"]) for case in result.cases.values() if "table" in case.values]
    write(out / SUMMARY, ("\n\n".join(filter(None, blocks)) + "\n").encode())


def _table(cases: Mapping[str, Case]) -> str:
    """Return a Markdown table of all numbers, one row for each case."""
    numbers = [{k: v for k, v in case.values.items() if isinstance(v, int | float)} for case in cases.values()]
    columns = list(dict.fromkeys(column for row in numbers for column in row))
    if not cases:
        return ""
    rows = [["case", "status", *columns], ["---"] * (2 + len(columns))]
    for (name, case), row in zip(cases.items(), numbers, strict=True):
        rows.append([name, case.status, *(_text(row.get(column, "")) for column in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
