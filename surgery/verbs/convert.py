# SPDX-License-Identifier: Apache-2.0
"""Convert: an adapter in another format, proved to do the same to every weight."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.algebra.change_svd import HERE
from surgery.consumers.consent import Consent, SavedChoice, check_greatest_rank
from surgery.engine.adapter_output import WriteOptions, check_adapter_output
from surgery.engine.chosen_part import chosen_part, left_out
from surgery.engine.conversion import (
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
from surgery.engine.input_checks import float_type
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
from surgery.reports.output import PATH
from surgery.reports.result import timed
from surgery.reports.values import Name
from surgery_formats.adapters.format import Coded, what_to_tell
from surgery_formats.adapters.lost_strings import lost_strings
from surgery_formats.adapters.registry import format_to_write
from surgery_formats.containers.safetensors import SAFETENSORS
from surgery_formats.errors import FitError, UsageError

if TYPE_CHECKING:
    from surgery.algebra.change_svd import SVDs
    from surgery.algebra.convert_request import ConvertRequest
    from surgery.algebra.lora_form import LoraForm
    from surgery.engine.shares.work import EngineLike
    from surgery.onnx.recover.result import RecoveryResult
    from surgery_formats.canonical.adapter import Adapter
    from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["ConvertResult", "convert"]


@timed
def convert(
    adapter: AdapterLike,
    to: str | None = None,
    *,
    output: StrPath | None = None,
    base: CheckpointLike | None = None,
    graph: StrPath | None = None,
    component: str | None = None,
    without: str | Sequence[str] = (),
    projections: str | None = None,
    dialect: str | None = None,
    dtype: str = "keep",
    factors: str | None = None,
    as_lora: bool = False,
    rank: int | Rank | None = None,
    consumer: str | None = None,
    saved: SavedChoice | None = None,
    max_rank: int | None = None,
    merge_rest: StrPath | None = None,
    allow_loss: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    engine: EngineLike | None = None,
    progress: Callback | None = None,
) -> ConvertResult | RecoveryResult:
    """Write an adapter in another format and prove it.

    Args:
        adapter: File or folder of any known format, or an opened Adapter. To ``safetensors``: an ONNX graph, whose weights
            are written under its own names, or, told by their values, under those of `base`.
        to: Name of a format; not needed with `consumer`.
        output: File (kohya) or folder to make. Its parent must exist.
        base: The model it was trained on; needed where a format's names or shapes come from it, and checked where
            given.
        graph: For ``onnx-adapter``, the ``.onnx`` file that will take it: names, shapes and types are those of its
            inputs, whoever made it.
        component: The part of a pipeline to convert, or the part an adapter without parts belongs to.
        without: Patterns of modules to leave out, as `combine` takes them, such as those that the base lacks.
        projections: ``split`` (``qkv_proj`` and ``gate_up_proj`` as their parts) or ``fused``; by default they stay as
            they are. Where only the base knows how high the parts are it is needed; it may have either.
        dialect: How to hold experts, for ``peft``: ``peft``, ``peft-0.18``, ``unsloth``, ``unsloth-grouped``, ``tinker``,
            ``sglang``, ``vllm``, ``unsloth-linears`` or ``per-expert`` (docs/peft.md); by default as near as possible
            to how the adapter has them.
        dtype: ``keep`` (each tensor its own; float32 where a scale had to be multiplied in), ``fp32``, ``fp16``,
            ``bf16``.
        factors: ``int8`` or ``int4``, for a format that stores factors as codes (``compact``).
        as_lora: Write LoRAs whatever the updates' kinds: exactly where their changes are of low rank, else as near as
            `rank` allows; the base is needed where a change depends on it.
        rank: With `as_lora`: greatest rank of a weight, or ``Rank.energy(.99)``, ``Rank.error(.05)``, or several joined
            by ``&``; by default nothing may be lost.
        consumer: The program that will load it, as in ``vllm`` or ``sglang@0.5.23``: the adapter is written so that it
            honours all of it (`surgery.check`), and the base is needed.
        saved: With `consumer`, what becomes of modules trained in full that it cannot hold: ``lora`` of their difference
            to the base, or ``drop``.
        max_rank: With `consumer`, the greatest rank that it was started with; by default its own default.
        merge_rest: With `consumer`, folder or file to make: a copy of the base, into which is merged what the program
            cannot honour in the adapter. The two belong together.
        allow_loss: Write what the format can hold although it cannot hold all.
        overwrite: Replace an existing output, atomically.
        dry_run: Say what would become of every update, write nothing.
        engine: With `as_lora`, where the SVDs of changes are worked out that are formed in full: None or ``local`` is this
            process, ``ray`` and ``ray:HOST:PORT`` a cluster (docs/scale-out.md). Never changes the result.
        progress: Called with every step.

    Raises:
        UsageError: an argument of a wrong type, or no output.
        InputError: adapter or base cannot be read.
        FitError: the adapter does not fit the base, something would be dropped, or a value does not fit the type.
        ProofError: what was written does something else.
        OutputExistsError, ResourceError: see `surgery_formats.files`.
    """
    stored = float_type(dtype)
    request = _request(engine, adapter, base, rank, component, without, as_lora=as_lora, dry_run=dry_run)
    if consumer is not None:
        if as_lora or any(one is not None for one in (to, projections, factors, dialect, graph)):
            raise FitError(
                "a program decides about format, projections and kinds itself", hint="name either a format or a program"
            )
        if base is None:
            raise FitError("the rules of a program look at the base too", hint="give it with `base=`")
        check_greatest_rank(max_rank)
        kept, out = left_out(as_adapter(adapter), without)
        return _for_consumer(
            kept,
            as_checkpoint(base),
            consumer,
            Consent(saved, allow_loss, merge_rest is not None, None if rank is None else Rank.of(rank), max_rank),
            merge_rest,
            output=output_path(output, dry_run=dry_run),
            component=component,
            left_out=out,
            dtype=stored,
            overwrite=overwrite,
            progress=progress,
        )
    if to is None:
        raise UsageError("a format is named, as in 'peft', not NoneType", hint="or a program is, such as vllm")
    if saved is not None or max_rank is not None or merge_rest is not None:
        raise FitError("what a program takes is asked of a program", hint="name the program")
    if to == SAFETENSORS.name:
        others = {
            "component": component, "without": without, "projections": projections, "dialect": dialect, "factors": factors,
            "as_lora": as_lora, "rank": rank, "graph": graph,
        }  # fmt: skip
        if given := [name for name, value in others.items() if value]:
            raise UsageError(f"{given[0]} is for adapters, and safetensors are made of a graph")
        if not isinstance(adapter, str | os.PathLike):
            raise UsageError("a graph is named by its path")
        from surgery.verbs.convert_graph import convert_graph

        return convert_graph(
            as_path(adapter, "adapter"),
            None if base is None else as_checkpoint(base),
            output=output_path(output, dry_run=dry_run),
            dtype=stored,
            allow_loss=allow_loss,
            overwrite=overwrite,
            progress=progress,
        )
    where = None if graph is None else as_path(graph, "graph")
    target, stored = for_graph(in_dialect(coded_as(format_to_write(to), factors), dialect), where, stored)
    if stored is not None and isinstance(target, Coded):
        raise FitError(f"{to} stores factors as codes, and the rest as it is", hint="`factors=` chooses the codes")
    if rank is not None and not as_lora:
        raise FitError("a rank is chosen for LoRAs made of other kinds", hint="`as_lora=True`, or resize the adapter")
    if as_lora and projections is not None:
        raise FitError("LoRAs are made of the weights as they are named", hint="convert with `projections=` afterwards")
    destination = output_path(output, dry_run=dry_run)
    opened = as_adapter(adapter)
    checkpoint = None if base is None else as_checkpoint(base)
    original, left = chosen_part(opened, checkpoint, component, without)
    inputs = (original.path, *(() if checkpoint is None else (checkpoint.path,)))
    if destination is not None and as_lora:  # SVDs take long
        check_adapter_output(target, destination, inputs, overwrite=overwrite)
    svds: AbstractContextManager[SVDs] = contextlib.nullcontext(HERE)
    if request is not None:
        run = Run(overwrite=overwrite, progress=progress)
        svds = _in_shares(engine, request, original, checkpoint, destination, run)
    with svds as svd_source:
        source, named = original, checkpoint
        also: Errors | None = None
        form: LoraForm | None = None
        if as_lora:
            from surgery.algebra.lora_form import lora_form, prove_lora_form

            bound_source(original, checkpoint)
            form = lora_form(original, checkpoint, target, None if rank is None else Rank.of(rank), svds=svd_source)
            source, also = form.adapter, partial(prove_lora_form, form=form)
        if projections is not None:
            from surgery.algebra.projections import change_layout, prove_layout

            if isinstance(target, Coded):  # the proof puts the parts together again, and codes are not what they were
                raise FitError(
                    f"{to} keeps names as they are", hint="convert with `projections=` to peft first, then to compact"
                )
            change = change_layout(original, projections, target, checkpoint)
            source = change.adapter
            if change.held:  # the base has the old names, and none of the new ones
                bound_source(original, checkpoint)
                named = None
        left = (*left, *left_beside(original, target, allow_loss=allow_loss))
        binding = bound_source(source, named)
        remedy = "`as_lora=True` makes LoRAs of other kinds"
        plan = plan_conversion(source, target, named, binding, dtype=stored, allow_loss=allow_loss, as_loras=remedy)
        if projections is not None:
            also = partial(
                prove_layout, original=original, target=plan.target, change=change, tolerance=tolerance_of(stored)
            )
        entries = (*plan.rendering.entries, *plan.left_out, *left)
        if form is not None:
            entries = form.restated(entries)
        result = ConvertResult(
            None,
            original.format,
            target.name,
            entries,
            {},
            (*original.known_issues(), *what_to_tell(plan.rendering, target), *lost_strings(source, plan.rendering)),
            original.path,
            as_lora,
        )
        if destination is None:
            return result
        result = replace(
            result, following=attaching(target, destination, plan.rendering.tensor_file, source, checkpoint)
        )
        options = WriteOptions(
            destination,
            inputs,
            original.files_beside,
            overwrite,
            progress,
        )
        chosen = repr(rank) if as_lora else None
        return write_conversion(plan, options, result, projections=projections, rank=chosen, also=also)


def _request(
    engine: EngineLike | None,
    adapter: AdapterLike,
    base: CheckpointLike | None,
    rank: int | Rank | None,
    component: str | None,
    without: str | Sequence[str],
    *,
    as_lora: bool,
    dry_run: bool,
) -> ConvertRequest | None:
    """What a cluster is asked for; None where this process does all of it."""
    if engine is None or engine == "local":
        return None
    if not as_lora or dry_run:
        raise UsageError(
            "what a conversion computes are LoRAs of other kinds, and nothing else is shared out",
            hint="leave out `engine=`" if dry_run else "`as_lora=True`, or leave out `engine=`",
        )
    from surgery.algebra.convert_request import ConvertRequest
    from surgery.engine.shares.work import portable

    return ConvertRequest(
        portable(adapter, "adapter"),
        None if base is None else portable(base, "base"),
        rank,
        component,
        tuple(as_list(without)),
    )


@contextlib.contextmanager
def _in_shares(
    engine: EngineLike | None,
    request: ConvertRequest,
    adapter: Adapter,
    base: Checkpoint | None,
    output: Path | None,
    run: Run,
) -> Iterator[SVDs]:
    """SVDs that a cluster has worked out."""
    from surgery.algebra.convert_request import ConvertWork
    from surgery.engine.shares.choice import cluster_of

    cluster = cluster_of(engine)
    work = ConvertWork.of(adapter, base, None if request.rank is None else Rank.of(request.rank))
    if cluster is None or output is None or not work.tasks:
        yield HERE
        return
    with cluster.shares(request, work, output, run) as folders:
        yield work.solved(folders)


def _for_consumer(
    adapter: Adapter,
    base: Checkpoint,
    consumer: str,
    consent: Consent,
    merge_rest: StrPath | None,
    *,
    output: Path | None,
    overwrite: bool,
    progress: Callback | None,
    **options: Any,
) -> ConvertResult:
    """Write an adapter so that a program honours all of it."""
    from surgery.consumers.fix import write_for
    from surgery.consumers.registry import asked_version, consumer_named
    from surgery.verbs.rest import rest_merger, rest_name

    program, version = consumer_named(consumer)
    if output is not None and output.suffix == ".gguf" and program.format != "gguf":
        raise UsageError(
            f"a folder is written for {program.title}, of which a GGUF is made",
            file=output,
            hint='`to="gguf"` instead of `consumer=` writes a GGUF itself, of what it can hold as it is',
        )
    merger = None
    if merge_rest is not None and output is not None:
        merger = rest_merger(base, merge_rest, overwrite, progress)
    result = write_for(
        adapter,
        base,
        program,
        asked_version(version),
        consent,
        output=output,
        overwrite=overwrite,
        progress=progress,
        merge_rest=merger,
        rest_name=rest_name(merge_rest),
        **options,
    )
    if program.name != "llama.cpp" or output is None:
        return result
    command = "make a GGUF of it: surgery convert ", Name(output, PATH), " --to gguf --base ", Name(base.path, PATH)
    return replace(result, following=(*command, " -o adapter.gguf"))
