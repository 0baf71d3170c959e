# SPDX-License-Identifier: Apache-2.0
"""Report: what an adapter saves against a full copy of its base, in parameters and in bytes, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from surgery.engine.inputs import CheckpointLike, Openable, as_checkpoint, as_list, as_opened, check_counts
from surgery.reports.base_choice import BaseChoice
from surgery.reports.fit import fit_report
from surgery.reports.quantisation import quantised_weights
from surgery.reports.result import timed
from surgery.reports.savings import AdapterCost, BaseCost, SavingsReport, Split, TaskCost
from surgery.reports.targets import touched, trained_parameters
from surgery.verbs.inspect import inspect_adapter
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError, UsageError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.known_files import refuse_known
from surgery_formats.models.module_tree import leaves, module_graph

__all__ = ["SavingsReport", "report"]

_TASKS = (1, 10, 100)


@timed
def report(
    references: Openable | Iterable[Openable],
    *,
    base: CheckpointLike | None = None,
    other_base: CheckpointLike | None = None,
    tasks: int | Sequence[int] | None = None,
) -> SavingsReport:
    """Parameter and storage savings of adapters. Only headers are read, unless two bases are compared.

    Args:
        references: Adapters, as paths or opened; one of them may be their base instead of naming it by `base`.
        base: The model they were trained on. Without it there are no shares and no comparison with copies.
        other_base: The same model, quantised or not: how far its values lie from the base's is measured beside what
            each adapter adds, and which of the two gives the behaviour that the adapter had in training. Or the name
            of a rule, ``nf4``: what bitsandbytes makes of the base (see `surgery.merge`).
        tasks: Numbers of tasks to compare; by default 1, 10 and 100.

    Raises:
        NotFoundError, MalformedError: a path cannot be read.
        UsageError: a number of tasks below one, or numbers of tasks and no base.
        FitError: a full model where an adapter was expected, an adapter none of whose parameters the base has.
    """
    numbers = list(_TASKS) if tasks is None else as_list(tasks)
    for number in numbers:
        check_counts(tasks=number)
    numbers = [int(number) for number in numbers]
    adapters: list[Adapter] = []
    models: list[Checkpoint] = []
    listed: list[Openable] = as_list(references)
    if not listed:
        raise UsageError("no model and no adapter was named")
    for opened in (as_opened(reference, "references") for reference in listed):
        if isinstance(opened, Adapter):
            adapters.append(opened)
        else:
            models.append(opened)
    if len(models) + (base is not None) > 1:
        for component in models[-1].components.values():
            refuse_known(models[-1].path, component.tensors, networks=True)
        raise FitError("more than one base", file=models[-1].path, hint="an adapter was expected here")
    model = models[0] if models else None if base is None else as_checkpoint(base)
    if model is None and tasks is not None:
        raise UsageError(
            "tasks on one base are compared with copies of it, and no base is given", hint="`base=` names it"
        )
    if model is not None and adapters:
        model = as_checkpoint(model)  # a graph's names say nothing of what an adapter meets
    base_cost = None if model is None else _base_cost(model)
    costs = tuple(_adapter_cost(adapter, model, base_cost, numbers) for adapter in adapters)
    together = None
    if base_cost and len(costs) > 1:
        together = _task_cost(base_cost, len(costs), sum(c.nbytes for c in costs), sum(c.trained for c in costs))
    choices: tuple[BaseChoice, ...] = ()
    if other_base is not None:
        if model is None:
            raise UsageError("another base needs a base to be compared with", hint="`base=` names it")
        from surgery.engine.two_bases.choice import base_choice

        choices = tuple(base_choice(adapter, model, other_base) for adapter in adapters)
    return SavingsReport(base_cost, costs, together, choices)


def _name(path: Path) -> str:
    return path.resolve().name


def _base_cost(model: Checkpoint) -> BaseCost:
    split = Split()
    for component in model.components.values():
        for leaf in leaves(module_graph(component)):
            split = split.plus(leaf.role, leaf.parameters)
    components = model.components.values()
    quantised = tuple(group for component in components for group in quantised_weights(component))
    unread = tuple(
        f"{component.unread.message}; its parameters are counted as codes"
        for component in components
        if component.unread
    )
    return BaseCost(model.path, _name(model.path), split.total, model.nbytes, split, quantised, unread)


def _adapter_cost(
    adapter: Adapter, model: Checkpoint | None, base: BaseCost | None, tasks: Sequence[int]
) -> AdapterCost:
    meeting = None if model is None else fit_report(adapter, model)
    entries = touched(adapter, meeting.roles if meeting else None)
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
        kind=adapter.kind_name,
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
