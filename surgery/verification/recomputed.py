# SPDX-License-Identifier: Apache-2.0
"""Compute weights of a merge once more, from its base and adapters, and compare them with what was written."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.engine.merge.merge_plan import planned_merge
from surgery.engine.plan import Compute, PlannedTensor
from surgery.engine.quantised.output import quantised_output
from surgery_formats.canonical.adapter import WeightedAdapter
from surgery_formats.containers.weight_files import open_shard
from surgery_formats.errors import FitError, ProofError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.identity import tensor_digest
from surgery_formats.threads import one_thread

__all__ = ["SAMPLE", "recomputed_weights"]

SAMPLE = 8
"""Weights that are computed once more where nobody says how many."""
_OF_PLAN = ("dtype", "shard_size", "layout")
_OF_CODES = ("quantized", "only_touched", "rounding")
_OF_INPUTS = ("verb", "base", "adapters", "accept_loss", "reversible", "without")


def recomputed_weights(
    folder: Path, manifest: Mapping[str, Any], base: Checkpoint, adapters: Sequence[WeightedAdapter], number: int | None
) -> tuple[int, int]:
    """Compute `number` weights, drawn anew each time, or all where that is None.

    Returns:
        How many were compared, and of how many.

    Raises:
        FitError: the folder is no merge that can be planned from a base and adapters alone.
        ProofError: a weight has other bytes than base and adapters make.
    """
    from surgery.engine.arithmetic import compute

    told = _merge_of(folder, manifest)
    codes = quantised_output(**{name: told[name] for name in _OF_CODES if name in told})
    _, plan = planned_merge(
        base,
        list(adapters),
        told.get("dtype", "keep"),
        told.get("shard_size"),
        told.get("layout", "keep"),
        quantised=codes,
        without=tuple(told.get("without", ())),
    )
    weights: dict[int, list[tuple[Path, PlannedTensor]]] = {}
    for file in plan.files:
        for tensor in file.tensors:
            if isinstance(tensor.step, Compute):
                weights.setdefault(id(tensor.step), []).append((folder / file.name, tensor))
    every = list(weights.values())
    chosen = every if number is None or number >= len(every) else random.SystemRandom().sample(every, number)
    opened = {path: {t.name: t for t in open_shard(path).tensors} for path in {path for w in chosen for path, _ in w}}
    with one_thread():
        for parts in chosen:
            _, first = parts[0]
            assert isinstance(first.step, Compute)
            measured = compute(first.weight_label, first.step, lambda part, at, data: None, lambda: False)
            for path, tensor in parts:
                stored = opened[path].get(tensor.name)
                if stored is None or tensor_digest(stored) != measured[tensor.part].xxh3:
                    raise ProofError(
                        "is not what base and adapters make",
                        file=path,
                        tensor=tensor.label,
                        hint="another base, adapter or weight; or another processor, which may round differently",
                    )
    return len(chosen), len(every)


def _merge_of(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the merge that wrote the folder.

    Raises:
        FitError: it was something else, or took more than a base and adapters.
    """
    recipe = manifest.get("recipe")
    steps = recipe.get("steps") if isinstance(recipe, Mapping) else None
    step = steps[-1] if isinstance(steps, list) and len(steps) == 1 else None
    if not isinstance(step, Mapping) or step.get("verb") != "merge":
        raise FitError(
            "not written by a merge alone: its weights are not computed once more",
            file=folder,
            hint="`surgery apply` makes it again from its manifest",
        )
    if other := sorted(step.keys() - {*_OF_PLAN, *_OF_CODES, *_OF_INPUTS}):
        raise FitError(
            f"the merge took {other[0]}, so that base and adapters alone do not tell its weights",
            file=folder,
            hint="`surgery apply` makes it again from its manifest",
        )
    return dict(step)
