# SPDX-License-Identifier: Apache-2.0
"""What an ``.onnx_adapter`` file holds that is no LoRA under names of modules, as inspect reports it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.reports.output import PATH
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Column, Facts, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.to_json import plain
from surgery.reports.values import Name, NameList, Phrase, Value
from surgery_formats.text import summed_up

__all__ = ["ArrayFileReport", "ArrayReport"]


@dataclass(frozen=True, slots=True)
class ArrayReport:
    """An array of the file.

    Attributes:
        name: Of the input that it is for.
        dtype: Its type.
        shape: Its sizes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@summarised
@dataclass(frozen=True)
class ArrayFileReport:
    """Arrays for inputs of a graph.

    Attributes:
        path: The file.
        holds: What they are: ``keys and values of 16 virtual tokens in 6 layers``, ``28 factors of LoRAs of rank 4``.
        arrays: All of them.
        parameters: Numbers in them.
        nbytes: Size of the file.
        graph: The graph that it lies beside, or None.
        unmet: Names that are no inputs of that graph, and why each does not fit.
        why: Why it is read as arrays, and not as an adapter.
        seconds: How long it took.
    """

    path: Path
    holds: str
    arrays: tuple[ArrayReport, ...]
    parameters: int
    nbytes: int
    graph: Path | None
    unmet: Mapping[str, str]
    why: str
    seconds: float = elapsed()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Arrays that no input of the graph takes."""
        if not self.unmet:
            return ()
        return (f"{len(self.unmet)} of {len(self.arrays)} arrays do not fit the graph: onnxruntime refuses the file",)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"type": "arrays", **plain(self), "warnings": list(self.warnings)}

    def summary(self, *, verbose: bool = False) -> Summary:
        """What the arrays are and whether the graph beside takes them; every array if `verbose`."""
        facts: list[tuple[str, Phrase]] = [
            ("arrays", Name(self.path, PATH)),
            ("hold", self.holds),
            ("parameters", Value(self.parameters, "count")),
            ("size", Value(self.nbytes, "bytes")),
            ("read as", f"arrays for inputs: {self.why}"),
        ]
        if self.graph is not None:
            met = len(self.arrays) - len(self.unmet)
            facts.append(("graph", (Name(self.graph, PATH), f": takes {met} of {len(self.arrays)}")))
        for why in dict.fromkeys(self.unmet.values()):
            names = tuple(name for name, own in self.unmet.items() if own == why)
            facts.append((why, NameList(names if verbose else tuple(summed_up(names)), 4)))
        groups: dict[tuple[object, ...], list[str]] = {}
        for one in self.arrays:
            groups.setdefault((one.name,) if verbose else (one.dtype, one.shape), []).append(one.name)
        kinds = {one.name: one for one in self.arrays}
        rows = tuple(
            (name, kinds[own[0]].dtype, kinds[own[0]].shape) for own in groups.values() for name in summed_up(own)
        )
        columns = Column("array", "name"), Column("type"), Column("shape", "shape")
        return Summary("arrays", (Facts(tuple(facts)), Table(columns, rows), *warning_notes(self.warnings)))
