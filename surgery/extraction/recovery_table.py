# SPDX-License-Identifier: Apache-2.0
"""What people see of a recovery: three models beside each other on one text."""

from __future__ import annotations

from surgery.extraction.recovery import Recovery, TextScore
from surgery.reports.output import PATH
from surgery.reports.sections import Column, Facts, Section, Table
from surgery.reports.values import Name, Phrase, Value
from surgery_formats.text import numbered

__all__ = ["recovery_rows", "recovery_sections"]

_MODELS = (
    Column("model"),
    Column("bits per byte", "fixed", 4, says="that the model needs for the text: fewer are better"),
    Column("recovered", "share", 1, says="share of what TUNED gains over BASE on the text"),
    Column("KL from TUNED", "number", 3, says="how far its predictions are from TUNED's, in nats per token: 0 is TUNED"),
    Column("same top token", "share", 1, says="tokens for which it expects the same next one most as TUNED"),
)  # fmt: skip


def recovery_rows(
    recovery: Recovery, names: tuple[str, str, str] = ("BASE", "BASE with the adapter", "TUNED")
) -> tuple[tuple[str, float, float | None, float, float], ...]:
    """BASE, BASE with the adapter, and TUNED: bits per byte, share of the gain, KL in nats, share of equal top tokens."""
    scores = recovery.base, recovery.adapter, TextScore(recovery.tuned, 0.0, 1.0)
    return tuple(
        (name, score.bits_per_byte, recovery.share(score), score.divergence, score.agreement)
        for name, score in zip(names, scores, strict=True)
    )


def recovery_sections(recovery: Recovery) -> list[Section]:
    """The text, and the three models on it."""
    text = (
        Name(recovery.text, PATH),
        f" ({numbered(recovery.text_bytes, 'byte')}, {numbered(recovery.tokens, 'token')})",
    )
    facts: list[tuple[str, Phrase]] = [("measured on", text)]
    if recovery.recovered is None:
        gain, least = (Value(number, "number", 3) for number in (recovery.gain, recovery.least))
        facts.append(("TUNED's gain", (gain, " bits per byte, where up to ", least, " may be chance")))
    sections: list[Section] = [Table(_MODELS, recovery_rows(recovery), "What the adapter does on the text")]
    sections.append(Facts(tuple(facts)))
    return sections
