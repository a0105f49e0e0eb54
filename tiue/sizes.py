"""A check that configurations, which anybody can write, describe a model that is no larger than its weights."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from tiue.files import one_line
from tiue.pipeline_directory import ComponentsError

_COUNTS = re.compile(r"(?!.*out_channels).*(layer|block)")  # options that count modules
_LARGEST = 2**20  # limit of integers that are not a tensor's dimension, for example a default size


def check_sizes(configs: Mapping[str, Any], shapes: Collection[list[int]]) -> None:
    """Refuse a configuration that is far larger than the weights. Building its model would take hours, or all memory.

    Args:
        configs: part => its configuration.
        shapes: of all stored tensors of the model. Each layer has at least one.

    Raises:
        ComponentsError: a configuration has more layers than there are tensors, or a number larger than any dimension.
    """
    largest = max([_LARGEST, *(side for shape in shapes for side in shape)])
    for part, config in configs.items():
        for name, value in _integers(config, part):
            most = len(shapes) if _COUNTS.match(name) else largest
            if abs(value) > most:
                raise ComponentsError(
                    f"{name} is {one_line(repr(value), 40)}: expected at most {most} for these tensors"
                )


def _integers(value: Any, name: str) -> Iterator[tuple[str, int]]:
    """Yield (path, value) of every integer in JSON, and (path, length) of every list."""
    if isinstance(value, int):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _integers(item, f"{name}.{key}")
    elif isinstance(value, list):
        yield name, len(value)
        for item in value:
            yield from _integers(item, name)
