# SPDX-License-Identifier: Apache-2.0
"""Which tensor of one model is which of another, where an exporter renamed and transposed them.

By name first, then by value: equal bytes, or equal bytes once a matrix is transposed. What is left, weights that were changed
and renamed, is paired by the modules of the nodes that read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import xxhash

from surgery_formats.arrays import cast, energy, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.tensors.tensor import StoredTensor, as_bytes

__all__ = ["TensorPair", "paired"]


@dataclass(frozen=True, slots=True)
class TensorPair:
    """A tensor of A, and what it is in B.

    Attributes:
        mine: Of A; None for what B alone has.
        theirs: Of B; None for what A alone has.
        turned: Whether B's is A's transposed.
        same: Whether the bytes are known to be equal, once it is turned.
    """

    mine: StoredTensor | None
    theirs: StoredTensor | None
    turned: bool = False
    same: bool = False

    @property
    def name(self) -> str:
        """As A has it, or B where A has none."""
        tensor = self.mine or self.theirs
        return tensor.name if tensor else ""

    @property
    def note(self) -> str:
        """How B differs in more than values."""
        if self.mine is None or self.theirs is None:
            return ""
        notes = ["transposed"] if self.turned else []
        notes += [] if self.mine.name == self.theirs.name else [f"B calls it {self.theirs.name}"]
        return ", ".join(notes)


def paired(
    a: Mapping[str, StoredTensor],
    b: Mapping[str, StoredTensor],
    places: tuple[Mapping[str, str], Mapping[str, str]],
    *,
    values: bool,
) -> list[TensorPair]:
    """Every tensor of both, once.

    Args:
        a: Tensors of A by name.
        b: Tensors of B by name.
        places: What the nodes around them call the weights of either; other tensors are paired by name and value alone.
        values: Whether values may be read.
    """
    found = [TensorPair(a[name], b[name], _is_turned(a[name], b[name])) for name in a if name in b]
    mine = {name: tensor for name, tensor in a.items() if name not in b}
    theirs = {name: tensor for name, tensor in b.items() if name not in a}
    if values:
        for pair in list(_by_value(mine, theirs)):
            found.append(pair)
            if pair.mine and pair.theirs:
                del mine[pair.mine.name], theirs[pair.theirs.name]
    named = {places[1][name]: name for name in theirs if name in places[1]}
    for name in [name for name in mine if name in places[0]]:
        other = named.pop(places[0][name], None)
        if other is not None:
            one, two = mine.pop(name), theirs.pop(other)
            found.append(TensorPair(one, two, _is_turned(one, two) or (values and _is_nearer_turned(one, two))))
    found += [TensorPair(tensor, None) for tensor in mine.values()]
    found += [TensorPair(None, tensor) for tensor in theirs.values()]
    return found


def _is_turned(one: StoredTensor, two: StoredTensor) -> bool:
    """Whether the shapes are each other's reverse, and no square, which does not tell."""
    return len(one.shape) == 2 and one.shape != two.shape and one.shape == two.shape[::-1] and not one.packed_as


def _is_nearer_turned(one: StoredTensor, two: StoredTensor) -> bool:
    """Whether a square matrix is nearer to another's transpose than to the other: its shape does not tell."""
    square = len(one.shape) == 2 and one.shape == two.shape == one.shape[::-1]
    if not square or not (one.dtype.is_float and two.dtype.is_float):
        return False
    mine, theirs = (cast(tensor.read(), DType.F32) for tensor in (one, two))
    return bool(energy(mine - theirs.T) < energy(mine - theirs))


def _by_value(a: Mapping[str, StoredTensor], b: Mapping[str, StoredTensor]) -> Iterator[TensorPair]:
    """Pairs of equal bytes; equal tensors are paired in the order of the graphs."""
    kinds = {_kind(tensor) for tensor in a.values()} & {_kind(tensor) for tensor in b.values()}
    theirs: dict[tuple[object, ...], list[StoredTensor]] = {}
    for tensor in b.values():
        if tensor.nbytes and _kind(tensor) in kinds:
            theirs.setdefault((tensor.shape, _digest(tensor)), []).append(tensor)
    for tensor in a.values():
        if not tensor.nbytes or _kind(tensor) not in kinds:
            continue
        if own := theirs.get((tensor.shape, _digest(tensor))):
            yield TensorPair(tensor, own.pop(0), same=True)
        elif len(tensor.shape) == 2 and not tensor.packed_as:
            turned = theirs.get((tensor.shape[::-1], _digest_turned(tensor)))
            if turned:
                yield TensorPair(tensor, turned.pop(0), turned=True, same=True)


def _kind(tensor: StoredTensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.packed_as, tuple(sorted(tensor.shape))


def _digest(tensor: StoredTensor) -> str:
    state = xxhash.xxh3_128()
    if tensor.strides is None:
        for block in tensor.file.blocks(tensor.offset, tensor.nbytes):
            state.update(block)
    else:
        state.update(as_bytes(tensor.read()))
    return state.hexdigest()


def _digest_turned(tensor: StoredTensor) -> str:
    return xxhash.xxh3_128(as_bytes(to_cpu(tensor.read()).T.copy())).hexdigest()
