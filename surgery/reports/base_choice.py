# SPDX-License-Identifier: Apache-2.0
"""Which of two bases an adapter belongs to, as report shows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from surgery.reports.sections import Facts, Section
from surgery.reports.values import Name, Phrase, Value

__all__ = ["BaseChoice", "choice_sections"]


@dataclass(frozen=True, slots=True)
class BaseChoice:
    """An adapter between two bases; norms over the weights that its low-rank updates change.

    Attributes:
        adapter: Its file or folder name.
        base: The base's name, and how it is stored: ``NF4``, ``BF16``.
        other: The other base's, likewise.
        trained_on: What the adapter's files say of a quantised base; empty if nothing.
        attached: Name of the base with which the model behaves as the attached adapter did in training; empty where
            the adapter's files do not tell.
        weights: How many are compared.
        others: Weights whose updates have no row and column space, which are left out.
        apart: ``||W' - W|| / ||W||`` of the other base's values and the base's.
        beside: ``||W' - W|| / ||D||``, of what the adapter adds.
        rows: The part of ``W' - W`` in the row space of ``D``, of ``||D||``.
        columns: The part in its column space, likewise.
        both: The part in both, likewise.
    """

    adapter: str
    base: tuple[str, str]
    other: tuple[str, str]
    trained_on: str
    attached: str
    weights: int
    others: int
    apart: float
    beside: float
    rows: float
    columns: float
    both: float


def choice_sections(choice: BaseChoice) -> Iterator[Section]:
    """The measurements, and what follows."""
    (base, stored), (other, others) = choice.base, choice.other
    facts: list[tuple[str, Phrase]] = [
        ("which base", (Name(choice.adapter), ": ", Name(base), f" ({stored}) or ", Name(other), f" ({others})")),
        ("they differ by", (
            Value(choice.apart, "number", 3), " of the base's norm, ", Value(choice.beside, "number", 3),
            f" of the update's, in the {choice.weights} weights that it changes",
        )),
        ("in its spaces", (
            Value(choice.rows, "number", 3), " in the update's rows, ", Value(choice.columns, "number", 3),
            " in its columns, ", Value(choice.both, "number", 3), " in both, of its norm",
        )),
    ]  # fmt: skip
    if choice.others:
        facts.append(("left out", f"{choice.others} weights whose updates have no row and column space"))
    if choice.attached:
        said: Phrase = (Name(choice.attached), " gives the behaviour of training: ", Name(choice.trained_on))
    else:
        said = (
            "the adapter's files do not tell whether its base was quantised in training; "
            "the base that it was trained on gives the behaviour that it had then"
        )
    yield Facts((*facts, ("trained on", said)))
