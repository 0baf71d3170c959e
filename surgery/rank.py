# SPDX-License-Identifier: Apache-2.0
"""`Rank`: the one choice of how many directions each matrix of an adapter gets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import ClassVar, Literal

from surgery_formats.errors import FitError, UsageError
from surgery_formats.text import show

__all__ = ["Budget", "Rank"]

_BUDGET = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([kmgt]?)(i?)(b?)", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class Budget:
    """Most that the adapter may hold: bytes or numbers."""

    limit: int
    measure: Literal["bytes", "parameters"]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``20MB``, ``512KiB`` (bytes) or ``2M``, ``300000`` (numbers).

        Raises:
            FitError: neither.
        """
        match = _BUDGET.fullmatch(text.strip())
        number, prefix, binary, unit = match.groups() if match else ("0", "", "", "")
        limit = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "))
        if limit < 1 or (binary and not unit):
            raise FitError(
                f"'{show(text, 40)}' is no budget", hint="write 20MB for bytes, or 2M for a number of parameters"
            )
        return cls(limit, "bytes" if unit else "parameters")


@dataclass(frozen=True, slots=True, repr=False)
class Rank:
    """How many directions each matrix gets.

    ``Rank(16)``, or ``16`` wherever a Rank is taken: a number. ``Rank(16, {"mlp.*": 32})``: another number for some modules.
    ``Rank.energy(.95)``, ``Rank.error(.05)``: as few as hold that share, or miss no more. ``Rank.budget("20MB")``: shared out over all
    matrices where it helps most. ``Rank.auto``: those above the rounding noise of storage. ``a & b``: as `a`, and no more than `b` allows.

    Attributes:
        number: Directions of every matrix; None where something else decides.
        patterns: Numbers of modules that differ, by pattern (`surgery.engine.selection`); the first that matches wins.
        least_energy: Share of each matrix' energy ``||.||_F^2`` to keep, in (0, 1].
        most_error: Greatest error of each matrix, relative, Frobenius, in (0, 1].
        most_size: Of the whole adapter.
        above_noise: Whether only directions above the noise of storage count.
    """

    number: int | None = None
    patterns: Mapping[str, int] = field(default_factory=dict, hash=False)
    least_energy: float | None = None
    most_error: float | None = None
    most_size: Budget | None = None
    above_noise: bool = False

    auto: ClassVar[Rank]

    def __post_init__(self) -> None:
        for number in (*([] if self.number is None else [self.number]), *self.patterns.values()):
            if isinstance(number, bool) or not isinstance(number, int):
                raise UsageError(f"a rank is a whole number, not {type(number).__name__}", hint=_HINT)
            if number < 1:
                raise FitError(f"the rank is {number}; it is at least 1")
        for name, value in (("energy", self.least_energy), ("error", self.most_error)):
            if value is not None and not 0 < value <= 1:
                raise FitError(f"{name} is {value:g}; it lies between 0 and 1")

    @classmethod
    def energy(cls, share: float) -> Rank:
        """As few directions as keep that share of each matrix' energy."""
        return cls(least_energy=_number(share, "energy"))

    @classmethod
    def error(cls, most: float) -> Rank:
        """As few directions as leave out no more than that of each matrix, relative to its norm."""
        return cls(most_error=_number(most, "error"))

    @classmethod
    def budget(cls, size: str) -> Rank:
        """For the whole adapter: ``20MB`` (bytes) or ``2M`` (parameters)."""
        if not isinstance(size, str):
            raise UsageError(f"a budget is a text such as '20MB', not {type(size).__name__}")
        return cls(most_size=Budget.parse(size))

    @classmethod
    def of(cls, rank: int | Rank) -> Rank:
        """`rank` as a Rank.

        Raises:
            UsageError: neither a number nor a Rank.
            FitError: a number below 1.
        """
        if isinstance(rank, Rank):
            return rank
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise UsageError(f"rank is a whole number or a Rank, not {type(rank).__name__}", hint=_HINT)
        return cls(rank)

    @property
    def choices(self) -> tuple[str, ...]:
        """What decides: ``rank``, ``auto``, ``energy``, ``error``, ``budget``; several for what was joined by ``&``."""
        made = {
            "rank": self.number is not None or bool(self.patterns),
            "auto": self.above_noise,
            "energy": self.least_energy is not None,
            "error": self.most_error is not None,
            "budget": self.most_size is not None,
        }
        return tuple(name for name, chosen in made.items() if chosen)

    def __and__(self, other: Rank) -> Rank:
        """Both choices together.

        Raises:
            UsageError: the same choice twice.
        """
        if not isinstance(other, Rank):
            return NotImplemented
        both = {entry.name: getattr(other, entry.name) for entry in fields(self) if getattr(other, entry.name)}
        if twice := [name for name in both if getattr(self, name)]:
            raise UsageError(f"{self!r} and {other!r} both choose {twice[0].replace('_', ' ')}")
        return replace(self, **both)

    def __repr__(self) -> str:
        patterns = f"patterns={dict(self.patterns)}" if self.patterns else ""
        parts = (
            [f"Rank({', '.join(filter(None, [str(self.number or ''), patterns]))})"] if "rank" in self.choices else []
        )
        parts += ["Rank.auto"] if self.above_noise else []
        parts += [f"Rank.energy({self.least_energy})"] if self.least_energy is not None else []
        parts += [f"Rank.error({self.most_error})"] if self.most_error is not None else []
        size = self.most_size
        parts += [f"Rank.budget('{size.limit}{'B' if size.measure == 'bytes' else ''}')"] if size is not None else []
        return " & ".join(parts) or "Rank()"


_HINT = "Rank.auto, Rank.energy(0.95), Rank.error(0.05) and Rank.budget('20MB') are the other choices"


def _number(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{name} is a number, not {type(value).__name__}")
    return float(value)


Rank.auto = Rank(above_noise=True)
