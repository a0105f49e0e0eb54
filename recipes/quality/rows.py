"""What is compared: a row is a method with its settings and its start. Presets hold the budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from evaluation.encoder.encoder_config import EncoderConfig
from recipes.baselines.config import SWIFTBRUSH, SWIFTBRUSH_V2
from tiue.distill.config import read_preset

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of the table, for each number of steps.

    Attributes:
        name: of its folder and in the table.
        method: "teacher", "resampled" (the teacher, sampled as LCM's students are) and "start" are not trained; "tiue",
            "lcm", "add", "swiftbrush", "swiftbrushv2" are; "merge" merges the rows in `start`.
        steps: numbers of steps with which it is drawn.
        start: "teacher", "warm", or the names of rows whose results it starts from.
        settings: of the method.
        search: settings of which the best is chosen, each trained with a part of the budget.
        like: the row whose search chose the settings of this one, too.
        main: whether it is trained with every seed.
        timed: whether its graphs are exported and timed.
    """

    name: str
    method: str
    steps: tuple[int, ...]
    start: tuple[str, ...] = ("teacher",)
    settings: Settings = field(default_factory=dict)
    search: tuple[Settings, ...] = ()
    like: str | None = None
    main: bool = False
    timed: bool = True


_SIZES = ("iterations", "batch_size", "mixed_precision", "checkpoint_every", "sample_every")  # a preset has its own
_OURS = {name: value for name, value in read_preset("emoji").items() if name not in _SIZES}
_OURS["text_cache"] = False  # A run draws a few thousand captions, and to encode all 38,000 takes as long as the run.
# With the paper's rate of 1e-4, the critic still guesses after 60 updates. With 1e-3 and the paper's penalty, it gets
# worse than a guess, and drowns the distillation loss.
_PICTURES = {"ema_decay": 0.99, "guidance": 2.0, "critic_learning_rate": 3e-4, "penalty_weight": 1e-2}
_LCM = {"learning_rate": 1e-5, "ema_decay": 0.99, "guidance_min": 1.5, "guidance_max": 4.0}
_ONE = SWIFTBRUSH | {name: value for name, value in _OURS.items() if name != "steps"}
_LORA = {"fake_score": "lora", "fake_learning_rate": 1e-3, "fake_steps": 1}
_TWO = _ONE | {"clip_weight": SWIFTBRUSH_V2["clip_weight"]}


def _grid(rates: Sequence[float], name: str, values: Sequence[float]) -> tuple[Settings, ...]:
    return tuple({"learning_rate": rate, name: value} for rate in rates for value in values)


_SLOW, _FAST = (1e-5, 3e-5), (3e-5, 1e-4)  # after a warm start, and from the teacher
_SCALES, _FAST_SCALES = (_grid(rates, "guidance", (2.0, 3.0)) for rates in (_SLOW, _FAST))
_LOW = _grid((1e-5,), "guidance", (1.0, 1.25))  # guided samples are denoised best with hardly any guidance
_RANGES = _grid(_FAST, "guidance_max", (2.5, 4.0))
_PULLS = _grid(_SLOW, "distillation_weight", (10.0, 100.0))
_NO_KL, _FOUR = _OURS | {"kl_weight": 0.0}, _OURS | {"steps": (4,)}
_CONTROL = _FOUR | {"share_encoder": False}
_ONE_SHARED, _TWO_LORA = _OURS | {"shared_up_blocks": 1}, _TWO | {"student_rank": 64}

ROWS = (
    Row("teacher", "teacher", (25, 8, 4), timed=False),
    Row("teacher, new noise", "resampled", (4, 2, 1), timed=False),
    Row("warm start", "start", (4, 2, 1), ("warm",)),
    Row("TiUE", "tiue", (4, 2, 1), ("warm",), _OURS, _SCALES, main=True),
    Row("TiUE, lower guidance", "tiue", (4, 2, 1), ("warm",), _OURS, _LOW, main=True),
    Row("TiUE without KL", "tiue", (4, 2, 1), ("warm",), _NO_KL, like="TiUE", main=True),
    Row("TiUE, four steps only", "tiue", (4,), ("warm",), _FOUR, like="TiUE"),
    Row("TiUE, four UNets", "tiue", (4,), ("warm",), _CONTROL, like="TiUE", timed=False),
    Row("TiUE, one shared up block", "tiue", (4, 2, 1), ("warm",), _ONE_SHARED, like="TiUE"),
    Row("TiUE from the teacher", "tiue", (4, 2, 1), ("teacher",), _OURS, _FAST_SCALES),
    Row("TiUE from the teacher, without KL", "tiue", (4, 2, 1), ("teacher",), _NO_KL, like="TiUE from the teacher"),
    Row("SwiftBrush", "swiftbrush", (1,), ("warm",), _ONE | _LORA, _SCALES, main=True),
    Row("SwiftBrush, full fake score", "swiftbrush", (1,), ("warm",), _ONE, like="TiUE, lower guidance"),
    Row("SwiftBrush from the teacher", "swiftbrush", (1,), ("teacher",), _ONE, like="TiUE from the teacher"),
    Row("LCM", "lcm", (4, 2, 1), ("teacher",), _LCM, _RANGES, main=True),
    Row("ADD", "add", (4, 1), ("teacher",), _PICTURES, _PULLS, main=True),
    Row("ADD in one step", "add", (1,), ("warm",), _PICTURES | {"timesteps": (999,), "sample_steps": 1}, like="ADD"),
    Row("SwiftBrush v2, full", "swiftbrushv2", (1,), ("ADD in one step",), _TWO, like="SwiftBrush"),
    Row("SwiftBrush v2, LoRA", "swiftbrushv2", (1,), ("ADD in one step",), _TWO_LORA, like="SwiftBrush"),
    Row("SwiftBrush v2", "merge", (1,), ("SwiftBrush v2, full", "SwiftBrush v2, LoRA")),
)
_OBSERVER = EncoderConfig(iterations=1500, width=16, resolution=48, seed=8)


@dataclass(frozen=True)
class Preset:
    """Sizes of a comparison."""

    name: str
    rows: tuple[Row, ...] = ROWS
    passes: int = 30_000  # of one picture through the UNet forward; a backward pass counts as two
    search_share: float = 0.25  # part of the budget that each setting of a search gets
    seeds: int = 3  # training seeds of the main rows
    batch: int = 16
    teacher_guidance: float = 2.0
    prompts: int = 120  # captions of pictures that were trained on, drawn with `pictures` seeds each
    pictures: int = 2
    plain: int = 6  # prompts without a style word, drawn with `styles` seeds each
    styles: int = 24
    samples: int = 200  # of the bootstrap
    runs: int = 20  # of the latency
    inception: bool = True  # the second judge
    judge: EncoderConfig = field(default_factory=EncoderConfig)
    observer: EncoderConfig = _OBSERVER


_V2 = ("SwiftBrush v2, full", "SwiftBrush v2, LoRA", "SwiftBrush v2")
_NAMES = ("teacher", "teacher, new noise", "TiUE", "LCM", "ADD in one step", *_V2)
_SMOKE = tuple(
    replace(row, steps=row.steps[-1:], search=row.search[:2] if row.name == "LCM" else (), like=None, timed=False)
    for row in ROWS
    if row.name in _NAMES
)
_TINY = EncoderConfig(iterations=1, batch_size=4, width=8, resolution=16, embedding=16)
PRESETS = {
    "cpu": Preset("cpu", judge=EncoderConfig(iterations=1500, resolution=48)),
    # For a smaller teacher, that of the preset `small` of recipes.emoji.
    "small": Preset(
        "small",
        judge=EncoderConfig(iterations=1000, width=16, resolution=48),
        observer=replace(_OBSERVER, iterations=500),
    ),
    "gpu": Preset("gpu", passes=2_000_000, batch=128),
    # Every method once, in seconds. It tests that the comparison runs.
    "smoke": Preset(
        "smoke",
        rows=_SMOKE,
        passes=1,
        seeds=1,
        batch=2,
        prompts=3,
        pictures=2,
        plain=1,
        styles=2,
        samples=2,
        inception=False,
        judge=_TINY,
        observer=replace(_TINY, seed=8),
    ),
}
