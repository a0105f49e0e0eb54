"""`python -m evaluation.encoder`: train the image encoder, and measure it on drawings that it never saw."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiue_runtime.host.machine import has_bf16

from evaluation.encoder.contrastive import EncoderTraining, Texts, held_out
from evaluation.encoder.encoder_config import EncoderConfig
from evaluation.encoder.network import Encoder, load_encoder
from evaluation.encoder.sentences import Sentences
from evaluation.metrics import bootstrap, rank_of_asked, unit
from evaluation.reference import Reference, load_reference
from tiue.distill.loop import StoppedError, train
from tiue.distill.method import Run
from tiue.files import one_line, write_text
from tiue.settings import add_flags, given, with_flags


def train_encoder(reference: Reference, out: Path, config: EncoderConfig) -> dict[str, Any]:
    """Train an encoder and measure it, once: a finished run is not repeated, a stopped one resumes.

    Args:
        reference: drawings with concepts, styles and captions.
        out: directory of the run; the encoder will be its encoder.safetensors, the report its report.json.
        config: the settings.

    Returns:
        The report: retrieval on the drawings that were held out, and how the encoder was trained.

    Raises:
        ValueError: the drawings lack concepts or styles, or the directory holds another run.
        StoppedError: a signal stopped the run, which is saved.
    """
    reference.require_concepts()
    path, weights = out / "report.json", out / EncoderTraining.result
    if not path.exists():
        run = Run(out, config)
        texts = Texts(reference, Sentences(run.accelerator.device))
        begun = time.process_time()
        train(run, EncoderTraining(run, config, reference, texts))
        trained = {"settings": asdict(config), "cpu_seconds_of_the_last_part": round(time.process_time() - begun)}
        found = retrieval_report(load_encoder(weights), reference, texts) | trained
        write_text(path, json.dumps(found, indent=2) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def retrieval_report(encoder: Encoder, reference: Reference, texts: Texts) -> dict[str, Any]:
    """Measure how often a drawing's nearest concept is its own, and its nearest style."""
    held = held_out(reference)
    concepts = unit(concept_embeddings(encoder, texts))
    image, asked = encoder.embed_pictures(reference.pictures[np.flatnonzero(held)]), reference.concept[held]
    ranks = rank_of_asked(image, concepts, asked)
    style = reference.style[held]
    styled = encoder.embed_vectors(texts.styled[asked].to(encoder.device)).detach().cpu().numpy()
    named = np.einsum("nd,nsd->ns", image, styled).argmax(axis=1) == style
    return {
        "drawings": len(image),
        "concepts": len(concepts),
        "top1": asdict(bootstrap(lambda rank: float((rank < 1).mean()), ranks)),
        "top5": asdict(bootstrap(lambda rank: float((rank < 5).mean()), ranks)),
        "top1 by style": {
            name: float((ranks[style == s] < 1).mean()) for s, name in enumerate(reference.styles) if (style == s).any()
        },
        "style": asdict(bootstrap(lambda right: float(right.mean()), named)),
    }


def concept_embeddings(encoder: Encoder, texts: Texts) -> np.ndarray:
    """One embedding for each concept, (K, D): the mean over its captions."""
    captions = encoder.embed_vectors(texts.captions.to(encoder.device)).detach().cpu().numpy()
    return np.stack(
        [captions[f : f + n].mean(axis=0) for f, n in zip(texts.first.tolist(), texts.count.tolist(), strict=True)]
    )


def fastest_precision() -> str:
    """`mixed_precision` for this machine: bf16, or no on CPUs that emulate bfloat16 and take 30 times as long in it."""
    return "bf16" if torch.cuda.is_available() or has_bf16() else "no"


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
        0; 2 if it cannot run; 128 plus the number of the signal that stopped it.
    """
    arguments = parser().parse_args(argv)
    try:
        config = EncoderConfig(**{"mixed_precision": fastest_precision()} | given(arguments, EncoderConfig))
        report = train_encoder(load_reference(arguments.drawings), arguments.out, config)
    except StoppedError as stopped:
        print(f"python -m evaluation.encoder: {one_line(stopped)}", file=sys.stderr)
        return 128 + stopped.signal
    except (ValueError, OSError) as error:
        print(f"python -m evaluation.encoder: {with_flags(one_line(error), EncoderConfig)}", file=sys.stderr)
        return 2
    top1 = report["top1"]
    print(
        f"retrieval of the concept of {report['drawings']} held-out drawings among {report['concepts']}: "
        f"{top1['value']:.3f} ({top1['low']:.3f} to {top1['high']:.3f}); {arguments.out / EncoderTraining.result}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
