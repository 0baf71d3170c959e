# SPDX-License-Identifier: Apache-2.0
"""A row of TensorRT-LLM's array: both factors of a module, and a magnitude, one behind the other and padded with zeros.

Neither file has the sizes of the modules, so that only the base tells where one factor ends and the next begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NoReturn

from surgery_formats.arrays import Array
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import IA3, Apply, Factor, Fit, LoRA, Update, Weight
from surgery_formats.updates.base import Effect

__all__ = ["PackedRow"]


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One update of a module.

    Attributes:
        row: All values of the module, ``(n,)``: A ``(rank, in)``, B ``(out, rank)`` with the scale in it, and of a DoRA what the
            rows are multiplied by, ``(out,)``.
        rank: Of the LoRA.
        stretched: Whether there is such a magnitude.
        stretches: Whether this update is the magnitude, which comes after the LoRA.
    """

    waits: ClassVar[str] = "its factors lie one behind the other, and only the base tells their sizes"
    alpha: ClassVar[None] = None
    needs_weight: ClassVar[bool] = False
    untrained: ClassVar[tuple[()]] = ()
    shape: ClassVar[tuple[int, int]] = (0, 0)

    row: StoredTensor
    rank: int
    stretched: bool = False
    stretches: bool = False

    @property
    def kind(self) -> str:
        """Of the update that it becomes."""
        return IA3.kind if self.stretches else LoRA.kind

    @property
    def effect(self) -> Effect:
        """Of the update that it becomes."""
        return "maps" if self.stretches else "adds"

    @property
    def scale(self) -> float:
        """B has it."""
        return 1.0

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The row."""
        return (self.row,)

    def factors(self) -> Mapping[str, Factor]:
        """The row."""
        return {"row": Factor.of(self.row)}

    def low_rank(self) -> None:
        """None until `fitted`."""

    def parts(self) -> tuple[tuple[int, PackedRow], ...]:
        """Itself."""
        return ((0, self),)

    def fitted(self, fit: Fit) -> Update:
        """The LoRA, or the magnitude behind it, of a weight of this size.

        Raises:
            FitError: the row has fewer values than they need; or, when they are read, more that are not zero.
        """
        (out, inputs), rank = fit.shape, self.rank
        needed = rank * (out + inputs) + (out if self.stretched else 0)
        if needed > self.row.numel:
            raise self._misfit(fit, f"{self.row.numel} values where {needed} are needed")

        def part(start: int, shape: tuple[int, ...], stop: int) -> Factor:
            def view(values: Array) -> Array:
                flat = values.reshape(-1)
                if bool((flat[needed:] != 0).any()):
                    raise self._misfit(fit, "more values than it needs")
                return flat[start:stop].reshape(shape)

            return Factor((self.row,), shape, view)

        if self.stretches:
            return IA3(part(needed - out, (out,), needed), per_row=True).fitted(fit)
        a, b = rank * inputs, rank * (inputs + out)
        return LoRA(part(0, (rank, inputs), a), part(a, (out, rank), b), 1.0)

    def prepare(self, weight: Weight) -> Apply:
        """Never: it has no factors yet.

        Raises:
            FitError: always.
        """
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise FitError(self.waits, file=self.row.path, tensor=self.row.name)

    def _misfit(self, fit: Fit, what: str) -> FitError:
        return FitError(
            f"a row of rank {self.rank} for a weight of {list(fit.shape)} has {what}",
            file=self.row.path,
            tensor=self.row.name,
            hint="is this the base it was trained on? A gate_proj and up_proj that were trained as one are not read",
        )
