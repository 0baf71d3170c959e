# SPDX-License-Identifier: Apache-2.0
"""Findings about factors: LoRA or DoRA, weighted or plain, and how much of the change is more than rounding.

Only records of figures; importing them does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from surgery.reports.to_json import plain

__all__ = ["KINDS", "CalibrationFacts", "CalibrationTotals", "Kind", "KindFacts", "MergedLoRA", "Signal", "six_digits"]

Kind = Literal["auto", "lora", "dora"]
KINDS: tuple[Kind, ...] = ("auto", "lora", "dora")


@dataclass(frozen=True, slots=True)
class KindFacts:
    """The kind of the factors, and what the other kind would have left.

    Attributes:
        kind: ``lora`` or ``dora``.
        why: The reason, for people.
        lora: ``||W' - (W + BA)|| / ||W' - W||`` over the modules that could be either.
        equal: Lower bound of what a LoRA with the DoRA's numbers leaves; NaN without a DoRA.
        dora: What the DoRA leaves; NaN without one.
        rows: Share of the LoRA's error that rescaling rows would remove, the test that comes first; NaN if it was not
            done.
        rounding: Error that PEFT's rounding of norms adds to the DoRA, relative to the change, in a model of the stored
            type.
    """

    kind: Literal["lora", "dora"]
    why: str
    lora: float = math.nan
    equal: float = math.nan
    dora: float = math.nan
    rows: float = math.nan
    rounding: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The finding as plain values, for ``--json`` and the manifest."""
        figures = {
            "chosen": self.kind,
            "why": self.why,
            "lora": self.lora,
            "lora_of_equal_size_at_least": self.equal,
            "dora": self.dora,
            "row_scale_share": self.rows,
            "dora_rounding_in_peft": self.rounding,
        }
        return six_digits(figures)


@dataclass(frozen=True, slots=True)
class CalibrationFacts:
    """Effect of calibration inputs on one module.

    Attributes:
        kept: Which factors are stored.
        weighted: Error of the outputs on these inputs, relative to what the whole change does to them, with weighted
            factors.
        plain: The same with plain ones.
        energy: Mean squared norm of what the whole change does to the outputs.
        bias: Path of the bias that compensates the mean error; empty if there is none.
    """

    kept: Literal["weighted", "plain"]
    weighted: float
    plain: float
    energy: float
    bias: str = ""

    @property
    def error(self) -> float:
        """Error with the stored factors."""
        return min(self.weighted, self.plain)

    def as_json(self) -> dict[str, Any]:
        """The finding as plain values, for ``--json`` and the manifest."""
        errors = {"weighted": self.weighted, "plain": self.plain}
        return six_digits({"kept": self.kept, **errors, "bias": self.bias or None})


@dataclass(frozen=True, slots=True)
class CalibrationTotals:
    """Effect of calibration inputs on all modules together.

    Attributes:
        modules: Number of modules.
        weighted: Number of modules with weighted factors.
        biases: Number of biases that compensate a mean error.
        error: Relative error of the outputs on these inputs with the stored factors.
        plain: The same with plain factors.
    """

    modules: int
    weighted: int
    biases: int
    error: float
    plain: float

    @classmethod
    def of(cls, facts: Iterable[CalibrationFacts]) -> CalibrationTotals:
        """Sum over modules."""
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
            f"weighted factors in {self.weighted} of {self.modules} modules: on these inputs {self.error:.2%} of what "
            f"the change does is missing, {self.plain:.2%} with plain factors{bias}"
        )

    def as_json(self) -> dict[str, Any]:
        """The finding as plain values, for ``--json`` and the manifest."""
        counts = {"modules": self.modules, "weighted": self.weighted, "biases": self.biases}
        return six_digits({**counts, "output_error": self.error, "output_error_plain": self.plain})


def six_digits(figures: Mapping[str, Any]) -> dict[str, Any]:
    """`figures` as JSON knows them, with six significant digits, so that equal inputs give equal bytes."""
    rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in figures.items()}
    return {name: plain(value) for name, value in rounded.items()}


@dataclass(frozen=True, slots=True)
class Signal:
    """How many directions of a factorised change are more than rounding.

    Attributes:
        edge: Largest singular value that rounding alone would have.
        count: Computed singular values above the edge.
        of: Number of directions of the matrix.
        complete: Whether no other value can be above the edge.
        survival: Share of the factors' update that a merge into BASE's stored type keeps.
    """

    edge: float
    count: int
    of: int
    complete: bool
    survival: float

    def as_json(self) -> dict[str, Any]:
        """The finding as plain values, for ``--json`` and the manifest."""
        counts = {"signal": self.count, "directions": self.of, "signal_complete": self.complete}
        return six_digits({"noise_edge": self.edge, **counts, "survival": self.survival})


@dataclass(frozen=True, slots=True)
class MergedLoRA:
    """The sign that TUNED is BASE with a LoRA merged into it.

    Attributes:
        rank: Rank of the LoRA.
        layers: Number of matrices that show it.
        of: Number of matrices that changed.
    """

    rank: int
    layers: int
    of: int

    @property
    def text(self) -> str:
        """The finding in one line."""
        return (
            f"looks like a merged rank-{self.rank} LoRA: {self.rank} values above the edge in {self.layers}/{self.of} "
            "layers, residual equals storage noise"
        )
