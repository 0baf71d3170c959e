# SPDX-License-Identifier: Apache-2.0
"""GLoRA: ``W' = W + W * A + B``, ``b' = b + b * D + E + W C`` (Chavan et al. 2023, arXiv:2306.07967)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, cast, namespace
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.products import product
from surgery_formats.storage.parameter import Parameter
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.weights import WeightView

__all__ = ["GLoRA", "GLoRABias", "Support"]

_ELEMENTS = 1 << 19  # of the layer's weight, read at once

Support = tuple[Factor, ...]
"""One of the supports A to E: nothing, one factor that is stretched over the weight, or two whose product it is."""


def _tensors(*supports: Support) -> tuple[Tensor, ...]:
    return tuple(tensor for support in supports for factor in support for tensor in factor.tensors)


def _factors(**supports: Support) -> dict[str, Factor]:
    """The factors of supports by name: ``A``, or ``A down`` and ``A up``."""
    named: dict[str, Factor] = {}
    for name, support in supports.items():
        names = (f"{name} down", f"{name} up") if len(support) == 2 else (name,)
        named |= dict(zip(names, support, strict=False))
    return named


@dataclass(frozen=True, slots=True)
class GLoRA:
    """A weight stretched by element, and added to.

    Attributes:
        A: ``(out, rank)`` and ``(rank, in)``, or ``(out, 1)``, or ``(1, 1)``, or nothing.
        B: The same.
        outputs: Rows of the weight; 0 until `fitted`.
        inputs: Its columns; 0 until `fitted`.
    """

    kind: ClassVar[str] = "GLoRA"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "maps"
    together: ClassVar[bool] = True
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None
    untrained: ClassVar[tuple[()]] = ()

    A: Support
    B: Support
    outputs: int = 0
    inputs: int = 0

    @property
    def rank(self) -> int | None:
        """Of the supports that are products."""
        return next((support[0].shape[1] for support in (self.A, self.B) if len(support) == 2), None)

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.outputs, self.inputs

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of A, then those of B."""
        return _tensors(self.A, self.B)

    def fitted(self, fit: Fit) -> GLoRA:
        """The sizes of the weight, where the supports are stretched over it; else those of the supports.

        Raises:
            FitError: the supports are of different sizes.
        """
        present = [support for support in (self.A, self.B) if support]
        rows = {support[0].shape[0] for support in present} - {1}
        cols = {support[1].shape[1] for support in present if len(support) == 2}
        if len(rows) > 1 or len(cols) > 1:
            stored = self.tensors[0]
            raise FitError(
                f"its supports have {' and '.join(map(str, sorted(rows)))} rows, "
                f"{' and '.join(map(str, sorted(cols))) or 'no'} columns",
                file=stored.path,
                tensor=stored.name,
            )
        return replace(self, outputs=max(rows, default=fit.shape[0]), inputs=max(cols, default=fit.shape[1]))

    def factors(self) -> dict[str, Factor]:
        """Those of ``A`` and ``B``."""
        return _factors(A=self.A, B=self.B)

    def low_rank(self) -> None:
        """None: it stretches the weight."""

    def parts(self) -> tuple[tuple[int, GLoRA], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """Load the supports once; each block costs a product for each that is one."""
        loaded = [[f.load(weight.dtype, weight.device) for f in support] for support in (self.A, self.B)]

        def met(support: list[Array], rows: Index, cols: Index) -> Array | float:
            """The part of a support that meets a block, of a shape that stretches over it; good until the next."""
            if not support:
                return 0.0
            along = positions(support[0], 0, rows) if support[0].shape[0] > 1 else support[0]
            return product(along, positions(support[1], 1, cols)) if len(support) == 2 else along

        times, plus = loaded

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            stretched = met(times, rows, cols)
            if len(times) == 2:  # of this block alone
                stretched += 1
            else:
                stretched = 1 + stretched
            block *= stretched
            block += met(plus, rows, cols)
            return block

        return apply


@dataclass(frozen=True, slots=True)
class GLoRABias:
    """The bias of a layer, stretched, added to, and moved by what its weight makes of a trained input.

    Attributes:
        C: ``(in, rank)`` and ``(rank, 1)``, or ``(in, 1)``, or nothing.
        D: ``(out, 1)``, ``(1, 1)``, or nothing.
        E: The same.
        outputs: Elements of the bias; 0 until `fitted`.
        beside: The weight of the layer; None until `fitted`.
    """

    kind: ClassVar[str] = "GLoRA of a bias"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "maps"
    together: ClassVar[bool] = True
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None
    untrained: ClassVar[tuple[()]] = ()

    C: Support
    D: Support
    E: Support
    outputs: int = 0
    beside: Parameter | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, 1)``."""
        return self.outputs, 1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of C, D and E."""
        return _tensors(self.C, self.D, self.E)

    def fitted(self, fit: Fit) -> GLoRABias:
        """The elements of the bias, and the weight beside it.

        Raises:
            FitError: a support has other elements than the bias.
        """
        for support in (self.D, self.E):
            if support and support[0].shape[0] not in (1, fit.shape[0]):
                stored = support[0].tensors[0]
                raise FitError(
                    f"it is of {support[0].shape[0]} elements, and the bias has {fit.shape[0]}",
                    file=stored.path,
                    tensor=stored.name,
                    hint="is this the base it was trained on?",
                )
        return replace(self, outputs=fit.shape[0], beside=fit.beside if self.C else None)

    def factors(self) -> dict[str, Factor]:
        """Those of ``C``, ``D`` and ``E``."""
        return _factors(C=self.C, D=self.D, E=self.E)

    def low_rank(self) -> None:
        """None: it stretches the bias."""

    def parts(self) -> tuple[tuple[int, GLoRABias], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """One pass over the layer's weight for ``W C``, in float64.

        Raises:
            FitError: the weight is not beside the bias, or has other sizes.
        """
        moved = self._moved(weight)
        D, E = (support[0].load(weight.dtype, weight.device) if support else None for support in (self.D, self.E))

        def met(values: Array | None, rows: Index) -> Array | float:
            if values is None:
                return 0.0
            return values if len(values) == 1 else positions(values, 0, rows)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            block *= 1 + met(D, rows)
            block += met(E, rows) + met(moved, rows)
            return block

        return apply

    def _moved(self, bias: Weight) -> Array | None:
        """``W C``, ``(out, 1)``."""
        if not self.C:
            return None
        loaded = [factor.load(DType.F64, bias.device) for factor in self.C]
        C = loaded[0] @ loaded[1] if len(loaded) == 2 else loaded[0]
        if self.beside is None or self.beside.shape != (self.outputs, len(C)):
            has = "no weight" if self.beside is None else f"a weight of {list(self.beside.shape)}"
            raise FitError(
                f"moves a bias by a weight of {[self.outputs, len(C)]}, and the base has {has} beside it",
                file=self.tensors[0].path,
                tensor=self.tensors[0].name,
                hint="is this the base it was trained on?",
            )
        storage, view = self.beside.storage, self.beside.view
        height = max(1, _ELEMENTS // storage.shape[1])
        weight = WeightView(storage, (), view, bias.dtype, bias.device, height)
        xp = namespace(C)
        moved = xp.zeros((self.outputs, 1), dtype=xp.float64, device=C.device)
        for block, rows, cols in weight.blocks():
            at = slice(rows.start, rows.stop, rows.step) if isinstance(rows, range) else list(rows)
            moved[at] += cast(block, DType.F64) @ positions(C, 0, cols)
        return cast(moved, bias.dtype)
