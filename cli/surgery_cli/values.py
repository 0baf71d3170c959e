# SPDX-License-Identifier: Apache-2.0
"""The types of options' values: sizes, shares, numbers within bounds, token ids, weights of adapters. Each says what is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery_formats.text import closest, show
from surgery_formats.threads import LARGEST_COUNT

if TYPE_CHECKING:
    from surgery.rank import Rank

__all__ = ["OneOf", "count", "first_ids", "number", "rank_of", "share", "size", "token_ids", "true_share", "weighted"]

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE | re.ASCII)
# a whole number alone may be the name of a graph's adapter
_WEIGHT = re.compile(r"(?:(?P<adapter>.*[^/:]):|(?=.*\.))(?P<weight>-?\d*\.?\d+)", re.ASCII)


_OTHERWISE = {
    "bfloat16": "bf16",
    "double": "fp64",
    "float": "fp32",
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
    "half": "fp16",
}
"""What torch calls the types of elements."""


class OneOf(click.Choice[str]):
    """One of some words; another one is told which it is near to."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """What click says, and what may be meant."""
        said, text = super().get_invalid_choice_message(value, ctx).removesuffix("."), str(value)
        meant = _OTHERWISE.get(text.lower().removeprefix("torch."), "")
        near = f"did you mean '{meant}'?" if meant in self.choices else closest(text, self.choices)
        return f"{said}; {near}" if near else said


def size(text: str) -> int:
    """A number of bytes: ``5GB`` (decimal), ``512MiB`` (binary), ``1000000``.

    Raises:
        click.BadParameter: anything else, or less than one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise click.BadParameter(f"'{show(text)}' is not a size; write 2GB, 512MiB or a number of bytes")
    number, unit, binary = match.groups()
    factor: int = (1024 if binary else 1000) ** _UNITS[(unit or "").lower()]
    whole, _, fraction = number.partition(".")  # whole numbers all the way: a double holds 16 digits only
    nbytes: int = int(whole) * factor + int(fraction or 0) * factor // 10 ** len(fraction)
    if nbytes < 1:
        raise click.BadParameter(f"'{show(text)}' is less than one byte")
    return nbytes


def number(*, least: float = -math.inf, above: float = -math.inf) -> Callable[[str], float]:
    """The type of a finite number that is at least `least` and above `above`."""
    bounds = f"of at least {least:g}" if least > -math.inf else f"above {above:g}"

    def parse(text: str) -> float:
        value = _float(text)
        if not (math.isfinite(value) and value >= least and value > above):
            raise click.BadParameter(f"'{show(text, 40)}' is not a number {bounds}")
        return value

    return parse


def count(least: int = 1, most: int = LARGEST_COUNT) -> Callable[[str], int]:
    """The type of a whole number from `least` on; none has more than 64 bits, which is what runtimes and files hold."""
    bounds = f"of at least {least}" if most == LARGEST_COUNT else f"from {least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value > most == LARGEST_COUNT:
            raise click.BadParameter(f"{show(text, 40)} is more than 64 bits hold")
        if not least <= value <= most:
            raise click.BadParameter(f"'{show(text, 40)}' is not a whole number {bounds}")
        return value

    parse.__name__ = "integer"  # what help calls the value
    return parse


def share(text: str) -> float:
    """A number above 0, at most 1: ``.95`` or ``95%``.

    Raises:
        click.BadParameter: anything else.
    """
    value = _float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 < value <= 1:
        raise click.BadParameter(f"'{show(text, 40)}' is not a share between 0 and 1")
    return value


def true_share(text: str) -> float:
    """A share that is less than all."""
    if (value := share(text)) == 1:
        raise click.BadParameter(f"'{show(text, 40)}' is not less than 1")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def rank_of(
    rank: int | str | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    budget: str | None = None,
    patterns: Mapping[str, int] | None = None,
) -> Rank:
    """The choice that ``--rank --energy --max-error --budget --rank-pattern`` make together."""
    from surgery.rank import Rank

    chosen = Rank.auto if rank == "auto" else Rank(None if rank is None else int(rank), patterns or {})
    chosen = chosen if energy is None else chosen & Rank.energy(energy)
    chosen = chosen if max_error is None else chosen & Rank.error(max_error)
    return chosen if budget is None else chosen & Rank.budget(budget)


def weighted(text: str) -> tuple[str, float]:
    """``ADAPTER[=WEIGHT]`` -> reference and weight. A file or folder that has the whole name always wins.

    Raises:
        click.BadParameter: what follows the last ``=`` is not a finite number; or a weight written otherwise: behind a
            colon, or as a word of its own.
    """
    reference, equals, suffix = text.rpartition("=")
    if Path(text).exists():
        return text, 1.0
    if not equals:
        if match := _WEIGHT.fullmatch(text):
            adapter = show(match["adapter"] or "ADAPTER")
            raise click.BadParameter(f"there is no '{show(text)}'; weights are written {adapter}={match['weight']}")
        return text, 1.0
    weight = _float(suffix)
    if not math.isfinite(weight) or not reference:
        raise click.BadParameter(f"neither is '{show(suffix)}' a weight, nor is there a file or folder '{show(text)}'")
    return reference, weight


def token_ids(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Token ids as numbers: ``1,5,9``.

    Raises:
        click.BadParameter: anything else.
    """
    try:
        return tuple(tuple(int(part) for part in value.replace(",", " ").split()) for value in values)
    except ValueError as error:
        raise click.BadParameter("token ids are whole numbers, as in 1,5,9") from error


def first_ids(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Token ids of one row; none if the option is not given.

    Raises:
        click.BadParameter: anything else.
    """
    return () if value is None else token_ids(ctx, param, (value,))[0]
