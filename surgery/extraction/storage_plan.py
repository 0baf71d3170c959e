# SPDX-License-Identifier: Apache-2.0
"""Choose the form that every change takes in an adapter, so that the adapter does the same attached and merged in PEFT.

The forms were tried with PEFT 0.21: factors of a module; copies of modules (``modules_to_save``), which need every
tensor of the module; biases as absolute values (``bias="all"``); rows of an embedding; a resized embedding under its
plain name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Literal

from surgery.extraction.pairing import path_of
from surgery.extraction.stream.tally import PairMeasure
from surgery.extraction.targets import LowRankTarget, TunedParameter, tree_name
from surgery_formats.arrays import Array
from surgery_formats.errors import FitError, NothingChangedError
from surgery_formats.models.component import Component
from surgery_formats.models.parameter_order import is_order_known
from surgery_formats.storage.base import Storage
from surgery_formats.tensors.tensor import matrix_of

__all__ = [
    "MOST_ROWS",
    "DenseTensor",
    "StorageOptions",
    "StoragePlan",
    "Via",
    "dense_size",
    "plan_storage",
]

RESIZABLE = ("embed_tokens", "wte", "embed_in", "word_embeddings", "lm_head", "embed_out")
"""Modules whose whole weight PEFT (and every reader here) takes under its plain name: a vocabulary that was resized."""
MOST_ROWS = 1 << 16
"""Rows that can be listed in a configuration of at most 1 MB, which is what readers here accept."""
_TOO_MANY = f"more than {MOST_ROWS} rows of a tensor that several modules share changed"
Via = Literal["modules_to_save", "bias", "resized", "token rows"]


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """The user's choice of what is held, and how.

    Attributes:
        dense: One-dimensional changes to hold: ``norm``, ``bias``.
        embeddings: ``lora`` for factors, ``full`` for copies.
        matrices: The same, of all other matrices.
    """

    dense: tuple[str, ...] = ("norm", "bias")
    embeddings: str = "lora"
    matrices: str = "lora"


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A tensor of TUNED, or some of its rows, stored as it is.

    Attributes:
        path: Parameter path in the model's tree.
        weight: TUNED's weight.
        via: How an adapter holds it.
        name: Its name in the ledger; for a tied head, the embedding's.
        rows: Numbers of the stored rows; empty for all.
        shift: Addition to TUNED's values, for a bias that compensates the mean error of its module's factors.
    """

    path: str
    weight: Storage
    via: Via
    name: str
    rows: tuple[int, ...] = ()
    shift: Callable[[], Array] | None = None


@dataclass
class StoragePlan:
    """The form of everything that changed.

    Attributes:
        targets: Weights whose changes are held by factors.
        dense_tensors: Tensors stored as TUNED has them.
        saved_modules: Paths of modules that are copied.
        dropped: Why no form holds a tensor, by TUNED's name.
        why: Remarks for the ledger, by TUNED's name.
    """

    targets: list[LowRankTarget] = field(default_factory=list)
    dense_tensors: list[DenseTensor] = field(default_factory=list)
    saved_modules: set[str] = field(default_factory=set)
    dropped: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)


def plan_storage(
    parameters: tuple[TunedParameter, ...],
    targets: tuple[LowRankTarget, ...],
    measures: Mapping[str, PairMeasure],
    base: Component,
    tuned: Component,
    options: StorageOptions,
    ranks: Mapping[str, int],
) -> StoragePlan:
    """Choose the form of every change; `measures` are by TUNED's name, `ranks` by target path.

    Raises:
        NothingChangedError: TUNED is BASE.
        FitError: a vocabulary grew where PEFT takes no resized embedding.
    """
    if not any(measure.changed for measure in measures.values()):
        raise NothingChangedError(
            "TUNED has the weights of BASE: there is nothing to extract",
            file=tuned.folder,
            hint="the order is BASE TUNED",
        )
    plan = StoragePlan()
    done = _vocabulary(plan, parameters, targets, measures, base, tuned, options, ranks)
    rest = [parameter for parameter in parameters if parameter.pair.name not in done]
    _copies(plan, rest, measures, options)
    covered = {parameter.pair.name for parameter in rest if _inside(parameter.path, plan.saved_modules)} | done
    for target in targets:
        if covered.intersection(target.names) or not any(measures[name].changed for name in target.names):
            continue
        if options.matrices == "lora":
            plan.targets.append(target)
            continue
        for name in target.names:
            plan.dropped.setdefault(name, f"'{target.path}' is made of several tensors: no copy of a module holds them")
    _refuse_nests(plan)
    reasons = {target.path: why for target in plan.targets if (why := _not_attached(target, base))}
    _drop(plan, reasons)
    held = {name for target in targets for name in target.names}
    for parameter in rest:
        name = parameter.pair.name
        if parameter.form == "part" and name not in held and measures[name].changed:
            plan.dropped[name] = f"how transformers makes '{parameter.path}' of it is not known"
        if name in covered:
            plan.dense_tensors.append(DenseTensor(parameter.path, parameter.pair.tuned, "modules_to_save", name))
        elif measures[name].changed and parameter.path.endswith(".bias") and parameter.form in ("bias", "norm"):
            if parameter.form in options.dense:
                plan.dense_tensors.append(DenseTensor(parameter.path, parameter.pair.tuned, "bias", name))
            else:
                plan.dropped[name] = f"{parameter.form} changes were not asked for (--dense)"
    return plan


def _drop(plan: StoragePlan, reasons: Mapping[str, str]) -> None:
    """Drop targets, by path."""
    for target in plan.targets:
        if target.path in reasons:
            plan.dropped |= dict.fromkeys(target.names, reasons[target.path])
    plan.targets = [target for target in plan.targets if target.path not in reasons]


def _not_attached(target: LowRankTarget, base: Component) -> str:
    """Why PEFT would not attach factors of the target as a whole; empty if it does."""
    if base.config.get("model_type") == "diffusion_gemma" and target.path.startswith("model.decoder.layers."):
        return "the encoder has it too, and PEFT attaches factors to the decoder alone"
    if target.form == "experts" and base.names.misses_factors(target.path.rpartition(".")[0]):
        return "PEFT renames factors of these experts as if they had the names on disk, and then misses them"
    return ""


def _inside(path: str, modules: Set[str]) -> bool:
    """Whether the parameter or module `path` lies in one of `modules`."""
    return any(ancestor in modules for ancestor in _ancestors(path))


def _vocabulary(
    plan: StoragePlan,
    parameters: tuple[TunedParameter, ...],
    targets: tuple[LowRankTarget, ...],
    measures: Mapping[str, PairMeasure],
    base: Component,
    tuned: Component,
    options: StorageOptions,
    ranks: Mapping[str, int],
) -> set[str]:
    """Choose for embedding and head; returns the names of tensors that are done."""
    settled = set()
    for parameter in parameters:
        name = parameter.pair.name
        if not base.embedding and measures[name].changed and _may_be_tied(parameter, parameters, base):
            if measures[name].rows and not _masked(base):
                _shared_rows(plan, parameter, measures[name])
            else:
                plan.dropped[name] = "which modules share it is not known" if _masked(base) else _TOO_MANY
            settled.add(name)
    changed = [
        parameter
        for parameter in parameters
        if parameter.pair.name in (tuned.embedding, tuned.head) and measures[parameter.pair.name].changed
    ]
    if any(parameter.pair.grown > 0 for parameter in changed):
        return _resized(plan, changed)
    shared = [alias for alias, source in base.family.ties if source == base.embedding and alias in base.aliases]
    if changed and (shared or (base.tied and base.head)):
        return _tied(plan, parameters, measures, base, tuned, inseparable=bool(shared or base.family.inseparable))
    for parameter in changed:
        name = parameter.pair.name
        target = next((candidate for candidate in targets if name in candidate.names), None)
        rows = measures[name].rows
        full = matrix_of(parameter.pair.tuned.sizes)
        if (
            parameter.form == "embedding"
            and rows
            and target
            and (options.matrices == "full" or len(rows) * full[1] <= ranks[target.path] * target.cost)
        ):
            plan.dense_tensors.append(DenseTensor(parameter.path, parameter.pair.tuned, "token rows", name, rows))
            plan.why[name] = f"{len(rows)} of {full[0]} rows changed"
            settled.add(name)
        elif options.embeddings == "full":
            plan.saved_modules.add(parameter.module)
            plan.why[name] = "a full copy was asked for"
    return settled


def _masked(base: Component) -> bool:
    """Whether the model may be a masked language model, whose head has a bias."""
    return any("MaskedLM" in str(name) or "PreTraining" in str(name) for name in base.config.get("architectures") or ())


def _resized(plan: StoragePlan, changed: list[TunedParameter]) -> set[str]:
    for parameter in changed:
        last = parameter.module.rpartition(".")[2]
        if last not in RESIZABLE:
            raise FitError(
                f"its vocabulary grew by {parameter.pair.grown} rows, and PEFT takes no resized '{last}'",
                file=path_of(parameter.pair.tuned),
                tensor=parameter.pair.name,
            )
        plan.dense_tensors.append(DenseTensor(parameter.path, parameter.pair.tuned, "resized", parameter.pair.name))
        plan.why[parameter.pair.name] = (
            f"{parameter.pair.grown} new rows, stored whole: "
            f"resize the base's embedding to {parameter.pair.tuned.sizes[0]} before PEFT loads it"
        )
    return {parameter.pair.name for parameter in changed}


def _tied(
    plan: StoragePlan,
    parameters: tuple[TunedParameter, ...],
    measures: Mapping[str, PairMeasure],
    base: Component,
    tuned: Component,
    *,
    inseparable: bool,
) -> set[str]:
    """Choose how to hold the change of a tied head.

    A merge would add factors on both names twice; factors on one name would be missing in the other when attached.
    """
    by_name = {parameter.pair.name: parameter for parameter in parameters}
    embedding = by_name[tuned.embedding]
    own_head = by_name.get(tuned.head)
    measure = measures[tuned.embedding]
    parted = own_head is not None and not tuned.tied
    settled = {tuned.embedding, *([tuned.head] if own_head else [])}
    # PEFT's rows on a head leave its bias out while attached.
    biased = f"{base.head.removesuffix('weight')}bias" in {*base.tensors, *base.aliases}
    if biased:
        plan.dropped |= dict.fromkeys(
            settled, "it is tied to a head with a bias, for which PEFT has no form that is right attached and merged"
        )
        return settled
    if measure.rows and (inseparable or not parted):
        if parted:
            plan.dropped[tuned.head] = "TUNED parted it from the embedding, and in BASE they cannot part"
        _shared_rows(plan, embedding, measure)
        return settled
    if inseparable:
        plan.dropped |= dict.fromkeys(settled, _TOO_MANY)
        return settled
    head = own_head.pair.tuned if own_head else embedding.pair.tuned
    path = tree_name(base.head, base)
    for where, weight, name in ((embedding.path, embedding.pair.tuned, tuned.embedding), (path, head, tuned.head)):
        plan.saved_modules.add(where.rpartition(".")[0])
        plan.dense_tensors.append(DenseTensor(where, weight, "modules_to_save", name))
    plan.why[tuned.embedding] = "tied to the head: copies of both are the form in which PEFT attached and merged agree"
    return settled


def _shared_rows(plan: StoragePlan, parameter: TunedParameter, measure: PairMeasure) -> None:
    """Store rows: in PEFT they reach every module that shares the tensor, attached and merged, and keep the tie."""
    name = parameter.pair.name
    plan.dense_tensors.append(DenseTensor(parameter.path, parameter.pair.tuned, "token rows", name, measure.rows))
    plan.why[name] = (
        f"tied: {len(measure.rows)} of {parameter.pair.tuned.sizes[0]} rows as TUNED has them, "
        "the form in which PEFT attached and merged agree"
    )


def _may_be_tied(parameter: TunedParameter, parameters: Iterable[TunedParameter], base: Component) -> bool:
    """Whether this table may be shared with a head that is not stored, in a language model of an unknown family."""
    names = [str(name) for name in base.config.get("architectures") or ()]
    model = any(
        mark in name
        for name in names
        for mark in ("CausalLM", "LMHead", "MaskedLM", "ConditionalGeneration", "PreTraining")
    )
    if parameter.form != "embedding" or not model:
        return False
    vocabulary = parameter.pair.base.sizes[0] == base.config.get("vocab_size")
    stored = any(other.form == "linear" and other.pair.base.sizes == parameter.pair.base.sizes for other in parameters)
    return vocabulary and not stored and base.config.get("tie_word_embeddings") is not False


def _copies(
    plan: StoragePlan, rest: list[TunedParameter], measures: Mapping[str, PairMeasure], options: StorageOptions
) -> None:
    """Copy the modules that have a changed parameter without any other form."""
    modules = {module for parameter in rest for module in _ancestors(parameter.path)}
    layered, holders = _layered(modules), {module.rpartition(".")[0] for module in modules}
    apart = ("bias", "part") + (("linear", "conv", "embedding", "experts") if options.matrices == "lora" else ())
    for parameter in rest:
        if not measures[parameter.pair.name].changed or parameter.form in apart:
            continue
        only_bias = parameter.form == "norm" and parameter.path.endswith(".bias")
        if parameter.form == "norm" and "norm" not in options.dense:
            plan.dropped.setdefault(parameter.pair.name, "norm changes were not asked for (--dense)")
        elif only_bias:  # stored with the other biases
            continue
        elif not _can_be_copied(parameter.module, layered, holders):
            plan.dropped[parameter.pair.name] = "it belongs to no module that PEFT could store in full"
        else:
            plan.saved_modules.add(parameter.module)
            if parameter.form == "whole":
                plan.why[parameter.pair.name] = "no LoRA of PEFT acts here: a copy of its module does"
    # PEFT copies every module whose path ends as a listed one, and asks the file for all of them.
    listed = plan.saved_modules & modules
    plan.saved_modules |= {module for module in modules if any(module[at:] in listed for at in range(len(module)))}
    plan.saved_modules = {module for module in plan.saved_modules if not _inside(module, plan.saved_modules)}
    for parameter in rest:
        if _inside(parameter.path, plan.saved_modules):
            plan.dropped.pop(parameter.pair.name, None)


def _ancestors(path: str) -> list[str]:
    segments = path.split(".")[:-1]
    return [".".join(segments[: depth + 1]) for depth in range(len(segments))]


def _layered(modules: Set[str]) -> set[str]:
    """Those of `modules` that have numbered ones within."""
    numbered = (module for module in modules if module.rpartition(".")[2].isdigit())
    return {ancestor for module in numbered for ancestor in _ancestors(module)}


def _can_be_copied(module: str, layered: Set[str], holders: Set[str]) -> bool:
    """Whether `module` is a part of a layer or of the model, not a whole layer or the whole model.

    What has a number and holds other modules is a layer; what holds none is a step of a Sequential.
    """
    layer = module.rpartition(".")[2].isdigit() and module in holders
    return bool(module) and not layer and module not in layered


def _refuse_nests(plan: StoragePlan) -> None:
    """Drop several 3-D parameters of one module unless their order is known: PEFT wraps them around each other."""
    by_module: dict[str, list[LowRankTarget]] = {}
    for target in plan.targets:
        if target.form == "experts" or not target.path.endswith(".weight"):
            by_module.setdefault(target.path.rpartition(".")[0], []).append(target)
    nests = {
        target.path: f"which parameter of '{module}' PEFT wraps first is not known"
        for module, targets in by_module.items()
        if not is_order_known([target.path.rpartition(".")[2] for target in targets])
        for target in targets
    }
    _drop(plan, nests)


def dense_size(dense: DenseTensor) -> tuple[int, int]:
    """``(numbers, bytes)`` of what is stored."""
    columns, numel = matrix_of(dense.weight.sizes)[1], math.prod(dense.weight.sizes)
    numbers = len(dense.rows) * columns if dense.rows else numel
    return numbers, dense.weight.dtype.nbytes(numbers)
