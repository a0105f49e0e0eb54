"""`python -m evaluation.encoder`: train the image encoder, and measure it on drawings that it never saw."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation.devices import default_device, fastest_precision
from evaluation.encoder.contrastive import EncoderTraining
from evaluation.encoder.encoder_config import EncoderConfig
from evaluation.encoder.retrieval import train_encoder
from evaluation.reference import load_reference
from tiue.distill.command import status_of
from tiue.settings import add_flags, given


def parser() -> argparse.ArgumentParser:
    """Make the parser: flags for files, then one for every setting."""
    result = argparse.ArgumentParser(prog="python -m evaluation.encoder", description=__doc__)
    result.add_argument(
        "--drawings",
        required=True,
        type=Path,
        metavar="NPZ",
        help="drawings with concepts and styles; beside it captions.json and styles.json (see docs/evaluation.md)",
    )
    result.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory of the run")
    add_flags(result, EncoderConfig)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; on failure, print one line that says why.

    Returns:
        0; 1 if the training diverged; 2 if it cannot run; 128 plus the number of the signal that stopped it.
    """
    arguments = parser().parse_args(argv)
    return status_of("python -m evaluation.encoder", lambda: _train(arguments), EncoderConfig)


def _train(arguments: argparse.Namespace) -> None:
    precision = fastest_precision(default_device())
    config = EncoderConfig(**{"mixed_precision": precision} | given(arguments, EncoderConfig))
    report = train_encoder(load_reference(arguments.drawings), arguments.out, config)
    top1 = report["top1"]
    print(
        f"retrieval of the concept of {report['drawings']} held-out drawings among {report['concepts']}: "
        f"{top1['value']:.3f} ({top1['low']:.3f} to {top1['high']:.3f}); {arguments.out / EncoderTraining.result}"
    )


if __name__ == "__main__":
    sys.exit(main())
