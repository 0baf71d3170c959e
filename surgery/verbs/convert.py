# SPDX-License-Identifier: Apache-2.0
"""Convert: an adapter in another format, proved to do the same to every weight."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.consumers.consent import Consent, SavedChoice, check_greatest_rank
from surgery.engine.chosen_part import left_out
from surgery.engine.convert_result import ConvertResult
from surgery.engine.input_checks import float_type
from surgery.engine.inputs import AdapterLike, CheckpointLike, StrPath, as_adapter, as_checkpoint, as_path
from surgery.progress import Callback
from surgery.rank import Rank
from surgery.reports.output import PATH
from surgery.reports.result import timed
from surgery.reports.values import Name
from surgery.verbs.convert_adapter import Asked, convert_adapter, svds_asked
from surgery_formats.containers.safetensors import SAFETENSORS
from surgery_formats.errors import FitError, UsageError

if TYPE_CHECKING:
    from surgery.engine.shares.work import EngineLike
    from surgery.onnx.recover.result import RecoveryResult

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
    asked = Asked(
        adapter, output, base, graph, component, without, projections, dialect, float_type(dtype), factors, as_lora,
        rank, allow_loss, overwrite, dry_run, engine, progress,
    )  # fmt: skip
    request = svds_asked(asked)
    if consumer is not None:
        if as_lora or any(option is not None for option in (to, projections, factors, dialect, graph)):
            raise FitError(
                "a program decides about format, projections and kinds itself", hint="name either a format or a program"
            )
        return _for_consumer(asked, consumer, saved, max_rank, merge_rest)
    if to is None:
        raise UsageError("a format is named, as in 'peft', not NoneType", hint="or a program is, such as vllm")
    if saved is not None or max_rank is not None or merge_rest is not None:
        raise FitError("what a program takes is asked of a program", hint="name the program")
    if to == SAFETENSORS.name:
        return _of_graph(asked)
    return convert_adapter(asked, to, request)


def _of_graph(asked: Asked) -> RecoveryResult:
    """Write the weights of a graph; refuses what only adapters have."""
    others = {
        "component": asked.component, "without": asked.without, "projections": asked.projections,
        "dialect": asked.dialect, "factors": asked.factors, "as_lora": asked.as_lora, "rank": asked.rank,
        "graph": asked.graph,
    }  # fmt: skip
    if given := [name for name, value in others.items() if value]:
        raise UsageError(f"{given[0]} is for adapters, and safetensors are made of a graph")
    if not isinstance(asked.adapter, str | os.PathLike):
        raise UsageError("a graph is named by its path")
    from surgery.verbs.convert_graph import convert_graph

    return convert_graph(
        as_path(asked.adapter, "adapter"),
        asked.opened_base,
        output=asked.destination,
        dtype=asked.dtype,
        allow_loss=asked.allow_loss,
        overwrite=asked.overwrite,
        progress=asked.progress,
    )


def _for_consumer(
    asked: Asked, consumer: str, saved: SavedChoice | None, max_rank: int | None, merge_rest: StrPath | None
) -> ConvertResult:
    """Write an adapter so that a program honours all of it."""
    if asked.base is None:
        raise FitError("the rules of a program look at the base too", hint="give it with `base=`")
    check_greatest_rank(max_rank)
    adapter, out = left_out(as_adapter(asked.adapter), asked.without)
    base = as_checkpoint(asked.base)
    consent = Consent(saved, asked.allow_loss, merge_rest is not None, asked.most_rank, max_rank)
    output = asked.destination
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
        merger = rest_merger(base, merge_rest, asked.overwrite, asked.progress)
    result = write_for(
        adapter,
        base,
        program,
        asked_version(version),
        consent,
        output=output,
        component=asked.component,
        left_out=out,
        dtype=asked.dtype,
        overwrite=asked.overwrite,
        progress=asked.progress,
        merge_rest=merger,
        rest_name=rest_name(merge_rest),
    )
    if program.name != "llama.cpp" or output is None:
        return result
    command = "make a GGUF of it: surgery convert ", Name(output, PATH), " --to gguf --base ", Name(base.path, PATH)
    return replace(result, following=(*command, " -o adapter.gguf"))
