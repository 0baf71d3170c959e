# SPDX-License-Identifier: Apache-2.0
"""The result of comparing two graphs, or a graph and a checkpoint, and its summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from surgery.comparison.diff_charts import tensor_charts
from surgery.comparison.entries import TensorDiff
from surgery.comparison.results import sides, tensor_sections
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Column, Facts, Note, Section, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.to_json import plain, without_empty
from surgery.reports.values import Cell, Name, Phrase, Value
from surgery_formats.text import summed_up

__all__ = ["GraphDiff", "NodeChange", "PortChange"]

_LISTED = 30


@dataclass(frozen=True, slots=True)
class NodeChange:
    """Nodes of one operator in one module that one graph has and the other lacks, or that differ.

    Attributes:
        change: ``only in A``, ``only in B``, or ``changed``: in both, with other inputs, outputs or attributes.
        module: As names of nodes tell it; empty where they do not.
        operator: With its domain, if that is not ONNX's own.
        count: How many.
    """

    change: str
    module: str
    operator: str
    count: int


@dataclass(frozen=True, slots=True)
class PortChange:
    """An input or an output that differs.

    Attributes:
        port: ``input`` or ``output``.
        name: Its name.
        a: Type and dims in A; empty if A lacks it.
        b: In B.
    """

    port: str
    name: str
    a: str
    b: str


@summarised
@dataclass(frozen=True)
class GraphDiff:
    """A graph and another graph, or the checkpoint it was exported from.

    Attributes:
        facts: ``{what: (A's, B's)}`` of producer, opsets and number of nodes; one side is empty for a checkpoint.
        tensors: Of both; what B calls otherwise, or holds transposed, says so in its note.
        nodes: What differs between the computations; none where one is a checkpoint.
        ports: Inputs and outputs that differ.
        difference: ``||B - A||_F / ||A||_F`` over the tensors of both; None where values were not compared.
        renamed: Number of tensors that the two call otherwise.
        constants: Numbers of shapes, axes and scalars that A alone has, and B alone.
        header: Whether values were left unread.
        notes: What the user should know.
        names: What A and B are called.
        seconds: How long it took.
    """

    facts: Mapping[str, tuple[str, str]]
    tensors: tuple[TensorDiff, ...]
    nodes: tuple[NodeChange, ...]
    ports: tuple[PortChange, ...]
    difference: float | None
    renamed: int
    constants: tuple[int, int]
    header: bool
    notes: tuple[str, ...] = ()
    names: tuple[str, str] = ("", "")
    seconds: float = elapsed()
    nbytes: ClassVar[int] = 0  # not counted for this verb

    @property
    def equal(self) -> bool:
        """Whether tensors, nodes, inputs and outputs are the same, but for names."""
        return self.same_structure and all(entry.status == "equal" for entry in self.tensors)

    @property
    def same_structure(self) -> bool:
        """Whether the computation and the types and shapes of its tensors are the same."""
        alike = all(entry.status in ("equal", "values") for entry in self.tensors)
        return alike and not self.nodes and not self.ports and not any(self.constants)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes."""
        return self.notes

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        found = without_empty(plain(self), ("notes", "rounding", "nearest", "intruders"))
        return {"type": "graphs", "equal": self.equal, "same_structure": self.same_structure, **found}

    def summary(self, *, verbose: bool = False) -> Summary:
        """Totals, then nodes, inputs and tensors that differ, all tensors if `verbose`."""
        sections = (
            Facts(tuple(self._facts())),
            *_node_sections(self.nodes, verbose=verbose),
            *_port_sections(self.ports),
            *tensor_sections(self.tensors, verbose=verbose),
            *tensor_charts(self.tensors),
            *warning_notes(self.notes),
        )
        return Summary("Differences", sections)

    def _facts(self) -> Iterator[tuple[str, Phrase]]:
        yield from sides(self.names)
        for what, (a, b) in self.facts.items():
            if a or b:
                yield what, Name(a) if a == b else (Name(a or "none"), " | ", Name(b or "none"))
        counts = Counter(entry.status for entry in self.tensors)
        yield "tensors", ", ".join(f"{number} {status}" for status, number in counts.items()) or "none"
        if self.renamed:
            yield "renamed", f"{self.renamed} tensors, told by their values or by the nodes that read them"
        if any(self.constants):
            own, other = self.constants
            yield "constants", f"{own} shapes, axes and scalars only in A, {other} only in B"
        if self.difference is not None:
            yield "difference", (Value(self.difference, "number", 3), " of A's norm")
        if self.nodes:
            totals = Counter[str]()
            for node in self.nodes:
                totals[node.change] += node.count
            yield "changed nodes", ", ".join(f"{count} {change}" for change, count in totals.items())
        if self.header:
            yield "compared", "headers only"


def _node_sections(nodes: Sequence[NodeChange], *, verbose: bool) -> Iterator[Section]:
    """A row per operator and modules that differ by numbers alone."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    for node in nodes:
        groups.setdefault((node.change, node.operator, node.count), []).append(node.module)
    rows: list[tuple[Cell, ...]] = [
        (change, operator, module or None, count)
        for (change, operator, count), modules in groups.items()
        for module in (modules if verbose else summed_up(modules))
    ]
    if rows:
        columns = Column("nodes"), Column("operator", "name"), Column("module", "name"), Column("each", "integer")
        yield Table(columns, tuple(rows if verbose else rows[:_LISTED]))
    if len(rows) > _LISTED and not verbose:
        yield Note(f"... and {len(rows) - _LISTED} more", "omitted")


def _port_sections(ports: Sequence[PortChange]) -> Iterator[Section]:
    if ports:
        columns = Column("port"), Column("name", "name"), Column("A", "name"), Column("B", "name")
        yield Table(columns, tuple((one.port, one.name, one.a or None, one.b or None) for one in ports))
