# SPDX-License-Identifier: Apache-2.0
"""``lora_down``, ``lora_up`` and all their spellings, with ``lora_mid`` (LoCon's core), ``dora_scale``, ``lora_B.bias``.

``reshape_weight`` is the shape that ComfyUI fills a weight up to with zeros before it adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from surgery_formats.adapters.grammar.kinds.kind import LeafKind, LeafWriter, ReadUpdate
from surgery_formats.adapters.grammar.kinds.magnitudes import lengths_of, put_lengths
from surgery_formats.adapters.grammar.module import ModuleTensors, fit_error, malformed
from surgery_formats.adapters.grammar.scalars import whole_numbers
from surgery_formats.adapters.grammar.scales import StatedScales
from surgery_formats.arrays import Array
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import DoRA, Factor, LoRA, Offset, Update, low_rank_part

__all__ = ["LORA"]


def _read(module: ModuleTensors, scales: StatedScales) -> Iterable[ReadUpdate]:
    beside = next(role for role in ("down", "up", "mid", "dora_scale", "up_bias") if role in module.parts)
    down, up = module.matrix("down", beside), module.matrix("up", beside)
    mid = module.parts.get("mid")
    A = Factor((down,), down.matrix) if mid is None else _with_core(mid, down)
    rank = A.shape[0]
    if up.matrix[1] != rank:
        raise fit_error(up, f"'lora_up' is {list(up.shape)}, but 'lora_down' has rank {down.shape[0]}")
    # alpha counts against the rank of lora_down, also where a core sits between the factors
    scale = scales.of_module(module, rank, down.shape[0])
    lora = LoRA(A, Factor((up,), up.matrix), scale.value, scale.alpha or float(rank), scale.noted)
    if sizes := module.parts.get("reshape_weight"):
        _check_sizes(sizes, lora)
    lengths = lengths_of(module, lora.shape[0], (down.shape[1],))
    update: Update = lora if lengths is None else DoRA(lora, *lengths)
    yield ReadUpdate("weight", update, scale.source, (down if mid is None else mid).shape[2:])
    if bias := module.parts.get("up_bias"):
        yield ReadUpdate("bias", Offset(Factor((bias,), (bias.numel,)), scale.value), scale.source)


def _check_sizes(stored: StoredTensor, lora: LoRA) -> None:
    """The shape that a weight grows to, which is that of the product."""
    out, *others = whole_numbers(stored, "a shape")
    if (out, math.prod(others)) != lora.shape:
        raise malformed(stored, f"a weight of {[out, *others]}, for factors of one of {list(lora.shape)}")


def _with_core(mid: StoredTensor, down: StoredTensor) -> Factor:
    """The ``A`` of a convolution in CP form.

    ``A[m, j, ...] = sum_n mid[m, n, ...] down[n, j]``.
    """
    inputs = down.matrix[1]
    if len(mid.shape) < 3 or mid.shape[1] != down.shape[0] or any(size != 1 for size in down.shape[2:]):
        raise fit_error(mid, f"'lora_mid' is {list(mid.shape)}, 'lora_down' {list(down.shape)}")

    def fold(core: Array, factor: Array) -> Array:
        import numpy

        return numpy.einsum("mn...,nj->mj...", core, factor.reshape(down.shape[0], inputs))

    return Factor((mid, down), (mid.shape[0], inputs * math.prod(mid.shape[2:])), fold)


def _write(update: Update, parameter: str, writer: LeafWriter) -> None:
    lora = low_rank_part(update)
    assert lora is not None  # as `writes` says
    rank, (out, inputs) = lora.rank, lora.shape
    times = writer.put_scale(lora.scale, rank)
    writer.put("down", lora.A, (rank, inputs // math.prod(writer.sizes), *writer.sizes))
    writer.put("up", lora.B, (out, rank, *(writer.ones if writer.sizes else ())), times=times)
    if writer.grows:
        writer.put_sizes("reshape_weight", (out, inputs // math.prod(writer.sizes), *writer.sizes))
    if isinstance(update, DoRA):
        put_lengths(writer, update)
    if len(lora.A.tensors) > 1 and lora.A.view is not None:
        writer.notes.append("its core is in its other factors")


LORA = LeafKind(
    name="LoRA",
    roles=frozenset(["down", "up", "mid", "up_bias", "alpha", "scale", "dora_scale", "reshape_weight"]),
    marks=frozenset(["down", "up", "mid", "up_bias"]),
    read=_read,
    writes=frozenset([LoRA.kind, DoRA.kind]),
    write=_write,
)
