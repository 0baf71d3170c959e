# SPDX-License-Identifier: Apache-2.0
"""What an ONNX graph is made of, as inspect reports it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.reports.checkpoint_report import WeightFileReport, files_phrase, module_tables, types_phrase
from surgery.reports.output import PATH
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Column, Facts, Note, Section, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.to_json import plain, without_empty
from surgery.reports.values import Cell, Name, NameList, Phrase, Value
from surgery_formats.models.module_tree import Node, Totals
from surgery_formats.text import nbytes, summed_up

__all__ = ["GraphReport", "OperatorReport", "PortReport", "dims_text"]

_OPERATORS = 24  # listed, the most frequent first, unless all are asked for


@dataclass(frozen=True, slots=True)
class OperatorReport:
    """An operator of a graph.

    Attributes:
        domain: Empty for ONNX's own.
        name: Of the operator, or of a function that the file defines.
        count: Nodes of it, those in bodies included.
        function: Whether the file defines it.
    """

    domain: str
    name: str
    count: int
    function: bool = False


@dataclass(frozen=True, slots=True)
class PortReport:
    """An input or an output of a graph.

    Attributes:
        name: Its name.
        dtype: Its type, as tensors have them; else ``sequence``, ``map`` or ``optional``.
        dims: Its sizes: a number, a name, or None where nothing is said; None if not even how many there are.
        default: Of an input that may be left out: the shape of its default.
        slot: Whether it takes a factor of a LoRA.
    """

    name: str
    dtype: str
    dims: tuple[int | str | None, ...] | None
    default: tuple[int, ...] | None = None
    slot: bool = False


@summarised
@dataclass(frozen=True)
class GraphReport:
    """What a graph holds.

    Attributes:
        path: The file.
        producer: The program that wrote it, with its version, as it says.
        ir_version: Of the file's format.
        opsets: Version of each domain of operators.
        nodes: How many, those in bodies and functions included.
        operators: By domain and name, the most frequent first.
        inputs: Inputs, those with a default included.
        outputs: Outputs.
        runs: What stands against running it in onnxruntime, as far as operators and types tell.
        files: The graph's file and the files of its weights.
        parameters: Numbers in weights; scalars and integers that are the computation's are not counted.
        tree: Weights by module.
        roles: Totals per role.
        dtypes: Totals per stored type.
        constants: Number of tensors that are no weights.
        unplaced: Number of weights whose module neither their name nor a node tells.
        factors: Number of LoRA factors among the weights, which are not inputs: an adapter that is part of the graph.
        contract: What a graph of ours says of itself; empty for others.
        metadata: Keys of its metadata, with how often nodes have them.
        warnings: What the user should know.
        seconds: How long it took.
    """

    path: Path
    producer: str
    ir_version: int
    opsets: Mapping[str, int]
    nodes: int
    operators: tuple[OperatorReport, ...]
    inputs: tuple[PortReport, ...]
    outputs: tuple[PortReport, ...]
    runs: tuple[str, ...]
    files: tuple[WeightFileReport, ...]
    parameters: int
    tree: Node
    roles: Mapping[str, Totals]
    dtypes: Mapping[str, Totals]
    constants: int
    unplaced: int
    factors: int
    contract: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def slots(self) -> tuple[PortReport, ...]:
        """Inputs that take factors of LoRAs."""
        return tuple(port for port in self.inputs if port.slot)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "type": "graph",
            "nbytes": self.nbytes,
            **without_empty(plain(self), ("contract", "metadata", "default")),
        }

    def summary(self, *, verbose: bool = False, depth: int | None = None) -> Summary:
        """Facts, operators, inputs and outputs, then weights by module."""
        sections = (
            Facts(tuple(self._facts())),
            *self._operators(verbose=verbose),
            _ports("input", self.inputs, verbose=verbose),
            _ports("output", self.outputs, verbose=verbose),
            *(module_tables(self.tree, self.roles, None if verbose else depth) if self.parameters else ()),
            *warning_notes(self.warnings),
        )
        return Summary("graph", sections)

    def _facts(self) -> Iterator[tuple[str, Phrase]]:
        yield "graph", Name(self.path, PATH)
        if self.producer:
            yield "made by", Name(self.producer)
        named = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in self.opsets.items())
        yield "opsets", (Name(named, PATH), f" (IR {self.ir_version})")
        yield "nodes", f"{self.nodes} of {len(self.operators)} operators"
        if self.contract:
            yield "contract", Name(", ".join(f"{key} {value}" for key, value in self.contract.items()), PATH)
        for sentence in self.runs:
            yield "runs", sentence
        optional = [port for port in self.inputs if port.default is not None and not port.slot]
        if optional:
            yield "optional", NameList(tuple(summed_up(port.name for port in optional)))
        if self.slots:
            kind = "optional inputs" if any(port.default is not None for port in self.slots) else "inputs"
            yield "slots", (f"{len(self.slots)} {kind}: ", NameList(tuple(summed_up(p.name for p in self.slots)), 4))
        if self.factors:
            yield "adapter", f"{self.factors} factors of LoRAs are weights of the graph, and no inputs"
        yield "parameters", Value(self.parameters, "count")
        yield "weights", files_phrase(self.files)
        if len(self.files) > 1:
            yield "in files", NameList(tuple(f"{one.name} ({one.tensors}, {nbytes(one.nbytes)})" for one in self.files))
        yield "types", types_phrase(self.dtypes) or "none"
        if self.constants:
            yield "constants", f"{self.constants} more tensors are shapes, axes and scalars"
        if self.unplaced:
            yield "unplaced", f"{self.unplaced} weights have names that tell no module"

    def _operators(self, *, verbose: bool) -> Iterator[Section]:
        shown = self.operators if verbose else self.operators[:_OPERATORS]
        columns = Column("operator", "name"), Column("domain", "name"), Column("nodes", "integer")
        rows = tuple(
            (one.name, f"{one.domain} (in this file)" if one.function else one.domain or None, one.count)
            for one in shown
        )
        if rows:
            yield Table(columns, rows)
        if len(self.operators) > len(shown):
            yield Note(f"... and {len(self.operators) - len(shown)} more operators", "omitted")


def _ports(what: str, ports: Sequence[PortReport], *, verbose: bool) -> Table:
    """A row per port, or for ports whose names differ by numbers alone."""
    groups: dict[tuple[object, ...], list[PortReport]] = {}
    for port in ports:
        alike = re.sub(r"\d+", "*", dims_text(port.dims)) if port.slot else port.dims
        key = (port.name,) if verbose else (port.dtype, alike, port.default, port.slot)
        groups.setdefault(key, []).append(port)
    rows: list[tuple[Cell, ...]] = []
    for own in groups.values():
        for name in summed_up(port.name for port in own):
            one = own[0]
            default = (
                "" if one.default is None else ("slot, empty" if one.slot else f"default {dims_text(one.default)}")
            )
            dims = re.sub(r"(?<=\.)\d+(?=\.)", "*", dims_text(one.dims)) if len(own) > 1 else dims_text(one.dims)
            rows.append((name, one.dtype, dims, "slot" if one.slot and not default else default or None))
    return Table((Column(what, "name"), Column("type"), Column("dims", "name"), Column("optional")), tuple(rows))


def dims_text(dims: Sequence[int | str | None] | None) -> str:
    """``[batch, 8, ?]``."""
    if dims is None:
        return "any"
    return f"[{', '.join('?' if size is None else str(size) for size in dims)}]"
