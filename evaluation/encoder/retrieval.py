"""Training an encoder, and measuring how well it finds the concept of drawings that it never saw."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.encoder.contrastive import EncoderTraining, Texts, held_out
from evaluation.encoder.encoder_config import EncoderConfig
from evaluation.encoder.network import Encoder, load_encoder
from evaluation.encoder.sentences import Sentences
from evaluation.metrics import bootstrap, rank_of_asked, unit
from evaluation.reference import Reference, read_json
from tiue.distill.loop import train
from tiue.distill.method import Run
from tiue.distill.runs import check_same_run
from tiue.files import digest, write_text


def train_encoder(reference: Reference, out: Path, config: EncoderConfig, texts: Texts | None = None) -> dict[str, Any]:
    """Train an encoder and measure it, once: a finished run is not repeated, a stopped one resumes.

    Args:
        reference: drawings with concepts, styles and captions.
        out: directory of the run; the encoder will be its encoder.safetensors, the report its report.json.
        config: the settings.
        texts: those of `reference`, if the caller has them already; encoding them takes a while.

    Returns:
        The report: retrieval on the drawings that were held out, and how the encoder was trained.

    Raises:
        ValueError: the drawings lack concepts or styles, none of them is held out, or the directory holds another run.
        StoppedError: a signal stopped the run, which is saved.
    """
    reference.require_concepts()
    if not held_out(reference).any():
        raise ValueError(f"no drawing would be held out of {len(reference.pictures)}: give more drawings")
    path, weights = out / "report.json", out / EncoderTraining.result
    identity = {
        "captions": digest([text for variants in reference.captions for text in variants]),
        "drawings": _digest(reference),
    }
    if path.exists():
        check_same_run(out, config, identity, free=("mixed_precision",))
    else:
        run = Run(out, config)
        run.identify(**identity)
        texts = texts or Texts(reference, Sentences(run.accelerator.device))
        begun = time.process_time()
        train(run, EncoderTraining(run, config, reference, texts))
        trained = {"settings": asdict(config), "cpu_seconds_of_the_last_part": round(time.process_time() - begun)}
        found = retrieval_report(load_encoder(weights), reference, texts) | trained
        write_text(path, json.dumps(found, indent=2) + "\n")
    return _read_report(path)


def _read_report(path: Path) -> dict[str, Any]:
    found = read_json(path)
    settings = found.get("settings") if isinstance(found, dict) else None
    if not isinstance(settings, dict) or "mixed_precision" not in settings:
        raise ValueError(f"{path}: expected the report of python -m evaluation.encoder")
    return found


def _digest(reference: Reference) -> str:
    """Identify the pictures, their concepts and their styles by 16 hex digits."""
    hashed = hashlib.sha256()
    for pictures in reference.batches(1024):
        hashed.update(f"{pictures.shape}".encode() + np.ascontiguousarray(pictures).tobytes())
    for numbers in (reference.concept, reference.style):
        hashed.update(numbers.astype(np.int64).tobytes())
    return hashed.hexdigest()[:16]


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
