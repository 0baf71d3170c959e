# SPDX-License-Identifier: Apache-2.0
"""What was found out about factors: LoRA or DoRA, weighted or plain, and how much of the change is more than rounding.

Figures only: importing it needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["KINDS", "CalibrationFacts", "CalibrationTotals", "Kind", "KindFacts", "MergedLoRA", "Signal", "six_digits"]

Kind = Literal["auto", "lora", "dora"]
KINDS: tuple[Kind, ...] = ("auto", "lora", "dora")


@dataclass(frozen=True, slots=True)
class KindFacts:
    """What the factors are, and what the other kind would have left.

    Attributes:
        kind: ``lora`` or ``dora``.
        why: In words.
        lora: ``||W' - (W + BA)|| / ||W' - W||`` over the modules that could be either.
        equal: At least this is left by a LoRA with as many numbers as the DoRA has; NaN where no DoRA was made.
        dora: What the DoRA leaves of them; NaN where none was made.
        rows: Share of what the LoRA leaves that rescaling rows would take away (the test beforehand); NaN where it was not made.
        rounding: What PEFT's rounding of norms adds to the DoRA's error, relative to the change, in a model of the stored type.
    """

    kind: Literal["lora", "dora"]
    why: str
    lora: float = math.nan
    equal: float = math.nan
    dora: float = math.nan
    rows: float = math.nan
    rounding: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For ``--json`` and the manifest."""
        figures = {
            "lora": self.lora,
            "lora_of_equal_size_at_least": self.equal,
            "dora": self.dora,
            "row_scale_share": self.rows,
            "dora_rounding_in_peft": self.rounding,
        }
        shown = {name: None if math.isnan(value) else six_digits(value) for name, value in figures.items()}
        return {"chosen": self.kind, "why": self.why, **shown}


@dataclass(frozen=True, slots=True)
class CalibrationFacts:
    """Of one module whose inputs were given.

    Attributes:
        kept: ``weighted`` or ``plain``: the factors that are written.
        weighted: Error of the outputs on these inputs, relative to what the whole change does to them, with weighted factors.
        plain: The same with plain ones.
        energy: Mean squared norm of what the whole change does to the outputs.
        bias: Path of the bias that makes up for the mean error; empty where there is none.
    """

    kept: Literal["weighted", "plain"]
    weighted: float
    plain: float
    energy: float
    bias: str = ""

    @property
    def error(self) -> float:
        """Of what was kept."""
        return min(self.weighted, self.plain)

    def as_json(self) -> dict[str, Any]:
        """For ``--json`` and the manifest."""
        return {
            "kept": self.kept,
            "weighted": six_digits(self.weighted),
            "plain": six_digits(self.plain),
            "bias": self.bias or None,
        }


@dataclass(frozen=True, slots=True)
class CalibrationTotals:
    """Of all modules whose inputs were given.

    Attributes:
        modules: How many.
        weighted: How many have weighted factors.
        biases: How many biases make up for a mean error.
        error: Of the outputs on these inputs, all modules together, with what was kept.
        plain: The same with plain factors.
    """

    modules: int
    weighted: int
    biases: int
    error: float
    plain: float

    @classmethod
    def of(cls, facts: Iterable[CalibrationFacts]) -> CalibrationTotals:
        """Added up."""
        all_facts = list(facts)
        total = math.fsum(fact.energy for fact in all_facts)

        def together(errors: Iterable[float]) -> float:
            left = math.fsum(fact.energy * error**2 for fact, error in zip(all_facts, errors, strict=True))
            return math.sqrt(left / total) if total > 0 else 0.0

        return cls(
            len(all_facts),
            sum(fact.kept == "weighted" for fact in all_facts),
            sum(bool(fact.bias) for fact in all_facts),
            together(fact.error for fact in all_facts),
            together(fact.plain for fact in all_facts),
        )

    @property
    def text(self) -> str:
        """One line."""
        bias = f"; {self.biases} biases make up for mean errors" if self.biases else ""
        return (
            f"weighted factors in {self.weighted} of {self.modules} modules: on these inputs {self.error:.2%} of what the change "
            f"does is missing, {self.plain:.2%} with plain factors{bias}"
        )

    def as_json(self) -> dict[str, Any]:
        """For ``--json`` and the manifest."""
        counts = {"modules": self.modules, "weighted": self.weighted, "biases": self.biases}
        return {**counts, "output_error": six_digits(self.error), "output_error_plain": six_digits(self.plain)}


def six_digits(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")


@dataclass(frozen=True, slots=True)
class Signal:
    """How much of a factorised change is more than rounding: the noise-aware effective rank.

    Attributes:
        edge: Largest singular value that rounding alone would have.
        count: Singular values above it, among those that were computed.
        of: Directions of the matrix.
        complete: Whether `count` is all of them; if not, at least so many.
        survival: Share of the factors' update that is kept if they are merged back in BASE's stored type.
    """

    edge: float
    count: int
    of: int
    complete: bool
    survival: float

    @property
    def text(self) -> str:
        """``50/384``; ``>=16/384`` where nobody looked further."""
        return f"{'' if self.complete else '>='}{self.count}/{self.of}"

    def as_json(self) -> dict[str, Any]:
        """Rounded to what it means."""
        survival = None if math.isnan(self.survival) else six_digits(self.survival)
        return {
            "noise_edge": six_digits(self.edge),
            "signal": self.count,
            "directions": self.of,
            "signal_complete": self.complete,
            "survival": survival,
        }


@dataclass(frozen=True, slots=True)
class MergedLoRA:
    """What TUNED looks like.

    Attributes:
        rank: Of the LoRA.
        layers: Matrices that show it.
        of: Matrices that changed.
    """

    rank: int
    layers: int
    of: int

    @property
    def text(self) -> str:
        """One line."""
        return (
            f"looks like a merged rank-{self.rank} LoRA: {self.rank} values above the edge in {self.layers}/{self.of} layers, "
            "residual equals storage noise"
        )
