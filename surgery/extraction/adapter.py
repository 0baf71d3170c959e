# SPDX-License-Identifier: Apache-2.0
"""An extraction as an `Adapter`.

A writer reads its factors from the scratch file when it needs them, and TUNED's own tensors from TUNED.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from surgery.extraction.factorise import TargetFactors
from surgery.extraction.pairing import Delta
from surgery.extraction.storage_plan import DenseTensor, StoragePlan, Via
from surgery.extraction.stream.scratch import ScratchSlot
from surgery.extraction.targets import Form, LowRankTarget
from surgery_formats.adapters.format import Scaling
from surgery_formats.arrays import Array, all_finite, cast, dtype_of, namespace
from surgery_formats.canonical.adapter import Adapter, ModuleKind, Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.base_name import base_name
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.storage.base import read_rows
from surgery_formats.tensors.computed import computed
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.tensors.views import take
from surgery_formats.updates import DoRA, Factor, LoRA, Replacement, Stacked, TokenRows, Update
from surgery_formats.updates.replacement import Held

__all__ = ["FactorSettings", "extracted_adapter", "fold_of", "shifted"]

_MODULE_KINDS: Mapping[Form, ModuleKind] = {
    "linear": "linear",
    "conv": "convolution",
    "embedding": "embedding",
    "experts": "experts",
}
_HELD: Mapping[Via, Held] = {"modules_to_save": "copy", "bias": "in place", "resized": "resized"}


@dataclass(frozen=True, slots=True)
class FactorSettings:
    """How factors are stored.

    Attributes:
        ranks: By target path.
        scaling: What they are divided by, so that the format's scale changes no delta.
        dtype: Type they are rounded to.
        magnitudes: Of a DoRA, ``(1, n)``, by target path.
    """

    ranks: Mapping[str, int]
    scaling: Scaling
    dtype: DType
    magnitudes: Mapping[str, ScratchSlot]


def extracted_adapter(
    storage: StoragePlan,
    factored: Mapping[str, TargetFactors],
    settings: FactorSettings,
    base: Checkpoint,
    base_id: str,
    tuned: Path,
) -> Adapter:
    """The adapter that makes TUNED of BASE.

    The name of `base` and its content id are recorded, and its class decides the task; `factored` is by target path.
    """
    updates: dict[Site, tuple[Update, ...]] = {}
    for target in storage.targets:
        kernel = target.shape[2:] if target.form == "conv" else ()
        kind = _MODULE_KINDS[target.form if target.path.endswith(".weight") else "experts"]
        site = Site(target.path, module_kind=kind, kernel=kernel)
        updates[site] = (_low_rank(factored[target.path], settings),)
    for dense in storage.dense_tensors:
        updates[Site(dense.path)] = (_dense(dense),)
    architectures = [str(name) for name in base.main.config.get("architectures") or ()]
    causal = any("CausalLM" in name or "LMHeadModel" in name for name in architectures)
    tensors = (tensor for chain in updates.values() for update in chain for tensor in update.tensors)
    return Adapter(
        path=tuned,
        format="extraction",
        kind="LORA",
        updates=dict(sorted(updates.items())),
        tensors=tuple(dict.fromkeys(tensors)),
        new_modules=frozenset(storage.saved_modules),
        copied_modules=frozenset(storage.saved_modules),
        base_name=base_name(base),
        base_id=base_id,
        metadata={"surgery.base": base_id},
        task="text-generation" if causal else "",
    )


def fold_of(scaling: Scaling, rank: int) -> float:
    """The number to multiply either factor by, so that the scale at `rank` changes nothing."""
    return 1 / math.sqrt(scaling.scale(rank))


def _low_rank(factors: TargetFactors, settings: FactorSettings) -> Update:
    target = factors.target
    loras = tuple(_lora(factors, index, settings) for index in range(len(target.deltas)))
    if target.form == "experts":
        return Stacked(loras, tuple(lora.transpose() for lora in loras))
    slot = settings.magnitudes.get(target.path)
    if slot is None:
        return loras[0]
    # In float32 whatever the factors are: an error in it is one of the whole row, not of the change alone.
    sources = _sources(target.deltas[0])
    magnitude = computed(f"{target.path}.magnitude", (slot.shape[1],), sources, slot.read, DType.F32)
    return DoRA(loras[0], Factor.of(magnitude), per_row=target.form != "embedding")


def _lora(factors: TargetFactors, index: int, settings: FactorSettings) -> LoRA:
    """The factors of one matrix of a target."""
    target, rank = factors.target, settings.ranks[factors.target.path]
    rows, cols = target.deltas[index].logical_shape
    fold = fold_of(settings.scaling, rank)

    def side(which: Literal["left", "right"]) -> Callable[[], Array]:
        def load() -> Array:
            factor = _rounded(factors.side(which, index, rank, fold), settings.dtype, target)
            return take(factor, target.order) if target.order and which == "left" else factor

        return load

    dtype, sources = settings.dtype, _sources(target.deltas[index])
    inputs = target.shape[1:] if target.form == "conv" else (cols,)
    B = computed(f"{target.path}.{index}.B", (rows, rank), sources, side("left"), dtype)
    A = computed(f"{target.path}.{index}.A", (rank, *inputs), sources, side("right"), dtype)
    factor = Factor((A,), (rank, cols))
    return LoRA(factor, Factor.of(B), settings.scaling.scale(rank), settings.scaling.alpha_of(rank))


def _rounded(factor: Array, dtype: DType, target: LowRankTarget) -> Array:
    """The values as they are stored, so that whatever a format makes of them is made of these.

    Raises:
        FitError: a value that the type cannot hold.
    """
    stored = cast(factor, dtype)
    if dtype is DType.F16 and not all_finite(stored):
        raise FitError(
            f"a value is too large for {dtype.label}", tensor=target.names[0], hint="store it as bf16 or fp32"
        )
    return stored


def _sources(delta: Delta) -> tuple[StoredTensor, ...]:
    return tuple(source for strip in delta.strips for side in (strip.tuned, strip.base) for source in side.sources)


def _dense(dense: DenseTensor) -> Update:
    weight = dense.weight
    if dense.via == "token rows":
        shape = (len(dense.rows), *weight.sizes[1:])

        def load() -> Array:
            rows = [read_rows(weight, row, row + 1) for row in dense.rows]
            return namespace(*rows).concat(rows)

        rows = computed(f"{dense.path}.rows", shape, weight.sources, load, weight.dtype)
        return TokenRows(Factor.of(rows), dense.rows)
    tensor = weight.elements
    if tensor is None or dense.shift is not None:
        tensor = computed(dense.path, weight.sizes, weight.sources, lambda: shifted(dense), weight.dtype)
    return Replacement(Factor.of(tensor), _HELD[dense.via])


def shifted(dense: DenseTensor) -> Array:
    """TUNED's values, plus the shift where there is one, rounded once to the stored type."""
    values = read_rows(dense.weight)
    if dense.shift is None:
        return values
    return cast(cast(values, DType.F64) + cast(dense.shift(), DType.F64), dtype_of(values))
