# SPDX-License-Identifier: Apache-2.0
"""Write an adapter for the slots of one graph: under the names of its inputs, in their orientation, rank and type."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from surgery_formats.adapters.embeddings import is_embedding
from surgery_formats.adapters.format import NewTensor
from surgery_formats.adapters.onnx_adapter.graph_slots import GraphSlot, GraphSlots
from surgery_formats.adapters.onnx_adapter.names import match_modules
from surgery_formats.adapters.onnx_adapter.read import FilledSlot
from surgery_formats.adapters.writing import factor_tensor, zero_padded
from surgery_formats.arrays import Array, empty
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing, show
from surgery_formats.updates import Factor, LoRA

__all__ = ["GraphFilling"]


class GraphFilling:
    """What goes into the slots of a graph, module by module.

    Attributes:
        filled: What each slot holds, by the name of A.
    """

    def __init__(self, slots: GraphSlots, modules: list[str]) -> None:
        self._slots = slots
        self._matched = match_modules(slots.by_module, modules)
        self.filled: dict[str, FilledSlot] = {}
        self._tensors: dict[str, NewTensor] = {}
        self._shared: dict[str, list[LoRA]] = {}
        self._modules: set[str] = set()

    def slot_of(self, module: str) -> GraphSlot | None:
        """The slot for a module; None if the graph has none."""
        name = self._matched.get(module)
        return None if name is None else self._slots.by_module[name]

    def fill(self, slot: GraphSlot, module: str, site: Site, lora: LoRA, base: Checkpoint | None) -> None:
        """Put a LoRA into a slot, with its scale in B.

        Raises:
            FitError: sizes that the slot does not take, or a rank above its own.
        """
        self._modules.add(slot.module)
        if slot.columns is not None:
            self._share(slot, slot.columns, site, lora)
            return
        embedding = is_embedding(module, base, site)
        down, up = (lora.B, lora.A) if embedding else (lora.A, lora.B)
        inputs, outputs = (lora.shape[0], lora.shape[1]) if embedding else (lora.shape[1], lora.shape[0])
        axis = slot.rank_axis(inputs)
        if embedding and axis == 0:
            raise FitError(
                f"the graph's slot for the table '{show(module)}' has its ranks as rows", file=self._slots.path
            )
        rank = slot.fixed_rank(axis) or lora.rank
        if rank < lora.rank:
            raise FitError(
                f"has rank {lora.rank}, and the graph's slot takes {rank}",
                tensor=lora.tensors[0].name,
                hint="lower its rank: surgery resize",
            )
        A, B = self._shapes(slot, axis, rank, inputs, outputs, lora)

        # Each factor as (size, rank): of a LoRA's A and of an embedding's tables that is transposed.
        tall: Callable[[Array], Array] = (lambda t: t) if embedding else (lambda t: t.T)
        wide: Callable[[Array], Array] = (lambda t: t.T) if embedding else (lambda t: t)
        self._put(slot.A.name, down, A, tall, rank, axis == 0, 1.0)
        self._put(slot.B.name, up, B, wide, rank, axis == 1, lora.scale)
        self.filled[slot.A.name] = FilledSlot(_kind(site, embedding=embedding, dims=len(A)), rank_first=axis == 0)

    def _share(self, slot: GraphSlot, columns: tuple[int, int], site: Site, lora: LoRA) -> None:
        """Put a LoRA beside those of other weights in one slot: its A behind theirs, its B as a block of its own."""
        width = columns[1] - columns[0]
        if lora.shape != (width, slot.A.dims[0]):
            raise FitError(
                f"is for a weight of {list(lora.shape)}, and the graph's '{show(slot.A.name)}' has [{width}, {slot.A.dims[0]}] for it",
                tensor=lora.tensors[0].name,
                hint="the graph was made of another model",
            )
        loras = self._shared.setdefault(slot.A.name, [])
        known = self.filled.get(slot.A.name)
        parts = () if known is None else known.shared
        first = parts[-1][1][1] if parts else 0
        loras.append(lora)
        parts = (*parts, (_kind(site, embedding=False, dims=2), (first, first + lora.rank), columns))
        self.filled[slot.A.name] = FilledSlot(parts[0][0], shared=parts)
        rank, (inputs, outputs) = first + lora.rank, (slot.A.dims[0] or 0, slot.B.dims[1] or 0)

        def wide() -> Array:
            A = empty((inputs, rank), DType.F64)
            for one, (_, (low, high), _) in zip(loras, parts, strict=True):
                A[:, low:high] = one.A.load(DType.F64).T
            return A

        def blocks() -> Array:
            B = empty((rank, outputs), DType.F64)
            B[...] = 0
            for one, (_, (low, high), (begin, end)) in zip(loras, parts, strict=True):
                B[low:high, begin:end] = one.B.load(DType.F64).T * one.scale
            return B

        self._tensors[slot.A.name] = NewTensor(slot.A.name, self._slots.dtype, (inputs, rank), wide)
        self._tensors[slot.B.name] = NewTensor(slot.B.name, self._slots.dtype, (rank, outputs), blocks)

    def _put(
        self,
        name: str,
        factor: Factor,
        shape: tuple[int, ...],
        tall: Callable[[Array], Array],
        rank: int,
        rank_first: bool,
        times: float,
    ) -> None:
        def change(values: Array) -> Array:
            padded = zero_padded(tall(values), 1, rank)
            return padded.T if rank_first else padded

        self._tensors[name] = factor_tensor(name, factor, shape, change, times=times)

    def _shapes(
        self, slot: GraphSlot, axis: int, rank: int, inputs: int, outputs: int, lora: LoRA
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of both arrays."""
        dims = len(slot.A.dims)
        if dims > 2:
            kernel = [size or 1 for size in slot.A.dims[2:]]
            A: tuple[int, ...] = (rank, inputs // math.prod(kernel), *kernel)
            B: tuple[int, ...] = (outputs, rank, *([1] * (dims - 2)))
        else:
            A, B = ((rank, inputs), (outputs, rank)) if axis == 0 else ((inputs, rank), (rank, outputs))
        for one, shape in ((slot.A, A), (slot.B, B)):
            if len(one.dims) != len(shape) or any(
                size not in (None, own) for size, own in zip(one.dims, shape, strict=True)
            ):
                sizes = ", ".join("rank" if size is None else str(size) for size in one.dims)
                raise FitError(
                    f"would be {list(shape)}, and the graph's '{show(one.name)}' takes [{sizes}]",
                    tensor=lora.tensors[0].name,
                    hint="the graph was made of another model",
                )
        return A, B

    def tensors(self) -> tuple[NewTensor, ...]:
        """The arrays in the order of the graph's inputs; zeros for slots that would otherwise keep a default, or miss one."""
        made = []
        for slot in {one.A.name: one for one in self._slots.by_module.values()}.values():
            axis = slot.rank_axis(0)
            rank = slot.fixed_rank(axis)
            for one in (slot.A, slot.B):
                if one.name in self._tensors:
                    made.append(self._tensors[one.name])
                elif one.needed:
                    shape = tuple((rank or 1) if size is None else size for size in one.dims)
                    made.append(NewTensor(one.name, self._slots.dtype, shape, partial(_zeros, shape)))
        return tuple(made)

    def notes(self) -> tuple[str, ...]:
        """Which slots stay empty."""
        empty = [module for module in self._slots.by_module if module not in self._modules]
        if not empty:
            return ()
        return (
            f"{len(empty)} of {len(self._slots.by_module)} slots stay empty: {listing([show(one) for one in empty], 6)}",
        )


def _zeros(shape: tuple[int, ...]) -> Array:
    array = empty(shape, DType.F32)
    array[...] = 0
    return array


def _kind(site: Site, *, embedding: bool, dims: int) -> Site:
    if embedding:
        return replace(site, module_kind="embedding")
    return site if dims > 2 or site.module_kind else replace(site, module_kind="linear")
