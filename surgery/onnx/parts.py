# SPDX-License-Identifier: Apache-2.0
"""What becomes of each adapter of an export: folded into weights, kept apart for slots, or put in front as a soft prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.merge import plan_merge
from surgery.onnx.planned import DELTA, delta_plan, planned_component, with_delta
from surgery.onnx.prefix import prompt_past
from surgery.onnx.swap import Swapped, as_numpy, swappable
from surgery.plan import Plan
from surgery_formats.adapter import Adapter
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.binding import bind
from surgery_formats.checkpoint import Checkpoint, Component
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.families.parameters import model_of
from surgery_formats.families.recipe import Model
from surgery_formats.text import listing

__all__ = ["Merged", "Parts", "read_parts"]

Path_ = str | os.PathLike[str]


@dataclass(frozen=True)
class Merged:
    """What a merge changes.

    Attributes:
        full: Plan of the whole checkpoint, matrices that graphs read together side by side.
        delta: Plan of a file with the changed tensors only.
        weights: Of the adapters.
    """

    full: Plan
    delta: Plan
    weights: tuple[float, ...]

    def headers(self, *, whole: bool) -> dict[str, bytes]:
        """First bytes of the files that will be written, by name."""
        return {Path(file.name).name: file.header for file in (self.full if whole else self.delta).files}

    def component(self, base: Component, output: Path, *, whole: bool) -> Component:
        """The checkpoint that will be there: a new one, or the base with a delta file beside it."""
        return planned_component(base, self.full, output) if whole else with_delta(base, self.full, self.delta)


@dataclass(frozen=True)
class Parts:
    """The adapters of an export.

    Attributes:
        merged: Folded into weights, or None.
        swapped: Kept apart.
        prompt: Soft prompt, or None.
        records: For the contract.
        warnings: What the user should know.
    """

    merged: Merged | None = None
    swapped: tuple[Swapped, ...] = ()
    prompt: Adapter | None = None
    records: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()

    def model(self, component: Component) -> Model:
        """What `component` computes."""
        return model_of(component.config, frozenset(component.tensors))

    def past(self, base: Component, model: Model, io: DType) -> dict[str, Any]:
        """Keys and values of the soft prompt, by input; empty without one, or where there is no cache to hold them."""
        if self.prompt is None or (model.kind == "encoder" and self.rows(io) is not None):
            return {}
        return prompt_past(self.prompt, base, model, io, self.merged.full if self.merged else None)

    def rows(self, io: DType) -> Any:
        """Embeddings of the soft prompt ``(tokens, D)``; None where it is keys and values, or there is none."""
        if self.prompt is None or self.prompt.prompt is None or self.prompt.prompt.prefix is not None:
            return None
        return as_numpy(self.prompt.prompt.embeddings(), io)

    @property
    def slotted(self) -> frozenset[str]:
        """Weights that get a slot: those any swapped adapter touches."""
        return frozenset(weight for one in self.swapped for weight in one.factors)

    def contract(self, past: dict[str, Any]) -> dict[str, Any]:
        """Fields of the contract that adapters fill. Virtual tokens are those of a cache: an encoder has its own."""
        found: dict[str, Any] = {"adapters": self.records}
        if self.prompt is not None and self.prompt.prompt is not None:
            found["prompt_kind"] = self.prompt.prompt.kind
        if past:
            found["virtual_tokens"] = next(iter(past.values())).shape[2]
        return found


def read_parts(
    checkpoint: Checkpoint, merge: Sequence[tuple[Path_, float]], swap: Sequence[Path_], prefix: Sequence[Path_]
) -> Parts:
    """Read all adapters and bind them to the base.

    Raises:
        InputError, FitError: one cannot be read, or does not fit.
    """
    if len(prefix) > 1:
        raise FitError("several soft prompts in front of one input", hint="one --prefix at most")
    prompt = read_adapter(prefix[0]) if prefix else None
    to_merge = [(read_adapter(path), weight) for path, weight in merge]
    if prompt is not None and prompt.prompt is not None and prompt.updates:
        to_merge.append((_heads_of(prompt), 1.0))
    merged, warnings = _merged(checkpoint, to_merge)
    model = model_of(checkpoint.main.config, frozenset(checkpoint.main.tensors)) if swap else None
    swapped = tuple(swappable(read_adapter(path), checkpoint, model) for path in swap) if model else ()
    names = [one.file for one in swapped]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise FitError(f"two adapters would be called {listing(twice)}", hint="rename one of the folders")
    records = [_record(path, "merged", weight) for path, weight in merge]
    records += [_record(path, "swapped", 1.0) for path in swap] + [_record(path, "prefix", 1.0) for path in prefix]
    warnings += [warning for one in swapped for warning in one.warnings]
    return Parts(merged, swapped, prompt, tuple(records), tuple(warnings))


def _heads_of(prompt: Adapter) -> Adapter:
    """What was trained in full beside a soft prompt: the head of a task."""
    assert prompt.prompt is not None
    table = prompt.prompt.table
    return replace(prompt, prompt=None, tensors=tuple(one for one in prompt.tensors if one.name != table.name))


def _merged(checkpoint: Checkpoint, merge: Sequence[tuple[Adapter, float]]) -> tuple[Merged | None, list[str]]:
    if not merge:
        return None, []
    found = bind(merge, checkpoint)
    full = plan_merge(found, packed=True)
    if any(Path(file.name).name == DELTA for file in full.files):
        raise FitError(f"a weight file of the base is called {DELTA}", file=checkpoint.path)
    roots = tuple(adapter.path for adapter, _ in found.adapters)
    delta = replace(delta_plan(full, checkpoint.main), roots=roots)
    return Merged(full, delta, tuple(weight for _, weight in merge)), list(full.warnings)


def _record(path: Path_, mode: str, weight: float) -> dict[str, Any]:
    """Without its folder: a graph tells nothing of the machine it was made on."""
    return {"name": Path(path).name, "mode": mode, "weight": weight}
