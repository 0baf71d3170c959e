# SPDX-License-Identifier: Apache-2.0
"""The summary of a merge."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.engine.ledger import Ledger, Row
from surgery.engine.merge.merge_charts import merge_charts
from surgery.engine.merge.next_step import next_step
from surgery.engine.plan import Compute, Copy, Plan, PlannedTensor, is_coded
from surgery.engine.preview import Preview
from surgery.reports.output import DRY_RUN, PATH, counted
from surgery.reports.sections import Column, Facts, Note, Section, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.values import Cell, Name, NameList, Phrase, Value
from surgery_formats.files.remote.path import is_remote
from surgery_formats.linalg.survival import Survival
from surgery_formats.storage.quantised import is_coded as is_quantised
from surgery_formats.text import numbered

if TYPE_CHECKING:
    from surgery.engine.quantised.residual import ResidualLoRA

__all__ = ["merge_summary"]

_POOR = 0.9  # share of a module's update; those that keep less are worth a look
_HEARD, _LOST, _MUFFLED = 0.99, 0.75, 0.9
"""Of requantised codes: the correlation, in the inputs that an adapter listens to, of a good merge; the survival and the
correlation below which a merge is poor."""
_WORST = 5
_MEASURABLE = 100_000_000  # bytes; below, starting up takes most of the time
_FIRST = 10  # operations of a dry run, unless all are asked for


def merge_summary(
    ledger: Ledger,
    output: Path | None,
    ahead: Preview | None,
    seconds: float,
    warnings: tuple[str, ...],
    verbose: bool,
    *,
    rounding_nbytes: int = 0,
    residual: ResidualLoRA | None = None,
) -> Summary:
    """Inputs, outcomes, survival, and what stands out; of every tensor or operation if `verbose`."""
    facts = [*_inputs(ledger.plan), *_tensors(ledger), *_formats(ledger.plan)]
    if output is None:
        sections = [Facts((*facts, *_would_write(ledger.plan, ahead))), *_planned(ledger, verbose), DRY_RUN]
    else:
        facts += [*_kept(ledger), *_codes(ledger), ("wrote", _wrote(ledger.plan, output, seconds))]
        facts += _residual(residual)
        if rounding_nbytes:
            count = len(ledger.plan.facts["base"])
            base_nbytes = sum(file.size for file in ledger.plan.inputs[:count])
            part = Value(rounding_nbytes / max(base_nbytes, 1), "share"), " of the base's weights, for surgery unmerge"
            facts.append(("kept beside it", (Value(rounding_nbytes, "bytes"), ": ", *part)))
        following = Note(("next: ", *next_step(ledger.plan, output, residual)))
        sections = [Facts(tuple(facts)), *merge_charts(ledger), *_poor(ledger, verbose), following]
    notes = (Note(f"note: {text}") for text in ledger.plan.notes)
    return Summary("Merge", (*sections, *notes, *warning_notes(warnings)))


def _would_write(plan: Plan, preview: Preview | None) -> Iterator[tuple[str, Phrase]]:
    where = () if preview is None or preview.output is None else (Name(preview.output, PATH), ": ")
    yield "would write", (*where, *_files(plan))
    if preview is not None:
        if preview.beside_nbytes:
            yield "adapter/", ("at most ", Value(preview.beside_nbytes, "bytes"))
        free = preview.free_nbytes
        if preview.output is not None and not is_remote(preview.output):
            yield "free disk", "unknown" if free is None else Value(free, "bytes")
        yield "peak memory", ("about ", Value(preview.peak_nbytes, "bytes"))


def _wrote(plan: Plan, output: Path, seconds: float) -> Phrase:
    took: tuple[str | Value, ...] = (", in ", Value(seconds, "seconds")) if seconds else ()
    if seconds and plan.nbytes >= _MEASURABLE:
        took += " (", Value(plan.nbytes / seconds, "rate"), ")"
    return Name(output, PATH), ": ", *_files(plan), *took


def _inputs(plan: Plan) -> Iterator[tuple[str, Phrase]]:
    facts = plan.facts["adapters"]
    base, *adapters = plan.roots[: 1 + len(facts)]
    for path, fact in zip(adapters, facts, strict=True):
        kind = Name(f"{fact['format']} {fact['kind']}")
        yield "merge", (Name(path, PATH), " (", kind, f", weight {fact['weight']:g})")
    yield "into", Name(base, PATH)
    for what, taken in plan.facts.get("carried", {}).items():
        yield (
            what,
            (Name(taken["adapter"]), "'s, for which the base has none or another: ", NameList(tuple(taken["files"]))),
        )
    if trained := plan.facts.get("as_trained"):
        yield "as trained", trained["said"]


def _tensors(ledger: Ledger) -> list[tuple[str, Phrase]]:
    sizes = [(math.prod(tensor.step.sizes), tensor.outcome) for tensor in ledger.plan.weights]
    changed = sum(size for size, outcome in sizes if outcome in ("updated", "replaced", "added"))
    whole = Value(sum(size for size, _ in sizes), "count")
    used = numbered(ledger.adapter_tensors, "tensor")
    in_lora = f"; {ledger.plan.in_lora} of them in the LoRA beside the model" if ledger.plan.in_lora else ""
    facts: list[tuple[str, Phrase]] = [
        ("tensors", counted(ledger.classes)),
        ("adapter", f"{used} used, {len(ledger.plan.ignored)} without effect{in_lora}"),
        ("parameters", (Value(changed, "count"), " of ", whole, " lie in tensors that change")),
    ]
    if between := ledger.plan.between_nbytes:
        facts.append(("between them", (Value(between, "bytes"), " that are no tensor's, copied")))
    return facts


def _formats(plan: Plan) -> Iterator[tuple[str, Phrase]]:
    """Which quantised weights keep their format, and how much larger the others become."""
    if "rule" in plan.facts.get("as_trained", {}):
        return  # the codes are only thought of
    kept: Counter[str] = Counter()
    plain: dict[str, list[int]] = {}
    for tensor in plan.tensors:
        weight = tensor.step.weight if isinstance(tensor.step, Copy) else tensor.step.source
        if not is_quantised(weight) or tensor.part:
            continue
        if not is_coded(tensor.step):
            key = f"{weight.kind} to {tensor.dtype.label}"
            counts = plain.setdefault(key, [0, 0, 0])
            stored = sum(source.nbytes for source in weight.sources)
            for i, count in enumerate((1, stored, tensor.nbytes)):
                counts[i] += count
        else:
            kept[weight.kind] += 1
    for key, (number, before, after) in plain.items():
        yield (
            "dequantised",
            (f"{number} weights from {key}: ", Value(before, "bytes"), " become ", Value(after, "bytes")),
        )
    for kind, number in kept.items():
        yield "quantised", f"{number} weights stay {kind}"


def _codes(ledger: Ledger) -> Iterator[tuple[str, Phrase]]:
    """What became of the codes of requantised weights."""
    weights = ledger.requantised
    if not weights:
        return
    kept = Survival.total(measured.kept for _, measured, _ in weights)
    inside = Survival.total(change.inside for _, _, change in weights)
    moved = sum(change.moved for _, _, change in weights) / max(sum(change.codes for _, _, change in weights), 1)
    yield "codes", (Value(moved, "share"), f" moved in {len(weights)} weights; what is stored correlates ",
        Value(kept.correlation, "number", 3), " with the update, and is off by ", Value(kept.rounding, "share"), " of its norm",
    )  # fmt: skip
    if inside.update > 0:
        yield "", ("in the inputs that the adapter listens to it correlates ", Value(inside.correlation, "number", 3),
            ", and is off by ", Value(inside.rounding, "share"),
        )  # fmt: skip
    yield "verdict", _verdict(kept, inside)
    feedback = sum(change.rounding == "feedback" for _, _, change in weights)
    fresh = sum(change.scales == "fresh" for _, _, change in weights)
    yield (
        "rounding",
        f"with feedback in {feedback} weights, to nearest in {len(weights) - feedback}; fresh scales in {fresh}",
    )


def _verdict(kept: Survival, inside: Survival) -> Phrase:
    """What the codes hold, in a word; of what a text makes of it docs/quantised.md has examples, and `surgery eval` a measure."""
    heard = inside.correlation if inside.update > 0 else kept.correlation
    good = kept.survival >= _POOR and heard >= _HEARD
    fair = kept.survival >= _LOST and heard >= _MUFFLED
    word = "good" if good else "fair" if fair else "poor"
    rest = "" if good else "; 16 bits or --quantized residual keep the rest"
    held = Value(kept.survival, "share"), f" of the update{rest}; surgery eval measures what that is worth on a text"
    return f"{word} by the codes, which hold ", *held


def _residual(residual: ResidualLoRA | None) -> Iterator[tuple[str, Phrase]]:
    if residual is not None and not residual.weights:
        yield "adapter/", "none: the adapters change no quantised weight"
    elif residual is not None:
        moved = sum(weight.moved for weight in residual.weights)
        ranks = sorted({weight.rank for weight in residual.weights})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        yield "adapter/", (Value(residual.nbytes, "bytes"), f": {rank}; codes moved in {moved} of "
            f"{len(residual.weights)} weights; model and adapter are off by ", Value(residual.error, "share"), " of the update",
        )  # fmt: skip


def _kept(ledger: Ledger) -> Iterator[tuple[str, Phrase]]:
    if not math.isnan(ledger.survival):
        survives = Value(ledger.survival, "share"), " of the update survives in the stored type; rounding noise "
        yield "kept", (*survives, Value(ledger.rounding, "share"), " of its norm")


def _poor(ledger: Ledger, verbose: bool) -> list[Section]:
    """Tensors that keep little of their update; all of them if `verbose`."""
    poor = sorted((row for row in ledger.rows if _survival(row) < _POOR), key=_survival)
    every = [row for row in ledger.rows if not row.tensor.part]
    shown = sorted(every, key=_survival) if verbose else poor[:_WORST]
    if not shown:
        return []
    columns = (
        Column("tensor", "name"), Column("class"), Column("updates"), Column("survives", "share"),
        Column("rounding", "share"),
    )  # fmt: skip
    caption = "Weights, those that keep least of their update first"
    table = Table(columns, tuple((*_named(row), *_measured(row)) for row in shown), caption)
    return [
        table,
        *([Note(f"... and {more} more below {_POOR:.0%}", "omitted")] if (more := len(poor) - len(shown)) > 0 else []),
    ]


def _planned(ledger: Ledger, verbose: bool) -> list[Section]:
    """Files, and the first operations; all of them if `verbose`."""
    rows = []
    for file in ledger.plan.files:
        weights = [tensor for tensor in file.tensors if not tensor.part and tensor.outcome != "between"]
        computed = sum(isinstance(tensor.step, Compute) for tensor in weights)
        rows.append((file.name, file.nbytes, len(weights) - computed, computed))
    files = Column("file", "name"), Column("bytes", "bytes"), Column("copied", "integer"), Column("computed", "integer")
    sections: list[Section] = [Table(files, tuple(rows), "Files")]
    steps = [row for row in ledger.rows if row.tensor.outcome != "copied" and not row.tensor.part]
    shown = steps if verbose else steps[:_FIRST]
    if shown:
        columns = (
            Column("operation", "name"),
            Column("class"),
            Column("updates"),
            Column("shape", "shape"),
            Column("type"),
        )
        sections.append(Table(columns, tuple((*_named(row), *_stored(row.tensor)) for row in shown), "Operations"))
    if len(shown) < len(steps):
        sections.append(Note(f"... and {len(steps) - len(shown)} more operations", "omitted"))
    return sections


def _stored(tensor: PlannedTensor) -> tuple[Cell, ...]:
    """Shape and type; of codes those of the weight, whatever tensors it is stored in."""
    if is_coded(tensor.step) and isinstance(tensor.step, Compute):
        return tensor.step.sizes, tensor.step.source.kind
    return tensor.shape, tensor.dtype.label


def _files(plan: Plan) -> tuple[Value | str, ...]:
    plural = "s" if len(plan.files) != 1 else ""
    return Value(plan.nbytes, "bytes"), f" of weights in {len(plan.files)} file{plural}"


def _named(row: Row) -> tuple[Cell, ...]:
    label = row.tensor.weight_label if is_coded(row.tensor.step) else row.tensor.label
    return label, row.tensor.outcome, " + ".join(map(_update, row.as_json().get("updates", ())))


def _update(update: dict[str, Any]) -> str:
    rank = f" r{update['rank']}" if "rank" in update else ""
    scale = f" x{update['scale']:.4g}" if isinstance(update.get("scale"), float | int) else ""
    return f"{update['kind']}{rank}{scale}"


def _measured(row: Row) -> tuple[Cell, ...]:
    measured = row.measured
    return (None, None) if measured is None or not measured.update > 0 else (measured.survival, measured.rounding)


def _survival(row: Row) -> float:
    """The key to sort rows by survival; a tensor without an update survives in full."""
    return row.measured.survival if row.measured is not None and row.measured.update > 0 else math.inf
