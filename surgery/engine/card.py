# SPDX-License-Identifier: Apache-2.0
"""The model card of an output: a head for the hub, what it was made of, and what was measured.

No paths, no times: the same bytes every time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from surgery._version import __version__
from surgery.reports.markdown_table import table_lines
from surgery.reports.request import current_request
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.models.base_name import hub_name
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import count, markdown, markdown_code, show

__all__ = ["CARD", "adapter_table", "card", "measured_table", "model_name", "name_of"]

CARD = "README.md"
"""The file that the hub shows as a model card."""

_ADAPTERS = "adapter", "kind", "weight", "trained parameters"


def card(
    head: str,
    title: str,
    *tables: Iterable[str],
    notes: Iterable[str] = (),
    warnings: Iterable[str] = (),
    made: str = "Made",
    manifest: str = "surgery_manifest.json",
) -> bytes:
    """A card.

    Args:
        head: See `surgery.engine.card_metadata`.
        title: In Markdown.
        tables: Lines of each.
        notes: In Markdown, before the warnings.
        warnings: As results say them.
        made: What was done, in a word.
        manifest: Where it lies from here.
    """
    lines = ["", f"# {title}", ""]
    for table in tables:
        lines += [*table, ""]
    said = [f"- {note}" for note in notes] + [f"- Warning: {markdown(show(warning, 500))}" for warning in warnings]
    lines += [*said, ""] if said else []
    lines += [f"{made} by surgery {__version__}; `{manifest}` accounts for every tensor.", ""]
    return (head + "\n".join(lines)).encode()


def name_of(path: Path) -> str:
    """What a file or folder is called, without where it lies: the result of a step as its recipe calls it."""
    path, request = path.resolve(), current_request()
    return markdown_code(show(path.name if request is None else request.results.get(path, path.name)))


def model_name(model: Checkpoint) -> str:
    """What a model is called: on the hub, if it is known there, else its folder."""
    known = hub_name(model)
    return markdown_code(show(known)) if known else name_of(model.path)


def adapter_table(adapters: Iterable[tuple[Adapter, float]]) -> list[str]:
    """Adapters with their weights."""
    rows = [
        (name_of(one.path), markdown(show(f"{one.format} {one.kind_name}")), f"{weight:g}", count(one.parameters))
        for one, weight in adapters
    ]
    return table_lines(_ADAPTERS, rows)


def measured_table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Figures by what they are of; both are Markdown."""
    return table_lines(("measured", ""), rows)
