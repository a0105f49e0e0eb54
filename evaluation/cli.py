"""The command line of the evaluation: make pictures, turn them into features, compare, report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from evaluation.devices import default_device
from evaluation.features import KINDS, Embeddings, Extractor, load_extractors
from evaluation.figures import Asked, ask, compare, retrieve, styles_of
from evaluation.painters import Painter, bundle_painter, pipeline_painter, student_painter
from evaluation.reference import Reference, load_reference
from tiue.distill.command import status_of
from tiue.files import write_text, written_whole
from tiue.prompts import load_prompts
from tiue.settings import add_flags, check, given, setting

_DESCRIPTION = """\
Say how good the pictures of a bundle, a pipeline or a student are: how near to reference pictures, how varied, and
whether they show what was asked. docs/evaluation.md says what each figure means."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of an evaluation.

    Raises:
        ValueError: a setting is of another type or out of range.
    """

    features: tuple[str, ...] = setting(
        (), f"networks that look at the pictures: {', '.join(KINDS)}", metavar="KIND=PATH[,KIND=PATH]", shown="none"
    )
    seeds: int = setting(4, "pictures of each prompt", group="the pictures", at_least=1)
    first_seed: int = setting(1, "seed of the first picture of each prompt", at_least=0)
    steps: int | None = setting(None, "steps", at_least=1, shown="the model's; 25 for a pipeline")
    guidance: float = setting(
        7.5,
        "classifier-free guidance of a pipeline, or the guidance that its UNet takes as an input; 1: none",
        at_least=0,
    )
    spacing: str | None = setting(
        None, "where a pipeline's timesteps lie", choices=["leading", "trailing", "linspace"], shown="the pipeline's"
    )
    batch: int = setting(8, "prompts at once", at_least=1)
    reference_size: int = setting(512, "height and width that reference pictures of a folder get, pixels", at_least=8)
    samples: int = setting(200, "bootstrap samples of the intervals", group="the figures", at_least=2)

    def __post_init__(self):
        check(self)
        if not self.features:
            raise ValueError(f"`features` must name a network as KIND=PATH, with {', '.join(KINDS)}, got none")


@dataclass(frozen=True)
class Judge:
    """A network, and the features (n, D) that it sees in the reference."""

    extractor: Extractor
    real: Embeddings


def load_judges(
    reference: Reference, features: Sequence[str], known: Mapping[str, Embeddings] | None = None
) -> list[Judge]:
    """Load the networks of an evaluation, which can serve several evaluations.

    Args:
        reference: pictures to compare with.
        features: the networks, as KIND=PATH.
        known: features of the reference by kind of network, of those that were computed before.

    Raises:
        ValueError: a kind is unknown or named twice, a network cannot be read, features are not finite, or known ones
            are not of as many pictures.
    """
    judges = []
    for one in load_extractors(features, default_device()):
        real = (known or {}).get(one.name)
        if real is not None and len(real) != (count := len(reference.pictures)):
            raise ValueError(f"{one.name}: expected features of {count} reference pictures, got {real.shape}")
        judges.append(Judge(one, _finite(one, _features(reference, one) if real is None else real)))
    return judges


def evaluate(
    painter: Painter,
    prompts: Sequence[str],
    reference: Reference,
    judges: Sequence[Judge],
    config: EvaluationConfig,
    save: Path | None = None,
    compared: bool = True,
) -> dict[str, Any]:
    """Evaluate a painter.

    Args:
        painter: from prompts to pictures; see `evaluation.painters`.
        prompts: the prompts.
        reference: pictures to compare with.
        judges: networks that look at the pictures.
        config: the settings.
        save: a folder for the pictures, as PROMPT-SEED.png with the prompt's number.
        compared: whether pictures are compared with the reference. If not, there are figures of texts and styles only.

    Returns:
        The report, made of what JSON can hold: "features" has the figures by kind of network.

    Raises:
        ValueError: there are fewer than two pictures to compare, or fewer than two to compare with, or a network gives
            features that are not finite.
    """
    for name, count in (("reference", len(reference.pictures)), ("prompts", len(prompts) * config.seeds)):
        if compared and count < 2:
            raise ValueError(f"{name}: expected at least 2 pictures, got {count}")
    asked = ask(prompts, reference.captions, reference.styles)
    made = _made(painter, prompts, [judge.extractor for judge in judges], config, save)
    prompt = np.repeat(np.arange(len(prompts)), config.seeds)
    return {
        "settings": asdict(config),
        "prompts": len(prompts),
        "pictures": len(prompt),
        "reference pictures": len(reference.pictures),
        "candidates": len(asked.candidates),
        "features": {
            judge.extractor.name: _figures(judge, made[judge.extractor.name], prompt, asked, config.samples, compared)
            for judge in judges
        },
    }


def _made(
    painter: Painter, prompts: Sequence[str], extractors: list[Extractor], config: EvaluationConfig, save: Path | None
) -> dict[str, Embeddings]:
    """Make the pictures and keep their features only."""
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    parts: dict[str, list[Embeddings]] = {extractor.name: [] for extractor in extractors}
    for start in tqdm(range(0, len(prompts), config.batch), desc="pictures", disable=not sys.stderr.isatty()):
        pictures = painter(prompts[start : start + config.batch], seeds)
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)
            for i, picture in enumerate(pictures):
                number, seed = start + i // len(seeds), seeds[i % len(seeds)]
                with written_whole(save / f"{number:05}-{seed}.png") as temporary:
                    Image.fromarray(picture).save(temporary, "PNG")
        for extractor in extractors:
            parts[extractor.name].append(_finite(extractor, extractor.pictures(pictures)))
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def _finite(extractor: Extractor, features: Embeddings) -> Embeddings:
    """Raise ValueError for features that are not finite: no text is nearer to them than the one that was asked for."""
    if not np.isfinite(features).all():
        raise ValueError(f"{extractor.name}: expected finite features, got others: its weights may be damaged")
    return features


def _features(reference: Reference, extractor: Extractor, batch: int = 64) -> Embeddings:
    total = -(-len(reference.pictures) // batch)
    batches = tqdm(
        reference.batches(batch), desc=f"{extractor.name}: reference", total=total, disable=not sys.stderr.isatty()
    )
    return np.concatenate([extractor.pictures(pictures) for pictures in batches])


def _figures(
    judge: Judge, made: Embeddings, prompt: np.ndarray, asked: Asked, samples: int, compared: bool
) -> dict[str, Any]:
    figures, counts = compare(judge.real, made, prompt, samples) if compared else {}, {}
    if judge.extractor.reads:
        figures |= retrieve(judge.extractor, made, prompt, asked, samples)
        counts, of_styles = styles_of(judge.extractor, made, prompt, asked, samples)
        figures |= of_styles
    result: dict[str, Any] = {name: asdict(interval) for name, interval in figures.items()}
    return result | ({"pictures by style": counts} if counts else {})


def table(report: dict[str, Any]) -> str:
    """Lay a report out as text: a row for each figure, a column for each network."""
    columns = report["features"]
    names = list(dict.fromkeys(n for figures in columns.values() for n, f in figures.items() if "value" in f))
    cells = [["", *columns]]
    cells += [[name, *(_cell(figures.get(name)) for figures in columns.values())] for name in names]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    for kind, figures in columns.items():
        if counts := figures.get("pictures by style"):
            rows.append(f"{kind}: " + ", ".join(f"{style} {count}" for style, count in counts.items()))
    return "\n".join(rows)


def _cell(figure: dict[str, float] | None) -> str:
    return "" if figure is None else "{value:.4g} ({low:.4g} to {high:.4g})".format(**figure)


def parser() -> argparse.ArgumentParser:
    """Make the parser: flags for files, then one for every setting."""
    result = argparse.ArgumentParser(prog="python -m evaluation", description=_DESCRIPTION)
    judged = result.add_mutually_exclusive_group(required=True)
    judged.add_argument("--bundle", type=Path, metavar="DIR", help="a bundle of tiue-runtime")
    judged.add_argument(
        "--pipeline", type=Path, metavar="DIR", help="a diffusers pipeline directory, for example a teacher"
    )
    judged.add_argument("--student", type=Path, metavar="FILE", help="a student.safetensors")
    result.add_argument(
        "--prompts", required=True, type=Path, metavar="PATH", help="captions: .txt (one a line), .jsonl or .parquet"
    )
    result.add_argument(
        "--reference",
        required=True,
        type=Path,
        metavar="PATH",
        help="pictures to compare with: a folder, or an NPZ with captions.json and styles.json beside it",
    )
    result.add_argument("--out", type=Path, required=True, metavar="FILE", help="the report, as JSON")
    result.add_argument("--save", type=Path, metavar="DIR", help="keep the pictures in this folder")
    add_flags(result, EvaluationConfig)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; on failure, print one line that says why.

    Returns:
        0; 2 if it cannot run; 130 after Ctrl-C.
    """
    arguments = parser().parse_args(argv)
    return status_of("python -m evaluation", lambda: _judge(arguments), EvaluationConfig)


def _judge(arguments: argparse.Namespace) -> None:
    settings = given(arguments, EvaluationConfig)
    config = EvaluationConfig(**settings)
    if ignored := [name for name in ("guidance", "spacing") if name in settings and not arguments.pipeline]:
        raise ValueError(f"`{ignored[0]}` is a setting of pipelines: bundles and students have their own")
    prompts = load_prompts(arguments.prompts)
    if arguments.out.is_dir():
        raise ValueError(f"--out: {arguments.out} is a directory, expected a file")
    if arguments.save is not None and arguments.save.exists() and not arguments.save.is_dir():
        raise ValueError(f"--save: {arguments.save} is a file, expected a directory")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    reference = load_reference(arguments.reference, config.reference_size)
    painter, judges = _painter(arguments, config), load_judges(reference, config.features)
    report = evaluate(painter, prompts, reference, judges, config, arguments.save)
    judged = arguments.bundle or arguments.pipeline or arguments.student
    files = {"judged": str(judged), "prompt file": str(arguments.prompts), "reference": str(arguments.reference)}
    print(table(report))
    write_text(arguments.out, json.dumps(files | report, indent=2) + "\n")


def _painter(arguments: argparse.Namespace, config: EvaluationConfig) -> Painter:
    if arguments.bundle:
        return bundle_painter(arguments.bundle, config.steps)
    if arguments.student:
        return student_painter(arguments.student, default_device(), config.steps)
    return pipeline_painter(arguments.pipeline, default_device(), config.steps or 25, config.guidance, config.spacing)
