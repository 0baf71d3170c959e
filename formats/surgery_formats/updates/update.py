# SPDX-License-Identifier: Apache-2.0
"""What every kind of update offers, and what some kinds offer besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol

from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from surgery_formats.arrays import Array
    from surgery_formats.updates.lora import LoRA
    from surgery_formats.updates.offset import Offset
    from surgery_formats.updates.replacement import Held

__all__ = [
    "Directed",
    "EitherWay",
    "Expanding",
    "Holding",
    "InFull",
    "Invertible",
    "Linear",
    "Mixing",
    "OfBase",
    "Refusing",
    "Replacing",
    "RowSetting",
    "Sharing",
    "Unsized",
    "Update",
    "Waiting",
    "is_directed",
    "is_either_way",
    "is_expanding",
    "is_holding",
    "is_in_full",
    "is_invertible",
    "is_linear",
    "is_mixing",
    "is_of_base",
    "is_refusing",
    "is_replacing",
    "is_row_setting",
    "is_sharing",
    "is_unsized",
    "is_waiting",
]


class Update(Protocol):
    """What was trained for one weight (or bias) of a base. Implementations are frozen dataclasses.

    Verbs, writers and reports ask an update about itself through these members, and know no list of kinds.

    Attributes:
        kind: Name in the field: ``LoRA``, ``DoRA`` ...
        shape: Logical ``(out, in)`` of the weight it fits; ``(n, 1)`` for a bias. 0 is a size that its file does not
            have (`Unsized`).
        tensors: Every stored tensor it consumes.
        untrained: Those of `tensors` that hold no trained values: alphas, random projections.
        needs_weight: Whether `prepare` looks at the weight, so that the weight is read twice.
        effect: Whether it adds to a weight, sets values of it, or maps it.
        rank: Inner size of its low-rank product; None for a kind without one.
        alpha: As written in its file; None where the format or the kind has none.
        scale: Number on what it adds; None for a kind without one.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # so that `fields` and `replace` take it

    @property
    def kind(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def tensors(self) -> tuple[Tensor, ...]: ...
    @property
    def untrained(self) -> tuple[Tensor, ...]: ...
    @property
    def needs_weight(self) -> bool: ...
    @property
    def effect(self) -> Effect: ...
    @property
    def rank(self) -> int | None: ...
    @property
    def alpha(self) -> float | None: ...
    @property
    def scale(self) -> float | None: ...

    def factors(self) -> Mapping[str, Factor]:
        """Everything its equation takes from its file, by the names of the equation: ``A``, ``B``, ``magnitude``."""

    def low_rank(self) -> LoRA | None:
        """The same update as one LoRA, exactly; None if there is none, or sizes are not known yet (`Unsized`).

        A stack of experts has none of its own: ask each of its `parts`.
        """

    def parts(self) -> tuple[tuple[int, Update], ...]:
        """``(first logical row, update)`` of which this one is made: itself at row 0 unless it is stacked."""

    def prepare(self, weight: Weight) -> Apply:
        """Load the factors once and return the equation for blocks of `weight`."""


class Linear(Update, Protocol):
    """An additive update: it can be scaled, and its deltas can be summed."""

    def scaled(self, weight: float) -> Linear:
        """The update that moves a weight `weight` times as far."""


class Expanding(Linear, Protocol):
    """An addition that is a product of two matrices, of more directions than its file has in any factor."""

    def expanded(self) -> LoRA | None:
        """The same update as one LoRA, exactly, its factors worked out; None if it has more directions than the weight."""


class InFull(Linear, Protocol):
    """An addition of which every number is stored, as for a bias."""

    def in_full(self) -> Offset:
        """The same update as one offset, exactly."""


class Replacing(Update, Protocol):
    """A whole new parameter, oriented as the base stores it. Its first axis may be longer than the base's.

    Attributes:
        stored: The tensor that takes the parameter's place.
        held: Where the new values live while the adapter is attached.
    """

    @property
    def stored(self) -> Tensor: ...
    @property
    def held(self) -> Held: ...


class RowSetting(Update, Protocol):
    """New values for rows that are known by their numbers: it fits every weight that has these rows.

    Attributes:
        indices: The rows, distinct.
    """

    @property
    def indices(self) -> tuple[int, ...]: ...


class Directed(Update, Protocol):
    """A low-rank addition, after which rows or columns get the lengths that were trained for them.

    Attributes:
        direction: The low-rank addition.
        magnitude: The lengths.
        per_row: Whether they belong to rows, or to columns.
    """

    @property
    def direction(self) -> LoRA: ...
    @property
    def magnitude(self) -> Factor: ...
    @property
    def per_row(self) -> bool: ...

    def rebuilt(self, direction: LoRA, magnitude: Factor) -> Directed:
        """The update of the same kind with these two parts, for other rows of its weight."""


class EitherWay(Update, Protocol):
    """A stack of experts whose file does not always tell which axis of an expert is the output."""

    def transposed(self) -> Update | None:
        """The same factors for a base that stores experts as ``(E, in, out)``; None where the file tells."""


class Unsized(Update, Protocol):
    """An update whose file lacks sizes of its weight: a vector along one axis, one block for a whole diagonal."""

    def fitted(self, fit: Fit) -> Update:
        """The update with its sizes. If they contradict the file's, `shape` shows it and binding refuses.

        Raises:
            FitError: it cannot act on such a weight.
        """


class Invertible(Update, Protocol):
    """An update that maps a weight, and whose equation can be solved for the weight before it."""

    def lost(self, weight: Weight) -> Array | None:
        """What the equation cannot tell from the result alone, a vector of `weight` before it; None for nothing."""

    def inverse(self, weight: Weight, share: float, lost: Array | None) -> Apply:
        """The equation that takes back `share` of the way from a weight to the updated one.

        Args:
            weight: After the update.
            share: As `surgery_formats.binding.edits.Operation` has it.
            lost: As `lost` gave it for the weight before.

        Values that are multiplied by 0 are gone: what comes back for them is not finite.
        """


class OfBase(Update, Protocol):
    """An update that was trained on the base, and measures that: `prepare` sees nothing that other adapters did to it.

    Attributes:
        of_base: Always true.
    """

    @property
    def of_base(self) -> bool: ...


class Sharing(Update, Protocol):
    """An update that is not applied to what those of its kind left that other adapters have for the weight.

    Attributes:
        together: Whether each is of the weight before all of them, and what they change is summed; else they have no
            meaning together.
    """

    @property
    def together(self) -> bool: ...


class Mixing(Update, Protocol):
    """An update that mixes columns in groups: `apply` is given whole groups, even where a weight is stored transposed.

    Attributes:
        group: Columns per group; groups begin at multiples of it.
    """

    @property
    def group(self) -> int: ...


class Holding(Update, Protocol):
    """An update whose equation keeps many numbers in memory besides its factors: what it makes of them, or the weight.

    Attributes:
        held_numbers: How many, of 8 bytes, at most.
    """

    @property
    def held_numbers(self) -> int: ...


class Waiting(Unsized, Protocol):
    """An update that means nothing before `fitted`: the order of its rows is another program's.

    Attributes:
        waits: What only the base tells.
    """

    @property
    def waits(self) -> str: ...


class Refusing(Update, Protocol):
    """What was trained in a way that no weight can hold, or that its files do not tell: it is shown and copied only."""

    def refuse(self) -> NoReturn:
        """Say why, and what to do.

        Raises:
            FitError: always.
        """


_known: dict[tuple[type, str], bool] = {}


def _has(update: Update, member: str) -> bool:
    """Whether updates of its type have a member.

    It is looked up once for a type: binding asks of every expert of every layer, and the test of a runtime-checkable
    Protocol takes a thousand times as long.
    """
    key = type(update), member
    if key not in _known:
        _known[key] = hasattr(update, member)
    return _known[key]


def is_linear(update: Update) -> TypeIs[Linear]:
    """Whether it is additive."""
    return _has(update, "scaled")


def is_in_full(update: Update) -> TypeIs[InFull]:
    """Whether every number of what it adds is stored."""
    return _has(update, "in_full")


def is_replacing(update: Update) -> TypeIs[Replacing]:
    """Whether it is a whole new parameter."""
    return _has(update, "stored")


def is_row_setting(update: Update) -> TypeIs[RowSetting]:
    """Whether it sets rows by their numbers."""
    return _has(update, "indices")


def is_directed(update: Update) -> TypeIs[Directed]:
    """Whether it gives lengths to rows or columns after a low-rank addition."""
    return _has(update, "direction")


def is_either_way(update: Update) -> TypeIs[EitherWay]:
    """Whether it is a stack of which only the base may tell the axes."""
    return _has(update, "transposed")


def is_unsized(update: Update) -> TypeIs[Unsized]:
    """Whether its file may lack sizes of its weight."""
    return _has(update, "fitted")


def is_invertible(update: Update) -> TypeIs[Invertible]:
    """Whether its equation can be solved for the weight before it."""
    return _has(update, "inverse")


def is_of_base(update: Update) -> TypeIs[OfBase]:
    """Whether it measures the base, whatever other adapters did to it."""
    return _has(update, "of_base")


def is_sharing(update: Update) -> TypeIs[Sharing]:
    """Whether it is not applied to what others of its kind left."""
    return _has(update, "together")


def is_mixing(update: Update) -> TypeIs[Mixing]:
    """Whether it mixes columns in groups."""
    return _has(update, "group")


def is_expanding(update: Update) -> TypeIs[Expanding]:
    """Whether it is a product of more directions than its factors have."""
    return _has(update, "expanded")


def is_holding(update: Update) -> TypeIs[Holding]:
    """Whether its equation keeps many numbers in memory besides its factors."""
    return _has(update, "held_numbers")


def is_refusing(update: Update) -> TypeIs[Refusing]:
    """Whether no weight can hold it."""
    return _has(update, "refuse")


def is_waiting(update: Update) -> TypeIs[Waiting]:
    """Whether it means nothing before a base is known."""
    return _has(update, "waits")
