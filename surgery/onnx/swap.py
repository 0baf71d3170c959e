# SPDX-License-Identifier: Apache-2.0
"""Adapters that are swapped while a session runs: slots in the graph for LoRA factors, and a file of factors for each adapter."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.onnx.contract import Slot
from surgery_formats.adapter import Adapter
from surgery_formats.binding import bind
from surgery_formats.checkpoint import Checkpoint
from surgery_formats.dtypes import DType
from surgery_formats.edits import Edit
from surgery_formats.errors import FitError
from surgery_formats.families.recipe import Model, Projection
from surgery_formats.text import show
from surgery_formats.updates import LoRA

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["Swapped", "as_numpy", "swappable"]


@dataclass(frozen=True)
class Swapped:
    """An adapter that is kept apart.

    Attributes:
        adapter: As read.
        factors: By the weight's name in the recipe.
        warnings: What the user should know.
    """

    adapter: Adapter
    factors: Mapping[str, LoRA]
    warnings: tuple[str, ...]

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{self.adapter.path.name.removesuffix('.safetensors')}.onnx_adapter"

    def data(self, slots: Sequence[Slot], io: DType) -> bytes:
        """Its file: ``A (in, rank)`` and ``B (rank, out)`` times the scale, for each of its slots."""
        from surgery.onnx.adapter_file import write_adapter_file

        arrays: dict[str, np.ndarray[Any, Any]] = {}
        by_weight = {slot.weight: slot for slot in slots}
        for weight, lora in self.factors.items():
            slot = by_weight[weight]
            arrays[slot.A], arrays[slot.B] = _arrays(lora, io)
        with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
            path = Path(folder) / "adapter"
            write_adapter_file(path, arrays)
            return path.read_bytes()


def _arrays(lora: LoRA, io: DType) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    import torch

    return as_numpy(lora.A.load(torch.float32).T, io), as_numpy((lora.B.load(torch.float32) * lora.scale).T, io)


def as_numpy(values: torch.Tensor, io: DType) -> np.ndarray[Any, Any]:
    """Values in a graph's type; bfloat16, which numpy lacks, by ml_dtypes."""
    import ml_dtypes
    import numpy as np

    kinds: dict[DType, Any] = {DType.F32: np.float32, DType.F16: np.float16, DType.BF16: ml_dtypes.bfloat16}
    found: np.ndarray[Any, Any] = np.ascontiguousarray(values.contiguous().numpy()).astype(kinds[io])
    return found


def swappable(adapter: Adapter, checkpoint: Checkpoint, model: Model) -> Swapped:
    """What an adapter puts into which slot.

    Raises:
        FitError: it does not fit the base, or does something that a slot cannot: only LoRA on whole linear layers can be swapped.
    """
    found = bind([(adapter, 1.0)], checkpoint)
    component = checkpoint.main
    by_stored: dict[str, str] = {}
    for one in _projections(model):
        places = component.names.resolve(one.weight)
        if len(places) == 1 and one.weight != model.embedding.tokens:
            by_stored[places[0].parameter.name] = one.weight
    factors = {}
    for (_, name), edit in found.edits.items():
        factors[_slot_of(name, by_stored, adapter)] = _only_lora(name, edit, adapter)
    return Swapped(adapter, factors, found.warnings)


def _projections(model: Model) -> list[Projection]:
    every: list[Projection] = []
    for layer in model.layers:
        every += [*layer.attention.inputs, layer.attention.output, *layer.mlp.inputs, layer.mlp.output]
    for part in ("projection", "before", "pooler"):
        if isinstance(one := getattr(model.head, part, None), Projection):
            every.append(one)
    return [*every, *(step for step, _ in getattr(model.head, "steps", ()))]


def _slot_of(name: str, by_stored: Mapping[str, str], adapter: Adapter) -> str:
    if name not in by_stored:
        raise FitError(
            f"'{show(name)}' is no linear layer of its own, so what was trained for it cannot be swapped",
            file=adapter.path,
            tensor=name,
            hint="--merge it",
        )
    return by_stored[name]


def _only_lora(name: str, edit: Edit, adapter: Adapter) -> LoRA:
    kinds = sorted(
        {operation.update.kind for operation in edit.operations} | ({"replacement"} if edit.replaced else set())
    )
    update = edit.operations[0].update if len(edit.operations) == 1 and not edit.replaced else None
    if not isinstance(update, LoRA):
        raise FitError(
            f"{' and '.join(kinds)} cannot be swapped, only one LoRA per weight",
            file=adapter.path,
            tensor=name,
            hint="--merge it",
        )
    if math.prod(edit.operations[0].view.shape) != edit.source.numel:
        raise FitError(
            "was trained for a part of a fused weight, which has one slot",
            file=adapter.path,
            tensor=name,
            hint="--merge it",
        )
    return update
