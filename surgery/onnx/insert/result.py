# SPDX-License-Identifier: Apache-2.0
"""The result of `surgery.insert` into a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.onnx.graph.contract import Slot
from surgery.reports.output import DRY_RUN, PATH
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Facts, Note
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.values import Name, Phrase, Value
from surgery_formats.text import show

__all__ = ["GraphInsertion"]


@summarised
@dataclass(frozen=True)
class GraphInsertion:
    """What became of a graph that got slots.

    Attributes:
        output: The folder; None for a dry run.
        graph: The graph it was made of.
        slots: The slots, in order.
        adapters: What the graph says of each adapter.
        nodes: Nodes that were added.
        nbytes: Bytes written.
        required: Whether the slots are inputs without a default.
        replaced: Tensors of the graph that became optional inputs, for parameters that an adapter gives in full.
        warnings: What the user should know.
        seconds: How long it took.
    """

    output: Path | None
    graph: Path
    slots: tuple[Slot, ...]
    adapters: tuple[Mapping[str, Any], ...]
    nodes: int
    nbytes: int = 0
    required: bool = False
    replaced: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "type": "slots",
            "output": None if self.output is None else str(self.output),
            "graph": str(self.graph),
            "slots": [{"weight": slot.weight, "A": slot.A, "B": slot.B} for slot in self.slots],
            "adapters": [dict(adapter) for adapter in self.adapters],
            "required": self.required,
            "replaced": list(self.replaced),
            "nodes": self.nodes,
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }

    def summary(self, *, verbose: bool = False, output: Path | None = None) -> Summary:
        """The slots and the adapters for them; with `verbose` the inputs by name.

        Args:
            verbose: Name every slot.
            output: Where a dry run would write.
        """
        where = self.output or output
        kind = "inputs without a default" if self.required else "optional inputs"
        facts: list[tuple[str, Phrase]] = [("into", Name(self.graph, PATH))]
        if self.replaced:
            facts.append(
                ("replaced", f"{len(self.replaced)} tensors are optional inputs, the base's values by default")
            )
        if self.slots:
            facts.append(("slots", f"{len(self.slots)} ({2 * len(self.slots)} {kind})"))
        for one in self.adapters:
            name = Name(one["name"], 60)
            if "file" in one:
                facts.append(("adapter", (name, f": {one['file']}")))
            else:
                default = "" if self.required else f", by default {one['weight']:g}"
                facts.append(("adapter", (name, ": inside, input ", Name(one["strength"], 80), default)))
        facts.append(("nodes", f"{self.nodes} more"))
        if where is not None:
            size = Value(self.nbytes, "bytes")
            facts.append(("wrote" if self.output else "would write", (Name(where, PATH), ": ", size)))
        notes = [Note(f"{show(slot.A)}, {show(slot.B)}") for slot in self.slots] if verbose else []
        if not self.required and any(one.get("mode") == "swapped" or "strength" in one for one in self.adapters):
            notes.append(Note("JavaScript and Triton pass no optional inputs: insert with --required for these"))
        notes += [DRY_RUN] if self.output is None else []
        return Summary("Insertion", (Facts(tuple(facts)), *notes, *warning_notes(self.warnings)))
