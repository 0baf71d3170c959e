# SPDX-License-Identifier: Apache-2.0
"""The LoRA that a merge with a residual writes beside a quantised model: base' + LoRA is base + adapters.

It is made of what lies on the disk: the staged model is opened again, its codes are read, and what is missing to the
updated weights is factorised. Then model and LoRA are bound to each other, as a server does, and compared with base and
adapters block by block.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.engine.adapter_output import put_adapter, rendered_size
from surgery.engine.blocks import block_height
from surgery.engine.card import CARD
from surgery.engine.output_checks import LOW_SURVIVAL
from surgery.engine.plan import Compute, Copy, Plan
from surgery.engine.quantised.output import QuantisedOutput
from surgery.engine.quantised.residual_card import residual_card
from surgery.engine.quantised.residual_choice import base_of, coded_edits
from surgery.engine.quantised.residual_factors import largest_update, update_left
from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.peft.read import read_peft
from surgery_formats.adapters.peft.write import render_peft
from surgery_formats.arrays import energy
from surgery_formats.binding.bind import Binding, bind
from surgery_formats.binding.edits import Edit, prepared
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.models.checkpoint import Checkpoint, open_checkpoint
from surgery_formats.storage.aligned import oriented
from surgery_formats.storage.base import read_values
from surgery_formats.tensors.apply import apply_chain
from surgery_formats.updates import Update

__all__ = ["FOLDER", "ResidualLoRA", "WeightResidual", "most_nbytes", "write_residual"]

FOLDER = "adapter"
"""Of the LoRA, in the folder of the model."""
_ROUNDING = 1e-5  # of float32 factors and sums, relative to the update
_UNIT = 2.0**-24  # of float32: what one sum may be off by, relative to it


@dataclass(frozen=True, slots=True)
class WeightResidual:
    """What became of one quantised weight.

    Attributes:
        weight: Its name.
        moved: Whether its codes hold a part of the update.
        rank: Of its LoRA; 0 without one.
        update: Norm of the update; 0 where it is no more than the rounding of the sums that make it.
        error: ``||base + adapters - (base' + LoRA)||``, measured on what was written.
    """

    weight: str
    moved: bool
    rank: int
    update: float
    error: float


@dataclass(frozen=True, slots=True)
class ResidualLoRA:
    """The LoRA beside a model.

    Attributes:
        nbytes: Of its file of weights.
        weights: Every quantised weight that the adapters change.
    """

    nbytes: int
    weights: tuple[WeightResidual, ...]

    @property
    def error(self) -> float:
        """Error of all weights together, relative to the updates."""
        size = math.hypot(*(weight.update for weight in self.weights))
        return math.hypot(*(weight.error for weight in self.weights)) / size if size else 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know of a LoRA that holds too little."""
        if self.error <= 1 - LOW_SURVIVAL:
            return ()
        return (
            f"model and adapter are off by {self.error:.0%} of the update: a LoRA of a higher rank holds more of it",
        )

    def as_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return {
            "folder": FOLDER,
            "nbytes": self.nbytes,
            "error": self.error,
            "weights": {
                each.weight: {
                    "codes": "moved" if each.moved else "kept",
                    "rank": each.rank,
                    "error": each.error / each.update if each.update else 0.0,
                }
                for each in self.weights
            },
        }


def most_nbytes(binding: Binding, options: QuantisedOutput) -> int:
    """The most bytes that the LoRA's file of weights will have; those it has, where it is the adapters' own.

    Raises:
        FitError: an update has no place in PEFT's folder.
    """
    updates: dict[Site, tuple[Update, ...]] = {}
    for edit in coded_edits(binding).values():
        updates[_site(edit, binding)] = (largest_update(binding, edit, options),)
    return rendered_size(_rendered(binding, updates, binding.checkpoint)) if updates else 0


def write_residual(binding: Binding, plan: Plan, options: QuantisedOutput, folder: OutputFolder) -> ResidualLoRA:
    """Write the LoRA into the staged output, and prove it.

    Args:
        binding: Of base and adapters, with every edit.
        plan: Of the model.
        options: What was asked for.
        folder: With the model.

    Raises:
        FitError: an update has no place in PEFT's folder.
        ProofError: what was written is further off than what was computed.
    """
    merged, edits = open_checkpoint(folder.staged), coded_edits(binding)
    copied = {(each.component, each.weight) for each in plan.weights if isinstance(each.step, Copy)}
    updates: dict[Site, tuple[Update, ...]] = {}
    stated: dict[tuple[str, str], float] = {}
    for key, edit in edits.items():
        update, stated[key] = update_left(binding, edit, merged, options, kept=key in copied)
        if update is not None:
            updates[_site(edit, binding)] = (update,)
    nbytes = 0
    if updates:
        nbytes = put_adapter(_rendered(binding, updates, merged), folder, f"{FOLDER}/")
    found = _measured(binding, edits, merged, folder.staged / FOLDER if updates else None)
    weights = []
    for key, edit in edits.items():
        size, error, scale = found[key]
        if error > stated[key] * (1 + _ROUNDING) + _ROUNDING * scale:
            raise ProofError(f"model and LoRA are off by {error:.3g}, not by {stated[key]:.3g}", tensor=edit.name)
        chain = updates.get(_site(edit, binding), ())
        weights.append(WeightResidual(edit.name, key not in copied, (chain[0].rank or 0) if chain else 0, size, error))
    residual = ResidualLoRA(nbytes, tuple(weights))
    if weights:
        folder.write_small(f"{FOLDER}/residual.json", json.dumps(residual.as_json(), indent=2).encode() + b"\n")
    if updates:
        text = residual_card(binding, residual.error, max(weight.rank for weight in weights))
        folder.write_small(f"{FOLDER}/{CARD}", text)
    return residual


def _site(edit: Edit, binding: Binding) -> Site:
    """The place of an edit in the LoRA's folder."""
    if edit.replaced is not None:
        return edit.replaced.site
    weight, kind = base_of(binding, edit), edit.operations[0].site.module_kind
    kernel = weight.sizes[2:] if weight is not None and kind == "convolution" else ()
    return Site(edit.name, edit.component, module_kind=kind, kernel=kernel)


def _rendered(binding: Binding, updates: Mapping[Site, tuple[Update, ...]], model: Checkpoint) -> Rendering:
    """The LoRA as PEFT's folder.

    Raises:
        FitError: an update has no place in it.
    """
    first = binding.adapters[0][0]
    tensors = dict.fromkeys(tensor for chain in updates.values() for update in chain for tensor in update.tensors)
    adapter = Adapter(
        path=model.path,
        format="residual",
        kind="LORA",
        updates=updates,
        tensors=tuple(tensors),
        copied_modules=frozenset().union(*(adapter.copied_modules for adapter, _ in binding.adapters)),
        task=first.task,
    )
    rendering = render_peft(adapter, model)
    if lost := [entry for entry in rendering.entries if entry.outcome == "dropped"]:
        raise FitError(f"PEFT's folder has no place for it: {lost[0].detail}", tensor=lost[0].site)
    return rendering


def _measured(
    binding: Binding, edits: Mapping[tuple[str, str], Edit], merged: Checkpoint, lora: Path | None
) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Norm of the update, of the error, and of the updated weight, by edit: of what lies on the disk.

    Updates that cancel each other leave the rounding of their sums, which is no update: its norm is 0.
    """
    after = bind([(read_peft(lora), 1.0)], merged).edits if lora is not None else {}
    found = {}
    for key, edit in edits.items():
        weight, written = base_of(binding, edit), merged.components[edit.component].parameters[edit.name].storage
        assert weight is not None
        other = after.get(key) or Edit(edit.component, edit.name, written, ())
        sides = [(oriented(each.source, weight), each.operations) for each in (edit, other)]
        height = max(
            block_height(weight.shape[1], Compute(each.source, each.operations, weight)) for each in (edit, other)
        )
        chains = [prepared(operations, source, DType.F32, height) for source, operations in sides]
        sums = [0.0, 0.0, 0.0]
        for start in range(0, weight.shape[0], height):
            stop = min(start + height, weight.shape[0])
            blocks = [read_values(source, start, stop, DType.F32) for source, _ in sides]
            for chain, block in zip(chains, blocks, strict=True):
                apply_chain(chain, block, start, stop)
            base = read_values(weight, start, stop, DType.F32)
            for i, values in enumerate((blocks[0] - base, blocks[0] - blocks[1], blocks[0])):
                sums[i] += energy(values)
        update, error, scale = map(math.sqrt, sums)
        found[key] = update if update > 2 * len(edit.operations) * _UNIT * scale else 0.0, error, scale
    return found
