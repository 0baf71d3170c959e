# SPDX-License-Identifier: Apache-2.0
"""Put the tensors that a fine-tune changed into its base, as they are: BitFit, norms, layers, rows (docs/insert.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.engine.execute import Run, execute
from surgery.engine.ledger import Ledger
from surgery.engine.merge.merge_plan import planned_merge
from surgery.engine.merge.model_card import merge_card
from surgery.engine.quantised.output import DEQUANTISED, QuantisedOutput
from surgery.reports.output import DRY_RUN, PATH, counted
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Facts, Note, Section
from surgery.reports.selective import ChangedWeight, SelectiveTuning, selective_tuning
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.values import Name, Phrase, Value
from surgery_formats.binding.bind import Binding
from surgery_formats.binding.edits import Edit
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.storage.base import Storage, read_block
from surgery_formats.updates import is_row_setting

__all__ = ["DeltaResult", "insert_delta", "tuned_by"]

_COMPARED = 1 << 22  # numbers at a time


@summarised
@dataclass(frozen=True)
class DeltaResult:
    """What became of a base that got the tensors of a fine-tune.

    Attributes:
        output: The folder; None for a dry run.
        ledger: Every tensor.
        delta: What was inserted.
        tuned: Which part of the model that is, and its share.
        warnings: What the user should know.
        seconds: How long it took.
    """

    output: Path | None
    ledger: Ledger
    delta: Path
    tuned: SelectiveTuning
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()

    @property
    def share(self) -> float:
        """Of the model's numbers, those that were replaced: the share that was trained."""
        return self.tuned.share

    @property
    def nbytes(self) -> int:
        """Size of all weight files; of a dry run, the size they would have."""
        return self.ledger.plan.nbytes

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "type": "delta",
            "output": None if self.output is None else str(self.output),
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "tuned": self.tuned.as_json(),
            "warnings": list(self.warnings),
            "ledger": self.ledger.as_json(),
        }

    def summary(self, *, verbose: bool = False, output: Path | None = None) -> Summary:
        """What was inserted, and which share of the model it is.

        Args:
            verbose: Nothing more.
            output: Where a dry run would write.
        """
        where = self.output or output
        facts: list[tuple[str, Phrase]] = [
            ("insert", Name(self.delta, PATH)),
            ("into", Name(self.ledger.plan.roots[0], PATH)),
            ("trained", (*self.tuned.phrase, " (", Value(self.tuned.numbers, "count"), ")")),
            ("tensors", counted(self.ledger.classes)),
        ]
        size: Phrase = Value(self.nbytes, "bytes")
        if where is not None:
            size = Name(where, PATH), ": ", Value(self.nbytes, "bytes")
        facts.append(("wrote" if self.output else "would write", size))
        sections: list[Section] = [Facts(tuple(facts))]
        sections += [DRY_RUN] if self.output is None else [Note("every replaced number is the fine-tune's own")]
        return Summary("Insertion", (*sections, *warning_notes(self.warnings)))


def insert_delta(base: Checkpoint, delta: Adapter, folder: Path | None, run: Run) -> DeltaResult:
    """Write `base` with the tensors of `delta` in the place of its own.

    It is a merge of what is only copied: the same plan, proof and manifest, and the same bytes.

    Args:
        base: The model.
        delta: What holds parameters, or rows of them, as a fine-tune has them.
        folder: To make; None for a dry run.
        run: How to run it.

    Raises:
        FitError: it holds more than such tensors, or they would be rounded.
        NothingChangedError, OutputExistsError, ResourceError, ProofError: see `surgery.engine.execute.execute`.
    """
    _check_only_copied(delta)
    quantised = QuantisedOutput(only_touched=True) if base.is_quantised else DEQUANTISED
    binding, plan = planned_merge(base, [delta], "keep", None, "keep", quantised)
    _check_types(binding)
    tuned = tuned_by(binding)
    if folder is None:
        return DeltaResult(None, Ledger(plan), delta.path, tuned, plan.warnings)

    def finish(ledger: Ledger) -> Mapping[str, bytes]:
        return {"README.md": merge_card(binding, ledger, relation="finetune")}

    return DeltaResult(folder, execute(plan, folder, run, finish), delta.path, tuned, plan.warnings)


def _check_only_copied(delta: Adapter) -> None:
    computed = [(site, update) for site, chain in delta.updates.items() for update in chain if update.effect != "sets"]
    if computed:
        site, update = computed[0]
        raise FitError(
            f"'{site}' has a {update.kind}, which is computed: only trained tensors are put in as they are",
            file=delta.path,
            hint="`surgery merge` folds it into the weight, `unmerged=True` puts it beside the model",
        )
    if not delta.updates:
        hint = "prompt bake puts virtual tokens into the vocabulary" if delta.prompt is not None else ""
        raise FitError("it holds no tensors of a model", file=delta.path, hint=hint)


def _check_types(binding: Binding) -> None:
    """Refuse numbers that the base's types would round.

    Raises:
        FitError: one is of a wider type than the base's tensor.
    """
    for (component, name), edit in binding.edits.items():
        own = binding.checkpoint.components[component].parameters.get(name)
        if own is None or not own.storage.is_float:
            continue
        for operation in edit.operations + ((edit.replaced,) if edit.replaced else ()):
            for tensor in operation.update.tensors:
                if tensor.dtype.bits > own.storage.dtype.bits or (
                    tensor.dtype.bits == own.storage.dtype.bits and tensor.dtype is not own.storage.dtype
                ):
                    raise FitError(
                        f"is {tensor.dtype.label}, and the base has '{name}' in {own.storage.dtype.label}: it would be rounded",
                        file=tensor.path,
                        tensor=tensor.name,
                        hint="`surgery merge` rounds it, and says what that costs",
                    )


def tuned_by(binding: Binding) -> SelectiveTuning:
    """Which part of the base the edits of `binding` change."""
    checkpoint = binding.checkpoint
    names = [
        name for component in checkpoint.components.values() for name in component.parameters.without(component.aliases)
    ]
    total = sum(
        parameter.numel
        for component in checkpoint.components.values()
        for parameter in component.parameters.without(component.aliases).values()
    )
    return selective_tuning(_changed(binding), names, total)


def _changed(binding: Binding) -> Iterator[ChangedWeight]:
    for (part, name), edit in binding.edits.items():
        component = binding.checkpoint.components[part]
        own = component.parameters.get(name)
        if own is None or edit.operations or not _equal(own.storage, edit.source):
            yield _change(edit, component.role(name))


def _equal(own: Storage, new: Storage) -> bool:
    """Whether a copy of a module holds the base's own values: a bias beside a weight that was trained."""
    if own.shape != new.shape:
        return False
    step = max(1, _COMPARED // max(own.shape[1], 1))
    blocks = ((start, min(start + step, own.shape[0])) for start in range(0, own.shape[0], step))
    return all(bool((read_block(own, *block) == read_block(new, *block)).all()) for block in blocks)


def _change(edit: Edit, role: str) -> ChangedWeight:
    rows, _ = edit.source.shape
    numel = edit.source.shape[0] * edit.source.shape[1]
    indices = [len(op.update.indices) for op in edit.operations if is_row_setting(op.update)]
    if edit.replaced is None and indices:
        return ChangedWeight(edit.name, role, sum(indices) * (numel // rows), sum(indices), rows)
    return ChangedWeight(edit.name, role, numel)
