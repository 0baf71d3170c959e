# SPDX-License-Identifier: Apache-2.0
"""What is known of one tensor of two models, or of one module of two adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from surgery.reports.conflict import Conflict

__all__ = ["AdapterStatus", "ModuleDiff", "Profile", "Side", "TensorDiff", "TensorHeader", "TensorStatus", "Values"]


AdapterStatus = Literal["equal", "different", "only in A", "only in B"]
TensorStatus = Literal["equal", "values", "dtype", "shape", "only in A", "only in B", "not compared"]


@dataclass(frozen=True, slots=True)
class Profile:
    """How a delta spreads over directions.

    Attributes:
        stable_rank: ``||.||_F^2 / ||.||_2^2``.
        ranks: ``{share of the energy: directions that hold it}``; None where they are more than were looked at.
    """

    stable_rank: float
    ranks: Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class Side:
    """One adapter's part in a weight.

    Attributes:
        kind: ``LoRA``, ``DoRA`` ...
        shape: Of the weight.
        rank: None for what has none.
        scale: On ``B A``; None where it differs between terms, or there is none.
        norm: Frobenius norm of the delta; None where only the base could tell it, or nothing was read.
        profile: Of its singular values, where it has low-rank factors and was read.
    """

    kind: str
    shape: tuple[int, int]
    rank: int | None = None
    scale: float | None = None
    norm: float | None = None
    profile: Profile | None = None


@dataclass(frozen=True, slots=True)
class ModuleDiff:
    """One weight.

    Attributes:
        name: As A names it, or B where A lacks it.
        status: Whether the two do the same to it.
        a: A's part.
        b: B's part.
        difference: ``||delta_B - delta_A||_F / ||delta_A||_F``; None where it was not worked out.
        cosine: Of the angle between the deltas.
        note: What cannot be put in a number.
        conflict: Of the low-rank deltas of both, where they differ.
    """

    name: str
    status: AdapterStatus
    a: Side | None
    b: Side | None
    difference: float | None = None
    cosine: float | None = None
    note: str = ""
    conflict: Conflict | None = None


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor without its values."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Values:
    """How far the values of two tensors of one shape are apart; sums in float64.

    Attributes:
        max_abs: Greatest difference of two finite values.
        relative: ``||B - A||_F / ||A||_F``.
        moved: Share of the values that differ.
        not_finite: Values that are NaN or infinite in one of the two; they are in `moved` where they differ, and in
            nothing else.
        difference: ``||B - A||_F``.
        norm: ``||A||_F``.
        profile: Of the singular values of ``B - A``, where it was asked for.
        rounding: ``||B - A||_F / ||A||_F`` if the side that is stored as codes were the other's values rounded to the
            nearest code, on the scales that are stored; None unless one side is stored as codes and the other is not.
        nearest: Share of the codes that are the nearest to the other side's values, likewise.
        rows: Rows with a value that differs.
        intruders: Of B's strongest directions those that resemble none of A's, where that was asked for.
    """

    max_abs: float
    relative: float
    moved: float
    not_finite: int
    difference: float
    norm: float
    profile: Profile | None = None
    rounding: float | None = None
    nearest: float | None = None
    rows: int = 0
    intruders: int | None = None


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """One tensor.

    Attributes:
        name: With its component in a pipeline.
        status: ``equal`` (or, by header, alike); ``values``; ``dtype`` (values were compared all the same); ``shape``;
            or who lacks it; ``not compared`` where a side's values cannot be read.
        a: A's header.
        b: B's header.
        values: Of tensors that are not equal, where they were compared.
        note: What cannot be put in a number.
    """

    name: str
    status: TensorStatus
    a: TensorHeader | None
    b: TensorHeader | None
    values: Values | None = None
    note: str = ""
