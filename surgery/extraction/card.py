# SPDX-License-Identifier: Apache-2.0
"""The model card of an extraction: what it was made of, and what it leaves of the change."""

from __future__ import annotations

import math
from collections.abc import Iterator

from surgery.engine.card import card, measured_table, model_name
from surgery.engine.card_metadata import card_metadata
from surgery.extraction.extraction_plan import ExtractionPlan
from surgery.extraction.figures import layers_of
from surgery.extraction.recovery import Recovery
from surgery.extraction.recovery_table import recovery_rows
from surgery.extraction.result import ExtractResult
from surgery.reports.markdown_table import table_lines
from surgery_formats.models.base_name import hub_name
from surgery_formats.text import count, markdown, markdown_code, nbytes, numbered, show

__all__ = ["extraction_card"]


def extraction_card(plan: ExtractionPlan, result: ExtractResult, library: str, *, before_codes: bool) -> bytes:
    """README.md of an extraction.

    Args:
        plan: What is extracted.
        result: What is known before it is written.
        library: What loads it, as the hub calls it.
        before_codes: Whether `result` is of factors that are stored as codes then.
    """
    base, tuned = plan.checkpoints.base, plan.checkpoints.tuned
    kind = "DoRA" if result.kind is not None and result.kind.kind == "dora" else "LoRA"
    head = card_metadata(
        base.path, hub_name(base), relation="adapter", library=library, task=plan.adapter.task, tags=(kind.lower(),)
    )
    factored = [row for row in result.rows if row.form]
    rows = [
        (
            markdown_code(show(one.pattern)),
            one.ranks,
            count(sum(row.parameters for row in one.rows)),
            f"{one.residual:.2%}",
        )
        for one in layers_of(factored)
    ]
    tables = [measured_table(_figures(result))]
    tables += [] if result.recovery is None else [list(_recovery(result.recovery))]
    tables.append(table_lines(("layers", "rank", "parameters", "of the change missing"), rows, right=(1, 2, 3)))
    title = f"{model_name(tuned)} as a {kind} of {model_name(base)}"
    notes = ["The figures are of the factors before they became codes."] if before_codes else []
    return card(head, title, *tables, notes=notes, warnings=result.warnings, made="Extracted")


def _recovery(recovery: Recovery) -> Iterator[str]:
    models = "base", "base with this adapter", "fine-tune"
    rows = [
        (name, f"{bits:.4f}", "" if share is None else f"{share:.1%}", f"{divergence:.3g}", f"{same:.1%}")
        for name, bits, share, divergence, same in recovery_rows(recovery, models)
    ]
    titles = "model", "bits per byte", "of the gain", "KL from the fine-tune", "same top token"
    yield from table_lines(titles, rows, right=(1, 2, 3, 4))
    yield ""
    size = f"{numbered(recovery.tokens, 'token')} ({numbered(recovery.text_bytes, 'byte')}"
    yield f"Measured on {size}, sha256 {recovery.text_digest[:16]}), the adapter attached in fp32."


def _figures(result: ExtractResult) -> Iterator[tuple[str, str]]:
    yield "of the change of the weights, missing (Frobenius norm, over all tensors)", f"{result.residual:.2%}"
    yield "parameters", f"{count(result.parameters)}, {result.dtype}"
    times = f"{result.saved:.3g} times smaller" if result.saved >= 1 else f"{1 / result.saved:.3g} times larger"
    yield "size", f"{nbytes(result.adapter_nbytes)}, {times} than the full copy"
    if result.recovery is not None and result.recovery.recovered is not None:
        yield "of the fine-tune's gain on a text, recovered", f"{result.recovery.recovered:.1%}"
    if not math.isnan(result.survival):
        yield "of the update, held by the base's own type when merged", f"{result.survival:.1%}"
    if result.calibration is not None:
        yield "calibrated", markdown(show(result.calibration.text, 500))
