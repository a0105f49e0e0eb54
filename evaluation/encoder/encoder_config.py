"""Sizes and settings of an encoder, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from tiue.distill.config import RunConfig
from tiue.settings import setting


@dataclass(frozen=True)
class Shape:
    """The sizes of an encoder.

    Attributes:
        resolution: pixels, height and width of what it sees.
        widths: channels of its stages. Each stage halves height and width.
        embedding: length of an embedding.
        text_hidden: width of the hidden layer that maps the text encoder's vectors.
    """

    resolution: int = 64
    widths: tuple[int, ...] = (32, 64, 128, 256)
    embedding: int = 256
    text_hidden: int = 512


@dataclass(frozen=True)
class EncoderConfig(RunConfig):
    """Settings of the encoder and its training.

    Raises:
        ValueError: a setting is of another type or out of range.
    """

    iterations: int = setting(3000, "updates", group="the run", at_least=1)
    batch_size: int = setting(128, "drawings per process and micro-batch", at_least=1)
    learning_rate: float = setting(0.02, "learning rate of Muon, for convolutions and matrices", above=0)
    learning_rate_decay: str = setting(
        "linear",
        "linear: all learning rates fall to 0 over the run; none: they are constant",
        choices=["none", "linear"],
    )
    ema_decay: float = setting(0.995, "decay per update of the average, which is what is saved", at_least=0, at_most=1)
    seed: int = setting(7, "the same seed, settings and machine give the same weights", at_least=0)
    keep: int = setting(1, "checkpoints kept on the disk", at_least=1)

    adam_learning_rate: float = setting(2e-3, "learning rate of AdamW, for all else", group="the encoder", above=0)
    width: int = setting(
        32, "channels of the first of four stages; each has twice as many as the one before", at_least=8
    )
    resolution: int = setting(64, "pixels, height and width of what the encoder sees", at_least=16)
    embedding: int = setting(256, "length of an embedding", at_least=1)
    temperature: float = setting(0.07, "temperature of the loss at the start", above=0)
    smoothing: float = setting(0.1, "label smoothing over the concepts", at_least=0, at_most=1)
    style_weight: float = setting(0.3, "weight of the loss over the styles", at_least=0)
    label_share: float = setting(
        0.2,
        "share of concepts that an update shows by their label; the others appear by a random caption",
        at_least=0,
        at_most=1,
    )

    @property
    def shape(self) -> Shape:
        """The sizes of the encoder."""
        return Shape(
            resolution=self.resolution,
            widths=tuple(self.width * 2**level for level in range(4)),
            embedding=self.embedding,
        )
