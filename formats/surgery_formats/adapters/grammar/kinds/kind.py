# SPDX-License-Identifier: Apache-2.0
"""The record that every group of leaves fills in, and what it is given to write with."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from surgery_formats.adapters.format import NewTensor
from surgery_formats.adapters.grammar.module import ModuleTensors
from surgery_formats.adapters.grammar.scales import StatedScales
from surgery_formats.adapters.writing import factor_tensor
from surgery_formats.arrays import Array
from surgery_formats.canonical.provenance import ScaleSource
from surgery_formats.dtypes import DType
from surgery_formats.updates import Factor, Update

__all__ = ["LeafKind", "LeafWriter", "ReadUpdate", "flag_tensor", "number_tensor"]


@dataclass(frozen=True, slots=True)
class ReadUpdate:
    """An update that the leaves of a module make.

    Attributes:
        parameter: ``weight`` or ``bias``.
        update: What it is.
        scale: Where its scale was read.
        kernel: Sizes of a convolution's kernel, as far as the file has them; empty for other modules.
    """

    parameter: str
    update: Update
    scale: ScaleSource = "none"
    kernel: tuple[int, ...] = ()


@dataclass
class LeafWriter:
    """Collects the tensors of one module.

    Attributes:
        stem: What stands before the leaf in its keys.
        leaves: Spellings by role; a role that is not here is spelt as it is called.
        kernel: Sizes of a convolution's kernel, 0 for those that no file told; empty for other modules.
        with_alpha: Whether scales are written as alphas; else they are multiplied into a factor.
        in_header: Whether the header will state them.
        grows: Whether the weight's shape is to be stated, because the base's is smaller.
        bias_scale: What the program multiplies a bias beside the factors by.
        trained: Ranks and the alphas that readers take for them from the header, where no scale stands elsewhere.
        alpha_dtype: Type of an alpha; None for a module that had none, and needs none while its scale is 1.
        alpha: What it will state for this module.
        tensors: What was written.
        notes: What was multiplied into which, for the ledger.
    """

    stem: str
    leaves: Mapping[str, str]
    kernel: tuple[int, ...] = ()
    with_alpha: bool = True
    in_header: bool = False
    grows: bool = False
    bias_scale: float = 1.0
    trained: tuple[tuple[int, float], ...] = ()
    alpha_dtype: DType | None = DType.F32
    alpha: float | None = None
    tensors: dict[str, NewTensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The kernel, if all of its sizes are known."""
        return self.kernel if all(self.kernel) else ()

    @property
    def ones(self) -> tuple[int, ...]:
        """As many axes of one as the kernel has."""
        return (1,) * len(self.kernel)

    def spelt(self, role: str) -> str:
        """The key of a role."""
        return f"{self.stem}{self.leaves.get(role, role)}"

    def put(
        self,
        role: str,
        factor: Factor,
        shape: tuple[int, ...] | None = None,
        change: Callable[[Array], Array] | None = None,
        times: float = 1.0,
    ) -> None:
        """Write a factor."""
        name = self.spelt(role)
        self.tensors[name] = factor_tensor(name, factor, factor.shape if shape is None else shape, change, times=times)

    def put_sizes(self, role: str, sizes: tuple[int, ...]) -> None:
        """Write a shape."""
        name = self.spelt(role)
        self.tensors[name] = NewTensor(name, DType.I64, (len(sizes),), lambda: _integers(sizes))

    def put_scale(self, scale: float, rank: int, counted: int | None = None) -> float:
        """Write the scale of factors of `rank`; what is left of it to be multiplied into one of them.

        Args:
            scale: On the product.
            rank: Inner size.
            counted: The rank that alpha counts against in the file, if that is another.
        """
        if self.in_header:
            self.alpha = scale * rank
            return 1.0
        if self.with_alpha:
            if self.alpha_dtype is not None or scale != 1.0:
                name = self.spelt("alpha")
                self.tensors[name] = number_tensor(name, scale * (counted or rank), self.alpha_dtype or DType.F32)
            return 1.0
        left = scale / next((alpha / rank for dim, alpha in self.trained if dim == rank), 1.0)
        if abs(left - 1.0) <= 1e-12:
            return 1.0
        self.notes.append(
            f"{left:g} of its scale is in its factors" if left != scale else f"its scale {scale:g} is in its factors"
        )
        return left


@dataclass(frozen=True, slots=True)
class LeafKind:
    """A group of leaves that make updates together.

    Attributes:
        name: For messages.
        roles: All its leaves, by role.
        marks: Those of which one is enough to tell the group.
        read: The updates that a module's leaves make.
        writes: Names of the kinds of update that it holds.
        write: Writes one update of a module; the parameter's name (``weight``, ``bias``) comes second.
        takes: Whether it writes an update that no file had so.
    """

    name: str
    roles: frozenset[str]
    marks: frozenset[str]
    read: Callable[[ModuleTensors, StatedScales], Iterable[ReadUpdate]]
    writes: frozenset[str]
    write: Callable[[Update, str, LeafWriter], None]
    takes: Callable[[Update], bool] = lambda _: True


def _integers(numbers: tuple[int, ...]) -> Array:
    import numpy

    return numpy.array(numbers, numpy.int64)


def flag_tensor(name: str) -> NewTensor:
    """A tensor that says yes."""

    def load() -> Array:
        import numpy

        return numpy.array(True)

    return NewTensor(name, DType.BOOL, (), load)


def number_tensor(name: str, value: float, dtype: DType = DType.F32) -> NewTensor:
    """A tensor of no axes, of another type than float32 only if that holds the number."""

    def load() -> Array:
        import numpy

        return numpy.array(value)

    return NewTensor(name, dtype if _holds(dtype, value) else DType.F32, (), load)


def _holds(dtype: DType, value: float) -> bool:
    """Whether a float type has a number exactly."""
    form = {DType.F16: "<e", DType.F32: "<f", DType.F64: "<d"}.get(dtype)
    try:
        if dtype is DType.BF16:
            return bool(struct.unpack("<f", b"\0\0" + struct.pack("<f", value)[2:])[0] == value)
        return form is not None and bool(struct.unpack(form, struct.pack(form, value))[0] == value)
    except OverflowError:
        return False
