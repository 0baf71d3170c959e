# SPDX-License-Identifier: Apache-2.0
"""Convert one adapter: check it against its base, render it in the new format, write it and prove it.

The source is bound once, and its binding goes on to the proof.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.engine.adapter_card import with_card
from surgery.engine.adapter_output import WriteOptions, job_id, stored_as, write_adapter
from surgery.engine.convert_result import ConvertResult
from surgery.engine.input_checks import check_base_id, check_nothing_dropped
from surgery.engine.leaving_out import without_base_values
from surgery_formats.adapters.format import Coded, Entry, ForGraph, Format, InDialects, Rendering, reader_of
from surgery_formats.adapters.onnx_adapter.names import check_apart
from surgery_formats.binding.bind import Binding, bind
from surgery_formats.binding.sizes import check_complete, sized
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.canonical.consumption import check_consumed
from surgery_formats.containers.weight_files import is_weight_file
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.files.raw import File
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing, show
from surgery_formats.updates import is_refusing, is_replacing

__all__ = [
    "Conversion",
    "Errors",
    "bound_source",
    "coded_as",
    "conversion_id",
    "for_graph",
    "in_dialect",
    "left_beside",
    "plan_conversion",
    "prove_conversion",
    "tolerance_of",
    "write_conversion",
]

Errors = Callable[[Path], Mapping[str, float]]

TOLERANCE = 1e-6
"""Greatest error of a weight's delta relative to its greatest value: what float32 factors allow."""
_ROUNDING = {
    DType.F16: 2.0**-7,
    DType.BF16: 2.0**-4,
}  # 16 units in the last place: both factors are rounded, and products add up


@dataclass(frozen=True)
class Conversion:
    """A conversion that is planned and not yet written.

    Attributes:
        source: The adapter that was rendered.
        target: Its new format.
        rendering: What will be written.
        base: The base that names and shapes were taken from; None if none was given, or if it has other names than
            `source`.
        binding: Of `source` to `base`.
        dtype: Type of the stored matrices; None keeps them.
        left_out: What the format has no place for and the base has already; it is not in `source`.
    """

    source: Adapter
    target: Format
    rendering: Rendering
    base: Checkpoint | None
    binding: Binding | None
    dtype: DType | None
    left_out: tuple[Entry, ...] = ()


def coded_as(target: Format, factors: str | None) -> Format:
    """`target` with factors of the type `factors`, if one was named.

    Raises:
        FitError: it stores no codes, or none of this type.
    """
    if factors is None:
        return target
    if not isinstance(target, Coded):
        raise FitError(
            f"{target.name} stores factors as numbers, not as {show(factors, 40)} codes", hint='`to="compact"`'
        )
    return target.with_factors(factors)


def in_dialect(target: Format, dialect: str | None) -> Format:
    """`target` holding experts as `dialect` does, if one was named.

    Raises:
        FitError: it has one way only.
        NotFoundError: no such dialect.
    """
    if dialect is None:
        return target
    if not isinstance(target, InDialects):
        raise FitError(f"{target.name} holds experts in one way, not as {show(dialect, 40)}", hint='`to="peft"`')
    return target.with_dialect(dialect)


def for_graph(target: Format, graph: Path | None, dtype: DType | None) -> tuple[Format, DType | None]:
    """`target` written for the slots of `graph`, if one was named, and the type that it is then stored in.

    Raises:
        InputError: the graph cannot be read.
        FitError: it has no slots, they are of another type than `dtype`, or the format is for no graph.
    """
    if graph is None:
        return target, dtype
    if not isinstance(target, ForGraph):
        raise FitError(f"{target.name} is not for the inputs of a graph", hint='`to="onnx-adapter"`')
    made = target.for_graph(graph)
    element = made.element if isinstance(made, ForGraph) else None
    if dtype is not None and dtype is not element:
        label = "another type" if element is None else element.label
        raise FitError(f"the graph takes {label}, not {dtype.label}", file=graph, hint='`dtype="keep"`')
    return made, element


def left_beside(adapter: Adapter, target: Format, *, allow_loss: bool) -> tuple[Entry, ...]:
    """The weights beside an adapter (a value head, a head of AdapterHub's) that a format of one file has no place for.

    Raises:
        FitError: there are some, and nothing may be lost.
    """
    names = [name for name in sorted(adapter.files_beside) if is_weight_file(name)] if target.single_file else []
    if names and not allow_loss:
        named = listing([f"'{show(name)}'" for name in names])
        raise FitError(
            f"{target.name} is one file, and {named} beside the adapter holds weights too",
            file=adapter.path,
            hint="`allow_loss=True` leaves it out",
        )
    return tuple(Entry(name, "dropped", "it lies beside the adapter, and the format is one file") for name in names)


def bound_source(source: Adapter, base: Checkpoint | None) -> Binding | None:
    """The binding of an adapter to its base; None without a base, or without weights that it could be merged into.

    Raises:
        FitError: tensors that no update uses, or a base that the adapter was not made for.
    """
    check_consumed(source)
    if base is None or not source.updates:
        return None
    apart = source.unmergeable  # they cannot be bound, and are written as they are or dropped
    if apart and not source.updates.keys() - apart:
        return None
    binding = bind([(source.only(source.updates.keys() - apart) if apart else source, 1.0)], base)
    check_base_id(base, [source])
    return binding


def plan_conversion(
    source: Adapter,
    target: Format,
    base: Checkpoint | None,
    binding: Binding | None,
    *,
    dtype: DType | None = None,
    allow_loss: bool = False,
    as_loras: str = "",
    without_whole: str = "",
) -> Conversion:
    """Render an adapter that was checked.

    Args:
        source: The adapter.
        target: The format.
        base: The base that names and shapes come from, if there is one.
        binding: Of `source` to `base` (`bound_source`).
        dtype: Type of the stored matrices; None keeps them.
        allow_loss: Whether updates that the format cannot hold may be left out.
        as_loras: How the caller makes LoRAs of other kinds, for the hint where the format lacks those.
        without_whole: The same of what the caller does without parameters that are there whole.

    Raises:
        FitError: an update would be lost, nothing is left, or only a base would tell how its rows lie.
    """
    if base is None and source.format != target.name:
        check_complete(source)
        check_apart(source)
    source = source if base is None else sized(source, base)
    rows = _way_of_tokens(source, target)
    try:
        rendering = target.render(source, base)
    except FitError as error:
        error.hint = rows or error.hint
        raise
    left_out: tuple[Entry, ...] = ()
    if base is not None:
        source, left_out = without_base_values(source, rendering, base)
    if left_out:
        rendering, binding = target.render(source, base), bound_source(source, base)
    if not allow_loss:
        if base is not None:
            _refuse_what_no_weight_holds(source, rendering)
        hints = [rows] if rows else []
        hints += [as_loras] if as_loras and _other_kinds(source, rendering) else []
        hints += [without_whole] if without_whole and _whole_ones(source, rendering) else []
        hints += ["`allow_loss=True` leaves them out"] if rendering.tensors else []
        check_nothing_dropped(rendering, target.name, source.path, ", ".join(hints) or None, base=base)
    if not rendering.tensors:
        dropped = next((entry for entry in rendering.entries if entry.outcome == "dropped"), None)
        why = f": '{show(dropped.site)}' ({dropped.detail})" if dropped else ""
        raise FitError(f"{target.name} can hold nothing of this adapter{why}", file=source.path)
    written = reader_of(rendering, target), _rounded(stored_as(rendering, dtype), dtype)
    return Conversion(source, *written, base, binding, dtype, left_out)


def _rounded(rendering: Rendering, dtype: DType | None) -> Rendering:
    """`rendering`, whose entries say which factors have digits that `dtype` does not hold."""
    if dtype is None:
        return rendering
    lossy = {
        str(site)
        for site, chain in rendering.held.items()
        if any(tensor.dtype.is_float and not dtype.holds(tensor.dtype) for update in chain for tensor in update.tensors)
    }
    entries = tuple(
        replace(entry, outcome="rounded", detail=f"{entry.detail}, stored as {dtype.label}".removeprefix(", "))
        if entry.site in lossy and entry.outcome in ("exact", "folded")
        else entry
        for entry in rendering.entries
    )
    return replace(rendering, entries=entries)


def _way_of_tokens(source: Adapter, target: Format) -> str:
    """What a textual inversion is written as; empty for adapters of other kinds. A base would not help it."""
    if source.kind != "TEXTUAL_INVERSION":
        return ""
    parts = sorted({site.component for site in source.updates})
    if target.name == "learned-embeds" and len(parts) > 1:
        return f"choose one with `component=`: {listing(parts)}"
    return 'a textual inversion is written as `to="embedding"` or `to="learned-embeds"`'


def _refuse_what_no_weight_holds(source: Adapter, rendering: Rendering) -> None:
    """Where such an update was dropped: what it is says more than that a format lacks it."""
    dropped = {entry.site for entry in rendering.entries if entry.outcome == "dropped"}
    for site in sorted(source.unmergeable):
        for update in source.updates[site]:
            if str(site) in dropped and is_refusing(update):
                update.refuse()


def _other_kinds(source: Adapter, rendering: Rendering) -> bool:
    """Whether a change of a weight was dropped that a LoRA could hold, or come near to, and that is none."""
    dropped = {entry.site for entry in rendering.entries if entry.outcome == "dropped"}
    return any(
        not is_refusing(update)
        and update.effect != "sets"
        and update.low_rank() is None
        and site.path.endswith(".weight")
        for site, chain in source.updates.items()
        if str(site) in dropped
        for update in chain
    )


def _whole_ones(source: Adapter, rendering: Rendering) -> bool:
    """Whether a parameter was dropped whose new values the adapter has: a norm's, a bias's."""
    dropped = {entry.site for entry in rendering.entries if entry.outcome == "dropped"}
    return any(str(site) in dropped and any(map(is_replacing, chain)) for site, chain in source.updates.items())


def tolerance_of(dtype: DType | None) -> float:
    """Greatest error of a weight's delta relative to its greatest value, with factors stored as `dtype`."""
    return _ROUNDING.get(dtype, TOLERANCE) if dtype else TOLERANCE


def conversion_id(
    conversion: Conversion,
    source: Iterable[File | str],
    projections: str | None = None,
    also: Mapping[str, Any] | None = None,
) -> str:
    """Names a conversion by its options, `also` among them, and the content of its source: files, or their fingerprints."""
    facts = {"verb": "convert", "target": conversion.target.name, "projections": projections, **(also or {})}
    return job_id(facts, source, conversion.rendering)


def prove_conversion(
    path: Path, conversion: Conversion, result: ConvertResult, also: Errors | None = None
) -> ConvertResult:
    """Read back what was written at `path`, and return `result` with the errors that were found.

    Args:
        path: The written file or folder, before it has its final name.
        conversion: What was written.
        result: What is known before that.
        also: A second comparison; returns errors by weight.

    Raises:
        ProofError: it does something else.
    """
    from surgery.engine.proof import prove_rendering

    source, tolerance = conversion.source, tolerance_of(conversion.dtype)
    errors, near = prove_rendering(
        path, source, conversion.target, conversion.rendering, conversion.binding, tolerance, conversion.base
    )
    errors |= also(path) if also is not None else {}
    if conversion.base is not None:
        conversion.base.check_unchanged()
    entries = tuple(replace(e, error=_error(e, near)) if e.outcome == "approximated" else e for e in result.entries)
    return replace(result, entries=entries, errors=errors)


def _error(entry: Entry, near: Mapping[str, float]) -> float:
    """Of codes; of factors that stand for an update; at most their sum where codes stand for such factors."""
    return near[entry.site] if entry.error is None else entry.error + near.get(entry.site, 0.0)


def write_conversion(
    conversion: Conversion,
    options: WriteOptions,
    result: ConvertResult,
    *,
    projections: str | None = None,
    rank: str | None = None,
    also: Errors | None = None,
) -> ConvertResult:
    """Write a planned conversion and prove it.

    Args:
        conversion: What to write.
        options: Where and how.
        result: What is known before it is written.
        projections: Layout of the projections, where it was changed.
        rank: How directions were chosen, where updates of other kinds became LoRAs.
        also: As for `prove_conversion`.

    Raises:
        FitError: a value does not fit its type.
        ProofError: what was written does something else.
        OutputExistsError, ResourceError: see `surgery_formats.files`.
    """

    def prove(path: Path) -> dict[str, Any]:
        nonlocal result
        result = prove_conversion(path, conversion, result, also)
        return result.as_manifest()

    files = conversion.source.files
    if rank is not None and conversion.base is not None:  # what a change is may depend on the base's values
        files += tuple(shard.file for part in conversion.base.components.values() for shard in part.shards)
    job = conversion_id(conversion, files, projections, None if rank is None else {"rank": rank})
    output = write_adapter(_carded(conversion, result), conversion.target, job, prove, options)
    return replace(result, output=output)


def _carded(conversion: Conversion, result: ConvertResult) -> Rendering:
    outcomes = Counter(entry.outcome for entry in result.entries)
    measured = [("updates", ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items()))]
    source = (conversion.source, 1.0)
    target, codes = conversion.target, ""
    if isinstance(target, Coded):
        codes = f" ({target.coding.name})"
    done = f"in the place of {result.source}, as" if result.as_lora else f"converted from {result.source} to"
    what = f"{done} {target.name}{codes}"
    return with_card(conversion.rendering, conversion.target, [source], conversion.base, what, measured)
