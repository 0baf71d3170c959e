# SPDX-License-Identifier: Apache-2.0
"""Report: what an adapter saves against a full copy of its base, in parameters and in bytes, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.engine.inputs import CheckpointLike, Openable, as_checkpoint, as_list, as_opened
from surgery.reports.fit import fit_report
from surgery.reports.targets import touched, trained_parameters
from surgery.reports.to_json import plain
from surgery.verbs.inspect import inspect_adapter
from surgery.verbs.report_markdown import render
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.module_tree import leaves, module_graph

__all__ = ["AdapterCost", "BaseCost", "SavingsReport", "Split", "TaskCost", "report"]

_MLP = ("mlp", "expert")


@dataclass(frozen=True, slots=True)
class Split:
    """Numbers by what they are part of.

    Attributes:
        attention: Of attention, its norms apart.
        mlp: Of feed-forward layers, experts included.
        rest: Embeddings, heads, norms, convolutions, virtual tokens.
    """

    attention: int = 0
    mlp: int = 0
    rest: int = 0

    def plus(self, role: str, number: int) -> Split:
        """With `number` more of `role`."""
        if role == "attention":
            return replace(self, attention=self.attention + number)
        if role in _MLP:
            return replace(self, mlp=self.mlp + number)
        return replace(self, rest=self.rest + number)


@dataclass(frozen=True, slots=True)
class TaskCost:
    """So many tasks, each as a full copy of the base, or as adapters on one base.

    Attributes:
        tasks: How many.
        copies_nbytes: Bytes of as many full copies.
        shared_nbytes: Bytes of one base and the adapters.
        saved_nbytes: The difference; negative where a single adapter comes on top of its base.
        times: How many times smaller.
        copies_parameters: Numbers in as many full copies.
        shared_parameters: Numbers in one base and the adapters.
    """

    tasks: int
    copies_nbytes: int
    shared_nbytes: int
    saved_nbytes: int
    times: float
    copies_parameters: int
    shared_parameters: int


@dataclass(frozen=True, slots=True)
class BaseCost:
    """A base.

    Attributes:
        path: What was opened.
        name: Its file or folder name.
        parameters: Numbers stored, ties counted once, buffers not at all.
        nbytes: Of its weight files, as the file system counts them.
        split: `parameters` by part.
    """

    path: Path
    name: str
    parameters: int
    nbytes: int
    split: Split


@dataclass(frozen=True, slots=True)
class AdapterCost:
    """An adapter beside its base.

    Attributes:
        path: What was opened.
        name: Its file or folder name.
        format: ``peft``, ``kohya``, ``mlx``.
        kind: ``LORA`` ...
        trained: Numbers trained.
        total: Numbers of base and adapter together while training, as PEFT counts them: a module trained in full is
            there twice, its original and its copy. None without a base.
        share: ``trained / total``.
        carried: Numbers in the file that were not trained.
        nbytes: Of its weight files, as the file system counts them.
        nbytes_share: ``nbytes`` of those of the base.
        split: `trained` by part.
        tasks: One base with so many adapters like this, against as many copies.
        warnings: What the user should know.
    """

    path: Path
    name: str
    format: str
    kind: str
    trained: int
    total: int | None
    share: float | None
    carried: int
    nbytes: int
    nbytes_share: float | None
    split: Split
    tasks: tuple[TaskCost, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SavingsReport:
    """What adapters cost and save.

    Attributes:
        base: The base, or None if none was given.
        adapters: In the order given.
        together: All these adapters on one base against as many copies; None for fewer than two, or without a base.
    """

    base: BaseCost | None
    adapters: tuple[AdapterCost, ...]
    together: TaskCost | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"type": "savings", **plain(self)}

    def as_markdown(self) -> str:
        """Tables for a model card; the same bytes for the same files."""
        return render(self)


def report(
    references: Openable | Iterable[Openable],
    *,
    base: CheckpointLike | None = None,
    tasks: int | Sequence[int] = (1, 10, 100),
) -> SavingsReport:
    """Parameter and storage savings of adapters. Only headers are read.

    Args:
        references: Adapters, as paths or opened; one of them may be their base instead of naming it by `base`.
        base: The model they were trained on. Without it there are no shares and no comparison with copies.
        tasks: Numbers of tasks to compare.

    Raises:
        NotFoundError, MalformedError: a path cannot be read.
        FitError: a full model where an adapter was expected, an adapter none of whose parameters the base has, or a
            number of tasks below one.
    """
    tasks = as_list(tasks)
    if wrong := [number for number in tasks if number < 1]:
        raise FitError(f"{wrong[0]} tasks cannot be compared")
    adapters: list[Adapter] = []
    models: list[Checkpoint] = []
    given: list[Openable] = as_list(references)
    for opened in (as_opened(reference, "references") for reference in given):
        if isinstance(opened, Adapter):
            adapters.append(opened)
        else:
            models.append(opened)
    if len(models) + (base is not None) > 1:
        raise FitError("more than one base", file=models[-1].path, hint="an adapter was expected here")
    model = models[0] if models else None if base is None else as_checkpoint(base)
    base_cost = None if model is None else _base_cost(model)
    costs = tuple(_adapter_cost(adapter, model, base_cost, tasks) for adapter in adapters)
    together = None
    if base_cost and len(costs) > 1:
        together = _task_cost(base_cost, len(costs), sum(c.nbytes for c in costs), sum(c.trained for c in costs))
    return SavingsReport(base_cost, costs, together)


def _name(path: Path) -> str:
    return path.resolve().name


def _base_cost(model: Checkpoint) -> BaseCost:
    split = Split()
    for component in model.components.values():
        for leaf in leaves(module_graph(component)):
            split = split.plus(leaf.role, leaf.parameters)
    parameters = split.attention + split.mlp + split.rest
    return BaseCost(model.path, _name(model.path), parameters, model.nbytes, split)


def _adapter_cost(
    adapter: Adapter, model: Checkpoint | None, base: BaseCost | None, tasks: Sequence[int]
) -> AdapterCost:
    meeting = None if model is None else fit_report(adapter, model)
    entries = touched(adapter, meeting.role if meeting else None)
    trained = trained_parameters(adapter, entries)
    split = Split(rest=adapter.prompt.parameters if adapter.prompt else 0)
    for entry in entries:
        if entry.trained:
            split = split.plus(entry.role, entry.parameters)
    nbytes = inspect_adapter(adapter).nbytes
    total = None
    if base and meeting:
        added = sum(entry.parameters for entry in entries if entry.held in ("added", "copy"))
        total = base.parameters + added + meeting.grown + (adapter.prompt.parameters if adapter.prompt else 0)
    return AdapterCost(
        path=adapter.path,
        name=_name(adapter.path),
        format=adapter.format,
        kind=adapter.kind,
        trained=trained,
        total=total,
        share=trained / total if total else None,
        carried=sum(entry.parameters for entry in entries if not entry.trained),
        nbytes=nbytes,
        nbytes_share=nbytes / base.nbytes if base else None,
        split=split,
        tasks=tuple(_task_cost(base, n, n * nbytes, n * trained) for n in tasks) if base else (),
        warnings=meeting.warnings if meeting else (),
    )


def _task_cost(base: BaseCost, tasks: int, nbytes: int, parameters: int) -> TaskCost:
    copies, shared = tasks * base.nbytes, base.nbytes + nbytes
    return TaskCost(
        tasks, copies, shared, copies - shared, copies / shared, tasks * base.parameters, base.parameters + parameters
    )
