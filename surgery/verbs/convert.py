# SPDX-License-Identifier: Apache-2.0
"""Convert: an adapter in another format, proved to do the same to every weight."""

from __future__ import annotations

from functools import partial

from surgery.engine.adapter_output import WriteOptions
from surgery.engine.conversion import (
    bound_source,
    coded_as,
    placed,
    plan_conversion,
    tolerance_of,
    write_conversion,
)
from surgery.engine.convert_result import ConvertResult
from surgery.engine.input_checks import float_type
from surgery.engine.inputs import AdapterLike, CheckpointLike, StrPath, as_adapter, as_checkpoint, output_path
from surgery.progress import Callback
from surgery.reports.result import timed
from surgery_formats.adapters.format import Coded
from surgery_formats.adapters.registry import format_named
from surgery_formats.errors import FitError

__all__ = ["ConvertResult", "convert"]


@timed
def convert(
    adapter: AdapterLike,
    to: str,
    *,
    output: StrPath | None = None,
    base: CheckpointLike | None = None,
    component: str | None = None,
    projections: str | None = None,
    dtype: str = "keep",
    factors: str | None = None,
    allow_loss: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> ConvertResult:
    """Write an adapter in another format and prove it.

    Args:
        adapter: File or folder of any known format, or an opened Adapter.
        to: Name of a format.
        output: File (kohya) or folder to make. Its parent must exist.
        base: The model it was trained on; needed where a format's names or shapes come from it, and checked where
            given.
        component: The part of a pipeline to convert, or the part an adapter without parts belongs to.
        projections: ``split`` (``qkv_proj`` and ``gate_up_proj`` as their parts) or ``fused``; by default they stay as
            they are. Where only the base knows how high the parts are it is needed; it may have either.
        dtype: ``keep`` (each tensor its own; float32 where a scale had to be multiplied in), ``fp32``, ``fp16``,
            ``bf16``.
        factors: ``int8`` or ``int4``, for a format that stores factors as codes (``compact``).
        allow_loss: Write what the format can hold although it cannot hold all.
        overwrite: Replace an existing output, atomically.
        dry_run: Say what would become of every update, write nothing.
        progress: Called with every step.

    Raises:
        UsageError: an argument of a wrong type, or no output.
        InputError: adapter or base cannot be read.
        FitError: the adapter does not fit the base, something would be dropped, or a value does not fit the type.
        ProofError: what was written does something else.
        OutputExistsError, ResourceError: see `surgery_formats.files`.
    """
    target = coded_as(format_named(to), factors)
    stored = float_type(dtype)
    if stored is not None and isinstance(target, Coded):
        raise FitError(f"{to} stores factors as codes, and the rest as it is", hint="`factors=` chooses the codes")
    destination = output_path(output, dry_run=dry_run)
    original = as_adapter(adapter)
    checkpoint = None if base is None else as_checkpoint(base)
    original, left, known = placed(original, checkpoint, component)
    source, named, also = original, checkpoint, None
    if projections is not None:
        from surgery.algebra.projections import change_layout, prove_layout

        if isinstance(target, Coded):  # the proof puts the parts together again, and codes are not what they were
            raise FitError(
                f"{to} keeps names as they are", hint="convert with `projections=` to peft first, then to compact"
            )
        change = change_layout(original, projections, target, checkpoint)
        also = partial(prove_layout, original=original, target=target, change=change, tolerance=tolerance_of(stored))
        source = change.adapter
        if change.held:  # the base has the old names, and none of the new ones
            bound_source(original, checkpoint, known)
            named = None
    binding = bound_source(source, named, known)
    plan = plan_conversion(source, target, named, binding, dtype=stored, allow_loss=allow_loss)
    entries = (*plan.rendering.entries, *left)
    result = ConvertResult(None, original.format, target.name, entries, {}, original.known_issues(), original.path)
    if destination is None:
        return result
    options = WriteOptions(
        destination,
        (original.path, *(() if checkpoint is None else (checkpoint.path,))),
        original.files_beside,
        overwrite,
        progress,
    )
    return write_conversion(plan, options, result, projections=projections, also=also)
