# SPDX-License-Identifier: Apache-2.0
"""The plan of a merge, with the weights that a graph reads as codes: one file, straight from the checkpoint's orientation.

A weight is merged, then coded, block by block; nothing of 16 bits is written in between. Weights that graphs read as one lie
side by side: their codes, their scales, their zero points.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.engine.layout import planned_file
from surgery.engine.merge.merge_plan import plan_merge
from surgery.engine.packing import PAGE, expert_groups, packing_groups, packing_order
from surgery.engine.plan import Account, Compute, Copy, Plan, PlannedTensor, TensorOutcome, check_conservation
from surgery.onnx.export.code_inputs import importance_of, inputs_of
from surgery.onnx.export.merged import MergedWeights, with_biases, written_config
from surgery.onnx.export.weight_coding import WeightCoding, WeightUses, uses_of
from surgery.onnx.export.weight_options import OWN
from surgery.onnx.graph.coded import GraphCodes
from surgery.onnx.graph.weights import GraphTensor
from surgery_formats.binding.bind import Binding
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.component import Component
from surgery_formats.models.families.parameters import model_of, parameters
from surgery_formats.models.families.recipe import Model, Projection
from surgery_formats.storage.base import Storage
from surgery_formats.storage.block_format import BlockFormat
from surgery_formats.storage.float8_codes import Float8Codes, fitting_block, is_of_graphs
from surgery_formats.storage.nbits import NBits
from surgery_formats.storage.own_codes import fitting_format
from surgery_formats.storage.plain import Elements
from surgery_formats.storage.quantised import is_quantised
from surgery_formats.storage.turned_elements import TurnedElements
from surgery_formats.tensors.unwritten import UnwrittenFile, UnwrittenTensor
from surgery_formats.text import count as counted

__all__ = ["QUANTISED", "TRANSPOSED", "coded_weights"]

QUANTISED = "quantised.safetensors"
"""File name of all weights of a graph of codes."""
TRANSPOSED = "transposed.safetensors"
"""File name of all weights of a graph of MatMul."""


def coded_weights(binding: Binding, coding: WeightCoding, task: str, io: DType) -> MergedWeights:
    """Plan the weights of a graph of codes.

    Args:
        binding: Adapters bound to their base, a single model; none, if the base alone is coded.
        coding: How weights become codes.
        task: Of the graph; empty for the configuration's.
        io: Type of the graph.

    Raises:
        FitError: a weight that cannot be coded as asked, a calibration of another model, or what a merge refuses.
    """
    base = binding.checkpoint.main
    merged = plan_merge(binding, packed=True)
    side_files = tuple(side for side in merged.side_files if side.name != base.index_name)
    component = base.with_config(written_config(base, side_files))
    names = frozenset(component.parameters) | {tensor.weight for tensor in merged.tensors}
    model = with_biases(model_of(component.config, names, task), names)
    coding.check(component)
    groups = packing_groups(component)
    stacks = expert_groups(component) if coding.stacked else {}
    if coding.budget is not None:
        coding = _within_budget(merged, base, model, coding, io, groups)
    drafts = {draft.name: draft for draft in _drafts(merged, base, model, coding, io)}
    ordered = _ordered(drafts, groups, stacks)
    file = planned_file(TRANSPOSED if coding.matmul else QUANTISED, ordered, alignment=PAGE)
    written = {tensor.name for tensor in file.tensors}
    accounts = [account for account in merged.accounts if account.tensor.name not in written]
    accounted = {account.tensor.name for account in accounts}
    accounts += [
        Account(tensor, "source", f"its values are in {weight.name}")
        if weight.name in drafts
        else Account(tensor, "dropped", "the graph does not read it")
        for name, tensor in base.tensors.items()
        if name not in written and name not in accounted
        for weight in (base.owners[name],)
    ]
    facts = {**merged.facts, "coding": coding.facts}
    # which weights a graph reads is decided by its task as well
    placed_at = [[tensor.label, tensor.dtype.label, tensor.shape, tensor.offset] for tensor in file.tensors]
    plan = replace(
        merged,
        verb="export-onnx",
        files=(file,),
        side_files=(),
        accounts=tuple(accounts),
        inputs=merged.inputs + (coding.calibration.files if coding.calibration is not None else ()),
        warnings=binding.warnings + _rounded_again(drafts, base),
        facts=facts,
        id=hashlib.sha256(
            json.dumps(
                [merged.id, coding.facts, io.label, sorted(coding.chosen.items()), *stacks, placed_at], sort_keys=True
            ).encode()
        ).hexdigest(),
    )
    check_conservation(binding, plan)
    unwritten = UnwrittenFile(Path(file.name), file.nbytes, file.header)
    placed = {tensor.name: tensor for tensor in file.tensors}
    kept = [placed[tensor.name] for draft in drafts.values() for tensor in draft.kept]
    overrides: dict[str, GraphTensor] = {
        t.name: UnwrittenTensor(t.name, t.dtype, t.shape, unwritten, t.offset, t.nbytes) for t in kept
    }
    coded = {d.name: d.coded_tensor(placed, unwritten) for d in drafts.values() if d.form is not None}
    return MergedWeights(plan, component, overrides, side_files, model, coded, coding.matmul)


@dataclass(frozen=True)
class _Draft:
    """One weight of the output: kept, coded, or (a table that a coded head shares) both.

    Attributes:
        name: Stored name.
        kept: Its tensors as they are, if it is kept.
        codes: Its tensors of codes, if it is coded.
        form: How it is coded, or None.
        dtype: Type of its values in the checkpoint.
        rows: Whether rows of it are looked up by their codes.
    """

    name: str
    kept: tuple[PlannedTensor, ...] = ()
    codes: tuple[PlannedTensor, ...] = ()
    form: BlockFormat | None = None
    dtype: DType = DType.F32
    rows: bool = False

    def coded_tensor(self, placed: Mapping[str, PlannedTensor], file: UnwrittenFile) -> GraphCodes:
        """Where the graph finds it."""
        step = self.codes[0].step
        assert isinstance(step, Compute)
        target = step.target
        assert is_of_graphs(target)
        assert self.form is not None
        parts = [placed[part.name] for part in self.codes]
        found = tuple(UnwrittenTensor(t.name, t.dtype, t.shape, file, t.offset, t.nbytes) for t in parts)
        return GraphCodes(self.name, target.outputs, self.dtype, self.form, found, self.rows)


def _drafts(merged: Plan, component: Component, model: Model, coding: WeightCoding, io: DType) -> Iterator[_Draft]:
    uses = uses_of(model)
    weights: dict[str, list[PlannedTensor]] = {}
    for tensor in merged.tensors:
        weights.setdefault(tensor.weight, []).append(tensor)
    needed = {_stored(component, name, weights): name for name in parameters(model)}
    for name, tensors in weights.items():
        recipe = needed.get(name)
        if recipe is None:
            continue  # a graph reads what its recipe names
        if coding.matmul:
            yield _turned_draft(name, recipe, tensors, uses, io)
            continue
        kind, rows, kept = _asked(recipe, uses, coding)
        if not kind:
            yield _Draft(name, kept=tuple(tensors))
            continue
        form = coding.form(kind, io)
        projection = uses.linear.get(recipe)
        step, form = _coded_step(tensors[0].step, name, component, coding, form, projection, io is DType.F32)
        if rows and not form.floats and step.target.shape[1] % form.block:
            if coding.embeddings not in ("auto", "keep"):
                raise FitError(
                    f"its rows of {step.target.shape[1]} values are no whole blocks of {form.block}", tensor=name
                )
            rows, kept = False, True
        yield _Draft(
            name,
            tuple(tensors) if kept else (),
            _tensors(name, component, step, tensors[0].outcome),
            form,
            _values_type(tensors[0]),
            rows,
        )


def _turned_draft(name: str, recipe: str, tensors: Sequence[PlannedTensor], uses: WeightUses, io: DType) -> _Draft:
    """A linear map ``(in, out)``, or another weight as it lies; both in the graph's type, without a Cast in between."""
    first = tensors[0]
    step = first.step
    operations = step.operations if isinstance(step, Compute) else ()
    source: Storage = step.source if isinstance(step, Compute) else step.weight
    projection = uses.every.get(recipe)
    turned = projection is not None and not projection.transposed
    kept = [] if turned and recipe != uses.table else [*tensors]
    if kept and first.dtype is not io and first.dtype.is_float:
        kept = _rewritten(first, Compute(source, operations, Elements(source.sizes, source.shape, io)))
    turning = Compute(source, operations, TurnedElements(source.sizes, io)) if turned else None
    return _Draft(name, tuple(kept + (_rewritten(first, turning) if turning else [])))


def _rewritten(first: PlannedTensor, step: Compute) -> list[PlannedTensor]:
    outcome: TensorOutcome = "cast" if first.outcome == "copied" else first.outcome
    return [
        PlannedTensor(part.name, first.component, first.weight, part.dtype, part.shape, step, outcome, 0, part.nbytes)
        for part in step.target.parts(first.weight)
    ]


def _within_budget(
    merged: Plan,
    component: Component,
    model: Model,
    coding: WeightCoding,
    io: DType,
    groups: Mapping[str, Sequence[str]],
) -> WeightCoding:
    """The coding with bits chosen for every weight that nothing else is said of.

    Raises:
        FitError: the budget is too small.
    """
    from surgery.onnx.export.bit_budget import BudgetedWeight, allocated, choices_of

    uses = uses_of(model)
    free = set(uses.linear) | ({uses.head} if uses.head and coding.head == "auto" else set())
    drafts = {draft.name: draft for draft in _drafts(merged, component, model, coding, io)}
    file = planned_file(QUANTISED, _ordered(drafts, groups, {}), alignment=PAGE)
    fixed = PAGE + file.nbytes - sum(tensor.nbytes for tensor in file.tensors)
    candidates = []
    for draft in drafts.values():
        recipe = next((name for name in free if _stored(component, name, drafts) == draft.name), None)
        step = draft.codes[0].step if draft.codes else None
        own = isinstance(step, Compute) and isinstance(step.target, NBits) and step.target.exact is not None
        fixed += sum(tensor.nbytes for tensor in draft.kept)
        if recipe is None or own or not isinstance(step, Compute):
            fixed += sum(tensor.nbytes for tensor in draft.codes)
            continue
        assert isinstance(step.target, NBits)
        unit = groups.get(draft.name, (draft.name,))[0]
        target = step.target
        candidates.append(BudgetedWeight(recipe, draft.name, step.source, target.turned, unit, target.count))
    assert coding.budget is not None
    return replace(coding, chosen=allocated(choices_of(candidates, coding, io), coding.budget, fixed))


def _asked(name: str, uses: WeightUses, coding: WeightCoding) -> tuple[str, bool, bool]:
    """The type of a weight, or nothing, whether its rows are looked up as codes, and whether it is kept as well or alone."""
    if name == uses.table:
        table = coding.table_kind(uses)
        head = coding.head_kind(uses) if uses.tied else ""
        if uses.tied and table and table != head:
            raise FitError(
                "the token table is the head, and has one type",
                tensor=name,
                hint="the same for `embeddings=` and `head=`, or keep one of them",
            )
        return table or head, bool(table), not table
    if name == uses.head:
        return coding.head_kind(uses), False, False
    return (coding.kind_of(name) if name in uses.linear else ""), False, False


def _coded_step(
    step: Copy | Compute,
    name: str,
    component: Component,
    coding: WeightCoding,
    form: BlockFormat,
    projection: Projection | None,
    wide: bool,
) -> tuple[Compute, BlockFormat]:
    """The weight's step with codes as its target, and how these are stored; a table has no projection."""
    by_input = projection is not None and projection.transposed
    count = projection.stack[1] if projection is not None and projection.stack is not None else 1
    operations = step.operations if isinstance(step, Compute) else ()
    source: Storage = step.source if isinstance(step, Compute) else step.weight
    stored = component.parameters[name].storage if name in component.parameters else None
    if not operations and stored is not None and is_quantised(stored):
        turned = by_input != stored.transposed
        if form.floats and (block := fitting_block(stored, turned=turned)) is not None:
            form = replace(form, block=block)
            return Compute(stored, (), Float8Codes(stored.shape, form, turned, exact=stored, count=count)), form
        own = None if form.floats else fitting_format(stored, form, turned=turned, wide=wide)
        if own is not None:
            return Compute(stored, (), NBits(stored.shape, own, turned, exact=stored, count=count)), own
    # what becomes elements is read as the model has it, however it is stored (`surgery.engine.layout`)
    if form.floats:
        return Compute(source, operations, Float8Codes(source.shape, form, by_input, count=count)), form
    target = NBits(source.shape, form, by_input, count=count)
    if count > 1:
        return Compute(source, operations, target), form  # experts hear other inputs each, and no calibration has them
    drafted = Compute(source, operations, target)
    target = replace(
        target,
        inputs=inputs_of(drafted, name, coding),
        importance=importance_of(name, coding),
    )
    return Compute(source, operations, target), form


def _tensors(name: str, component: Component, step: Compute, outcome: TensorOutcome) -> tuple[PlannedTensor, ...]:
    target = step.target
    assert is_of_graphs(target)
    said = target.form.said
    said += OWN if target.exact is not None else ""
    become: TensorOutcome = outcome if step.operations or outcome in ("added", "replaced") else "quantised"
    return tuple(
        PlannedTensor(
            part.name, component.name, name, part.dtype, part.shape, step, become, 0, part.nbytes, said, number
        )
        for number, part in enumerate(target.parts(name))
    )


def _values_type(tensor: PlannedTensor) -> DType:
    """Type of a weight's values: of a merged one the type that it would be stored in."""
    step = tensor.step
    return step.weight.dtype if isinstance(step, Copy) else step.target.dtype


def _ordered(
    drafts: Mapping[str, _Draft], groups: Mapping[str, Sequence[str]], stacks: Mapping[str, Sequence[str]]
) -> list[PlannedTensor]:
    """Codes of all members of a group, their scales, their zero points; then what is kept, as any packed file has it.

    All of a stack are a group, where they are coded alike.
    """
    taken: dict[str, None] = {}
    ordered: list[PlannedTensor] = []
    for name, draft in drafts.items():
        if draft.form is None or name in taken:
            continue
        wanted = [stacks.get(name, ()), groups.get(name, ()), (name,)]
        members = next(group for group in wanted if group and all(_alike(drafts.get(one), draft) for one in group))
        taken |= dict.fromkeys(members)
        for part in range(len(draft.codes)):
            ordered += [drafts[member].codes[part] for member in members]
    kept = [tensor for draft in drafts.values() for tensor in draft.kept]
    return ordered + packing_order(kept, {name: tuple(group) for name, group in groups.items()})


def _alike(one: _Draft | None, other: _Draft) -> bool:
    return one is not None and one.form == other.form


def _stored(component: Component, name: str, written: Collection[str]) -> str:
    """The name of a recipe's weight among those `written`; a head that adapters part from the table has one of its own."""
    if name in component.parameters or name in written:
        return name
    slices = component.names.resolve(name)
    return slices[0].parameter.name if len(slices) == 1 else name


def _rounded_again(drafts: Mapping[str, _Draft], component: Component) -> tuple[str, ...]:
    """Say which formats of a quantised base no codes of a graph can hold."""
    kinds: dict[str, int] = {}
    for name, draft in drafts.items():
        parameter = component.parameters.get(name) if draft.form is not None else None
        step = draft.codes[0].step if draft.codes else None
        if parameter is None or not is_quantised(parameter.storage) or not isinstance(step, Compute):
            continue
        if not step.operations and is_of_graphs(step.target) and step.target.exact is None:
            kinds[parameter.storage.kind] = kinds.get(parameter.storage.kind, 0) + 1
    return tuple(
        f"{counted(number)} weights of {kind} are rounded a second time: their numbers are on no grid of these codes"
        for kind, number in sorted(kinds.items())
    )
