"""Run the fuzzer by hand.

python tests/fuzzer.py --cases 20000                                 as many cases of all targets, and counts
python tests/fuzzer.py --target graphs --seed 7 --case 123           one case again
python tests/fuzzer.py --target graphs --seed 7 --cases 500 --shrink a smaller example of the first failure
"""

import argparse
import resource
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the packages of this checkout

from fuzz.driver import SHARES, Report, drive
from fuzz.pool import Worker

_SHARD = 500  # cases of one seed
_MEMORY = 12 * 2**30  # bytes of addresses; cases must not take the machine's memory before they reach a worker


def main() -> int:
    """Run the cases that were asked for. Returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", action="append", choices=sorted(SHARES))
    parser.add_argument("--case", type=int, help="draw all cases of this seed up to this one, and run only this one")
    parser.add_argument("--shrink", action="store_true", help="look for a small example of the first failure")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    targets = arguments.target or list(SHARES)
    if arguments.case or arguments.shrink:
        with Worker(*targets) as worker:
            cases = arguments.case or arguments.cases
            report = drive(worker, cases, arguments.seed, arguments.case, arguments.shrink)
        print(*(f"{kind}: {report.examples[kind]}" for kind in report.outcomes), *report.failures, sep="\n")
        return bool(report.failures)
    begun, total, failed = time.monotonic(), 0, 0
    for target in targets:
        reports: list[Report] = []
        cases = arguments.cases * SHARES[target] // sum(SHARES[t] for t in targets)
        with Worker(target) as worker:
            for start in range(0, cases, _SHARD):
                number = 1000 * arguments.seed + start // _SHARD
                report = drive(worker, min(_SHARD, cases - start), number)
                print("".join(f"{failure}\n" for failure in report.failures), end="", flush=True)
                reports.append(report)
        _print(reports)
        total += sum(report.outcomes.total() for report in reports)
        failed += sum(len(report.failures) for report in reports)
    print(f"{total} cases in {time.monotonic() - begun:.0f} s, {failed} failures")
    return failed > 0


def _print(reports: list[Report]) -> None:
    counts = sum((report.outcomes for report in reports), Counter[str]())
    different = len(set().union(*(report.different for report in reports)))
    slowest = max(report.slowest for report in reports)
    print(f"{reports[0].target}: {counts.total()} cases, {different} of them different, the slowest {slowest:.1f} s")
    for kind, count in sorted(counts.items()):
        example = next(report.examples[kind] for report in reports if kind in report.examples)
        print(f"  {count:6} {kind}  {example[-110:]!r}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
