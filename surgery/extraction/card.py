# SPDX-License-Identifier: Apache-2.0
"""The model card of an extraction: what it was made of, and what it leaves of the change.

No paths, no times: the same bytes every time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from surgery._version import __version__
from surgery.engine.merge.card_metadata import card_metadata
from surgery.extraction.extraction_plan import ExtractionPlan
from surgery.extraction.figures import layers_of
from surgery.extraction.recovery import Recovery
from surgery.extraction.recovery_table import recovery_rows
from surgery.extraction.result import ExtractResult
from surgery.reports.markdown_parts import table_lines
from surgery_formats.models.base_name import base_name, hub_name
from surgery_formats.text import count, markdown, markdown_code, nbytes, numbered, show

__all__ = ["extraction_card"]


def extraction_card(plan: ExtractionPlan, result: ExtractResult) -> bytes:
    """README.md of an extraction in PEFT's format; `result` is what is known before it is written."""
    base, tuned = plan.checkpoints.base, plan.checkpoints.tuned
    names = [markdown_code(show(base_name(checkpoint))) for checkpoint in (base, tuned)]
    kind = "DoRA" if result.kind is not None and result.kind.kind == "dora" else "LoRA"
    metadata = card_metadata(
        base, hub_name(base), relation="adapter", library="peft", task=plan.adapter.task, tags=(kind.lower(),)
    )
    lines = ["---", *metadata, "---", "", f"# {names[1]} as a {kind} of {names[0]}", "", *_figures(result), ""]
    if result.recovery is not None:
        lines += [*_recovery(result.recovery), ""]
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
    lines += table_lines(("layers", "rank", "parameters", "of the change missing"), rows, right=(1, 2, 3))
    lines += ["", *(f"- Warning: {markdown(show(warning, 500))}" for warning in result.warnings)]
    lines += [f"Extracted by surgery {__version__}; `surgery_manifest.json` accounts for every tensor.", ""]
    return "\n".join(lines).encode()


def _recovery(recovery: Recovery) -> Iterator[str]:
    yield from table_lines(
        ("model", "bits per byte", "of the gain", "KL from the fine-tune", "same top token"),
        [
            (name, f"{bits:.4f}", "" if share is None else f"{share:.1%}", f"{divergence:.3g}", f"{same:.1%}")
            for name, bits, share, divergence, same in recovery_rows(
                recovery, ("base", "base with this adapter", "fine-tune")
            )
        ],
        right=(1, 2, 3, 4),
    )
    yield ""
    yield (
        f"Measured on {numbered(recovery.tokens, 'token')} ({numbered(recovery.text_bytes, 'byte')}, sha256 {recovery.text_digest[:16]}), "
        "the adapter attached in fp32."
    )


def _figures(result: ExtractResult) -> Iterator[str]:
    yield f"- It holds all but {result.residual:.2%} of the change of the weights (Frobenius norm, over all tensors)."
    times = (
        f"{result.saved:.3g} times smaller than" if result.saved >= 1 else f"{1 / result.saved:.3g} times larger than"
    )
    yield (
        f"- {count(result.parameters)} parameters, {result.dtype}, {nbytes(result.adapter_nbytes)}: "
        f"{times} the full copy."
    )
    if not math.isnan(result.survival):
        yield f"- Merged into the base in its own type, {result.survival:.1%} of the update survives rounding."
    if result.calibration is not None:
        yield f"- Calibrated: {markdown(show(result.calibration.text, 500))}."
