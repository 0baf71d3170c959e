# SPDX-License-Identifier: Apache-2.0
"""What ``surgery merge`` tells people."""

from __future__ import annotations

import math
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery_cli._tables import note, pairs, table
from surgery_cli.options import Settings
from surgery_formats.text import count, nbytes, show

if TYPE_CHECKING:
    from surgery.engine.ledger import Ledger, Row
    from surgery.engine.plan import Plan
    from surgery.verbs.merge import MergeResult

__all__ = ["obstacles", "plan_text", "result_text"]

_POOR = 0.9  # share of a module's update; those that keep less are worth a look
_WORST = 5
_MEASURABLE = 100_000_000  # bytes; below, starting up takes most of the time
_FIRST = 10  # operations of a dry run; all of them with -v


def result_text(result: MergeResult, seconds: float, settings: Settings) -> None:
    """The summary of a merge."""
    ledger, plan = result.ledger, result.ledger.plan
    rows = [*_inputs(plan), *_classes(ledger)]
    if not math.isnan(ledger.survival):
        noise = f"rounding noise {ledger.rounding:.2%} of its norm"
        rows.append(("kept", f"{ledger.survival:.2%} of the update survives in the stored type; {noise}"))
    speed = f" ({nbytes(plan.nbytes / seconds)}/s)" if plan.nbytes >= _MEASURABLE else ""
    rows.append(("wrote", f"{show(result.output, 500)}: {_files(plan)}, in {seconds:.2f} s{speed}"))
    pairs(rows)
    poor = sorted((row for row in ledger.rows if _survival(row) < _POOR), key=_survival)
    if poor or settings.verbose:
        shown = sorted(ledger.rows, key=_survival) if settings.verbose else poor[:_WORST]
        click.echo()
        table(("tensor", "class", "updates", "survives", "rounding"), map(_measured, shown), right=(3, 4))
        if not settings.verbose and len(poor) > _WORST:
            note(f"... and {len(poor) - _WORST} more below {_POOR:.0%}; -v shows all")
    note(f"next: {_next_step(plan, result.output)}")


def plan_text(result: MergeResult, output: Path | None, workers: int | None, settings: Settings) -> None:
    """What a merge would do."""
    ledger, plan = result.ledger, result.ledger.plan
    where = "" if output is None else f"{show(output, 500)}: "
    rows = [*_inputs(plan), *_classes(ledger), ("would write", f"{where}{_files(plan)}")]
    if output is not None:
        free = _free(output)
        rows.append(("free disk", "unknown" if free is None else nbytes(free)))
    rows.append(("peak memory", f"about {nbytes(_peak(plan, workers))}"))
    pairs(rows)
    click.echo()
    table(
        ("file", "bytes", "copied", "computed"),
        ((file.name, nbytes(file.nbytes), len(file.tensors) - (made := _computed(file)), made) for file in plan.files),
        right=(1, 2, 3),
    )
    steps = [row for row in ledger.rows if row.tensor.outcome != "copied"]
    shown = steps if settings.verbose else steps[:_FIRST]
    if shown:
        click.echo()
        table(
            ("operation", "class", "updates", "shape", "type"),
            ((*_named(row), "x".join(map(str, row.tensor.shape)), row.tensor.dtype.label) for row in shown),
        )
    if len(shown) < len(steps):
        note(f"... and {len(steps) - len(shown)} more operations; -v shows all")
    note("dry run: nothing was written")


def obstacles(plan: Plan, output: Path | None, *, overwrite: bool) -> list[str]:
    """What would stop the merge that a dry run stands for, as far as can be seen before."""
    if output is None:
        return []
    found = []
    free = _free(output)
    if free is None:
        found.append(f"there is no folder {show(output.absolute().parent, 500)} to write into")
    elif free < plan.nbytes:
        found.append(f"{nbytes(plan.nbytes)} will not fit into {nbytes(free)} of free disk")
    if os.path.lexists(output) and not overwrite:
        found.append(f"{show(output, 500)} is already there; the merge needs another name, or --overwrite")
    if any(os.path.realpath(output) == os.path.realpath(root) for root in plan.roots):
        found.append(f"{show(output, 500)} is one of the inputs; the merge needs a folder outside them")
    return found


def _inputs(plan: Plan) -> list[tuple[str, str]]:
    base, *adapters = plan.roots
    facts: list[dict[str, Any]] = list(plan.facts["adapters"])  # type: ignore[call-overload]
    rows = [
        ("merge", f"{show(path, 500)} ({show(fact['format'])} {show(fact['kind'])}, weight {fact['weight']:g})")
        for path, fact in zip(adapters, facts, strict=True)
    ]
    return [*rows, ("into", show(base, 500))]


def _classes(ledger: Ledger) -> list[tuple[str, str]]:
    tensors = ledger.plan.tensors
    changed = sum(math.prod(t.shape) for t in tensors if t.outcome in ("updated", "replaced", "added"))
    every = sum(math.prod(t.shape) for t in tensors)
    return [
        ("tensors", ", ".join(f"{number} {kind}" for kind, number in ledger.classes.items())),
        ("adapter", f"{ledger.adapter_tensors} tensors used, {len(ledger.plan.ignored)} without effect"),
        ("parameters", f"{count(changed)} of {count(every)} lie in tensors that change"),
    ]


def _files(plan: Plan) -> str:
    number = len(plan.files)
    return f"{nbytes(plan.nbytes)} of weights in {number} file{'s' if number != 1 else ''}"


def _computed(file: Any) -> int:
    from surgery.engine.plan import Compute

    return sum(isinstance(tensor.step, Compute) for tensor in file.tensors)


def _named(row: Row) -> tuple[str, str, str]:
    updates = row.as_json().get("updates", ())
    return row.tensor.label, row.tensor.outcome, " + ".join(_update(update) for update in updates)


def _update(update: dict[str, Any]) -> str:
    rank = f" r{update['rank']}" if "rank" in update else ""
    scale = f" x{update['scale']:.4g}" if isinstance(update.get("scale"), float | int) else ""
    return f"{update['kind']}{rank}{scale}"


def _measured(row: Row) -> tuple[str, ...]:
    found = row.measured
    if found is None or not found.update > 0:
        return (*_named(row), "", "")
    return (*_named(row), f"{found.survival:.2%}", f"{found.rounding:.2%}")


def _survival(row: Row) -> float:
    """For sorting: what has no update keeps all of it."""
    return row.measured.survival if row.measured is not None and row.measured.update > 0 else math.inf


def _free(output: Path) -> int | None:
    try:
        return shutil.disk_usage(output.absolute().parent).free
    except OSError:
        return None  # no such folder


def _peak(plan: Plan, workers: int | None) -> int:
    """Bytes: what this process, with torch loaded, took so far, and the largest tensors that are computed at one time."""
    from surgery.engine.arithmetic import block_bytes
    from surgery.engine.execute import default_workers
    from surgery.engine.plan import Compute

    blocks = sorted((block_bytes(t.step) for t in plan.computed() if isinstance(t.step, Compute)), reverse=True)
    return _resident() + sum(blocks[: workers or default_workers()])


def _resident() -> int:
    if sys.platform == "win32":
        return 300_000_000  # torch and its libraries, as measured elsewhere
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _next_step(plan: Plan, output: Path | None) -> str:
    where = show(output, 500)
    names = {side.name for side in plan.side_files}
    if "model_index.json" in names:
        return f'load it with diffusers: DiffusionPipeline.from_pretrained("{where}")'
    if "config.json" in names:
        configs: dict[str, Any] = dict(plan.facts["configs"])  # type: ignore[call-overload]
        architectures = str(configs.get("", {}).get("architectures"))
        causal = "ForCausalLM" in architectures or "LMHeadModel" in architectures
        return (
            f'load it with transformers: {"AutoModelForCausalLM" if causal else "AutoModel"}.from_pretrained("{where}")'
        )
    return f"look at it: surgery inspect {where}"
