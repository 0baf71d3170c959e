# SPDX-License-Identifier: Apache-2.0
"""Convert an adapter to another format of adapters, as it is, as LoRAs, or under the names of other projections."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.algebra.change_svd import HERE
from surgery.engine.adapter_output import WriteOptions, check_adapter_output
from surgery.engine.chosen_part import chosen_part
from surgery.engine.conversion import (
    Conversion,
    Errors,
    bound_source,
    coded_as,
    for_graph,
    in_dialect,
    left_beside,
    plan_conversion,
    tolerance_of,
    write_conversion,
)
from surgery.engine.convert_result import ConvertResult
from surgery.engine.execute import Run
from surgery.engine.inputs import (
    AdapterLike,
    CheckpointLike,
    StrPath,
    as_adapter,
    as_checkpoint,
    as_list,
    as_path,
    output_path,
)
from surgery.engine.loaders import attaching
from surgery.progress import Callback
from surgery.rank import Rank
from surgery_formats.adapters.format import Coded, Entry, Format, what_to_tell
from surgery_formats.adapters.lost_strings import lost_strings
from surgery_formats.adapters.registry import format_to_write
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, UsageError

if TYPE_CHECKING:
    from surgery.algebra.change_svd import SVDs
    from surgery.algebra.convert_request import ConvertRequest
    from surgery.algebra.lora_form import LoraForm
    from surgery.algebra.projections import LayoutChange
    from surgery.engine.shares.work import EngineLike
    from surgery_formats.canonical.adapter import Adapter
    from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["Asked", "convert_adapter", "svds_asked"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What `surgery.convert` was given, in its words, but for the format and the program that is written for.

    The type is parsed; None keeps that of every tensor.
    """

    adapter: AdapterLike
    output: StrPath | None
    base: CheckpointLike | None
    graph: StrPath | None
    component: str | None
    without: str | Sequence[str]
    projections: str | None
    dialect: str | None
    dtype: DType | None
    factors: str | None
    as_lora: bool
    rank: int | Rank | None
    allow_loss: bool
    overwrite: bool
    dry_run: bool
    engine: EngineLike | None
    progress: Callback | None

    @property
    def destination(self) -> Path | None:
        """Where to write; None for a dry run.

        Raises:
            UsageError: nowhere, and it is no dry run.
        """
        return output_path(self.output, dry_run=self.dry_run)

    @property
    def opened_base(self) -> Checkpoint | None:
        """The base, opened anew; None without one.

        Raises:
            InputError, FitError: see `as_checkpoint`.
        """
        return None if self.base is None else as_checkpoint(self.base)

    @property
    def most_rank(self) -> Rank | None:
        """How ranks are found; None where none was given."""
        return None if self.rank is None else Rank.of(self.rank)


def convert_adapter(asked: Asked, to: str, request: ConvertRequest | None) -> ConvertResult:
    """Write an adapter in the format `to` and prove it. See `surgery.convert`.

    Args:
        asked: What to convert, and how.
        to: Name of the format.
        request: What a cluster is asked for (`svds_asked`).

    Raises:
        FitError, InputError, UsageError, OutputExistsError, ResourceError, ProofError: see `surgery.convert`.
    """
    target, dtype = _target(asked, to)
    destination = asked.destination
    opened, base = as_adapter(asked.adapter), asked.opened_base
    original, left = chosen_part(opened, base, asked.component, asked.without)
    inputs = (original.path, *(() if base is None else (base.path,)))
    if destination is not None and asked.as_lora:  # SVDs take long
        check_adapter_output(target, destination, inputs, overwrite=asked.overwrite)
    with _svds(asked, request, original, base, destination) as svds:
        source = _source(asked, original, base, target, svds)
        left = (*left, *left_beside(original, target, allow_loss=asked.allow_loss))
        binding = bound_source(source.adapter, source.base)
        plan = plan_conversion(
            source.adapter, target, source.base, binding,
            dtype=dtype, allow_loss=asked.allow_loss, as_loras="`as_lora=True` makes LoRAs of other kinds",
        )  # fmt: skip
        result = ConvertResult(
            None,
            original.format,
            target.name,
            source.restated((*plan.rendering.entries, *plan.left_out, *left)),
            {},
            (
                *original.known_issues(),
                *what_to_tell(plan.rendering, target),
                *lost_strings(source.adapter, plan.rendering),
            ),
            original.path,
            asked.as_lora,
        )
        if destination is None:
            return result
        following = attaching(target, destination, plan.rendering.tensor_file, source.adapter, base)
        return write_conversion(
            plan,
            WriteOptions(destination, inputs, original.files_beside, asked.overwrite, asked.progress),
            replace(result, following=following),
            projections=asked.projections,
            rank=repr(asked.rank) if asked.as_lora else None,
            also=source.also(plan),
        )


def _target(asked: Asked, to: str) -> tuple[Format, DType | None]:
    """The format with its options, and the type that it is stored in; refuses options that contradict each other."""
    graph = None if asked.graph is None else as_path(asked.graph, "graph")
    target = in_dialect(coded_as(format_to_write(to), asked.factors), asked.dialect)
    target, dtype = for_graph(target, graph, asked.dtype)
    if dtype is not None and isinstance(target, Coded):
        raise FitError(f"{to} stores factors as codes, and the rest as it is", hint="`factors=` chooses the codes")
    if asked.rank is not None and not asked.as_lora:
        raise FitError("a rank is chosen for LoRAs made of other kinds", hint="`as_lora=True`, or resize the adapter")
    if asked.as_lora and asked.projections is not None:
        raise FitError("LoRAs are made of the weights as they are named", hint="convert with `projections=` afterwards")
    return target, dtype


@dataclass(frozen=True, slots=True)
class _Source:
    """What the writer gets of an adapter.

    Attributes:
        original: The adapter.
        adapter: The same in the form that was asked for.
        base: The base, where it has the names of `adapter`; None without one.
        form: How it became LoRAs; None if it did not.
        change: How its projections changed; None if they did not.
    """

    original: Adapter
    adapter: Adapter
    base: Checkpoint | None
    form: LoraForm | None = None
    change: LayoutChange | None = None

    def restated(self, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        """The writer's entries, of `original`."""
        return entries if self.form is None else self.form.restated(entries)

    def also(self, plan: Conversion) -> Errors | None:
        """The comparison of what is written with `original`, where that with `adapter` does not say it; or None."""
        if self.form is not None:
            from surgery.algebra.lora_form import prove_lora_form

            return partial(prove_lora_form, form=self.form)
        if self.change is not None:
            from surgery.algebra.projections import prove_layout

            tolerance = tolerance_of(plan.dtype)
            return partial(
                prove_layout, original=self.original, target=plan.target, change=self.change, tolerance=tolerance
            )
        return None


def _source(asked: Asked, original: Adapter, base: Checkpoint | None, target: Format, svds: SVDs) -> _Source:
    if asked.as_lora:
        from surgery.algebra.lora_form import lora_form

        bound_source(original, base)
        form = lora_form(original, base, target, asked.most_rank, svds=svds)
        return _Source(original, form.adapter, base, form=form)
    if asked.projections is None:
        return _Source(original, original, base)
    from surgery.algebra.projections import change_layout

    if isinstance(target, Coded):  # the proof puts the parts together again, and codes are not what they were
        raise FitError(
            f"{target.name} keeps names as they are", hint="convert with `projections=` to peft first, then to compact"
        )
    change = change_layout(original, asked.projections, target, base)
    if change.held:  # the base has the old names, and none of the new ones
        bound_source(original, base)
    return _Source(original, change.adapter, None if change.held else base, change=change)


def svds_asked(asked: Asked) -> ConvertRequest | None:
    """What a cluster is asked for; None where this process does all of it.

    Raises:
        UsageError: there is nothing that a cluster could do, or an input that was opened.
    """
    if asked.engine is None or asked.engine == "local":
        return None
    if not asked.as_lora or asked.dry_run:
        raise UsageError(
            "what a conversion computes are LoRAs of other kinds, and nothing else is shared out",
            hint="leave out `engine=`" if asked.dry_run else "`as_lora=True`, or leave out `engine=`",
        )
    from surgery.algebra.convert_request import ConvertRequest
    from surgery.engine.shares.work import portable

    return ConvertRequest(
        portable(asked.adapter, "adapter"),
        None if asked.base is None else portable(asked.base, "base"),
        asked.rank,
        asked.component,
        tuple(as_list(asked.without)),
    )


@contextlib.contextmanager
def _svds(
    asked: Asked, request: ConvertRequest | None, adapter: Adapter, base: Checkpoint | None, output: Path | None
) -> Iterator[SVDs]:
    """Where SVDs come from: this process, or a cluster that has worked them out."""
    if request is None:
        yield HERE
        return
    from surgery.algebra.convert_request import ConvertWork
    from surgery.engine.shares.choice import cluster_of

    cluster = cluster_of(asked.engine)
    work = ConvertWork.of(adapter, base, asked.most_rank)
    if cluster is None or output is None or not work.tasks:
        yield HERE
        return
    run = Run(overwrite=asked.overwrite, progress=asked.progress)
    with cluster.shares(request, work, output, run) as folders:
        yield work.solved(folders)
