# SPDX-License-Identifier: Apache-2.0
"""The model card of an adapter in PEFT's format that was made of others: converted, combined, resized.

No paths, no times: the same bytes every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from surgery._version import __version__
from surgery.engine.card_metadata import card_metadata
from surgery.reports.markdown_parts import table_lines
from surgery_formats.adapters.format import Format, Rendering
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.models.base_name import hub_name, is_hub_name
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import count, markdown, markdown_code, show

__all__ = ["with_card"]

Weighted = tuple[Adapter, float]


def with_card(
    rendering: Rendering,
    target: Format,
    sources: Sequence[Weighted],
    base: Checkpoint | None,
    what: str,
    measured: Sequence[tuple[str, str]],
) -> Rendering:
    """`rendering` with a README.md, where `target` is the format whose folders have one on the hub.

    Args:
        rendering: Of what was made.
        target: Its format.
        sources: What it was made of.
        base: What it was trained on, if it was given.
        what: What was done: ``combined``.
        measured: Rows of the table of figures.
    """
    if target.name != "peft":
        return rendering
    adapters = [adapter for adapter, _ in sources]
    alone = adapters[0].path if len(adapters) == 1 and (adapters[0].path / "README.md").is_file() else None
    folder = alone or (None if base is None else base.path)
    told = [adapter.base_name for adapter in adapters]
    named = "" if base is None else hub_name(base, told)
    common = set(told).pop() if len(set(told)) == 1 else ""
    metadata = card_metadata(
        folder,
        named or (common if base is None and is_hub_name(common) else ""),
        relation="adapter",
        library="peft",
        task=adapters[0].task,
        tags=tuple(dict.fromkeys(adapter.kind_name.lower() for adapter in adapters)),
    )
    names = [markdown_code(show(adapter.path.resolve().name)) for adapter in adapters]
    rows = [
        (name, markdown(show(f"{adapter.format} {adapter.kind_name}")), f"{weight:g}", count(adapter.parameters))
        for name, (adapter, weight) in zip(names, sources, strict=True)
    ]
    lines = [
        "",
        f"# {', '.join(names)}, {what}",
        "",
        *table_lines(("adapter", "kind", "weight", "trained parameters"), rows),
        "",
        *table_lines(("measured", ""), measured),
        "",
        f"Made by surgery {__version__}; `surgery_manifest.json` accounts for every tensor.",
        "",
    ]
    card = (metadata + "\n".join(lines)).encode()
    return replace(rendering, small_files={**rendering.small_files, "README.md": card})
