# SPDX-License-Identifier: Apache-2.0
"""Takes out of a graph what tells of the machine and the source it was exported from. No node and no weight changes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.onnx.edit.output import editable, write_edited
from surgery.onnx.edit.uses import graphs_in
from surgery.reports.output import DRY_RUN, PATH
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Column, Facts, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.values import Name, Phrase, Value
from surgery_formats.containers.onnx import open_graph
from surgery_formats.errors import NothingChangedError
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnx

__all__ = ["DOC", "SOURCE_PATH", "STACK_TRACE", "StripResult", "strip_graph"]

STACK_TRACE = "pkg.torch.onnx.stack_trace"
"""Where torch's exporter writes the lines of source of each node."""
SOURCE_PATH = re.compile(r"(?:(?<=File \")|(?<![\w/.~-]))(?:/|~/|[A-Za-z]:\\)[^\s\"'():]{1,300}\.py\b")
"""A path of a file of Python, as tracebacks have it."""
DOC = "doc_string"


@summarised
@dataclass(frozen=True)
class StripResult:
    """What was taken out of a graph.

    Attributes:
        output: The folder; None for a dry run.
        graph: The graph it was made of.
        removed: ``{key: (how often, characters)}``; ``doc_string`` is a field of its own.
        before: Bytes of the graph's file.
        after: Bytes of it now.
        nbytes: Bytes written.
        warnings: What the user should know.
        seconds: How long it took.
    """

    output: Path | None
    graph: Path
    removed: dict[str, tuple[int, int]]
    before: int
    after: int
    nbytes: int = 0
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "output": None if self.output is None else str(self.output),
            "graph": str(self.graph),
            "removed": {key: {"times": times, "characters": size} for key, (times, size) in self.removed.items()},
            "before": self.before,
            "after": self.after,
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }

    def summary(self, *, verbose: bool = False, output: Path | None = None) -> Summary:
        """What was taken out, by key.

        Args:
            verbose: The same.
            output: Where a dry run would write.
        """
        where = self.output or output
        facts: list[tuple[str, Phrase]] = [
            ("graph", Name(self.graph, PATH)),
            ("size", (Value(self.before, "bytes"), " before, ", Value(self.after, "bytes"), " after")),
        ]
        if where is not None:
            facts.append(("wrote" if self.output else "would write", Name(where, PATH)))
        columns = Column("removed", "name"), Column("times", "integer"), Column("characters", "integer")
        table = Table(columns, tuple((show(key), *counts) for key, counts in self.removed.items()))
        dry = () if self.output else (DRY_RUN,)
        return Summary("Stripped graph", (Facts(tuple(facts)), table, *dry, *warning_notes(self.warnings)))


def strip_graph(path: Path, output: Path | None, *, every: bool, overwrite: bool) -> StripResult:
    """Write a graph without traces of its making. See `surgery.strip`.

    Raises:
        InputError: it cannot be read.
        NothingChangedError: there is nothing of that in it.
        FitError, OutputExistsError, ResourceError, ProofError: see `write_edited`.
    """
    graph = open_graph(path)
    model = editable(graph)
    removed = _strip(model, every=every)
    if not removed:
        what = "metadata of nodes" if every else "lines of source"
        raise NothingChangedError(f"there are no {what} in it", file=path)
    after = model.ByteSize()
    result = StripResult(None, graph.path, removed, graph.file.size, after)
    if output is None:
        return result
    facts = {"strip": {key: times for key, (times, _) in removed.items()}}
    written = write_edited(graph, model, output, files={}, facts=facts, overwrite=overwrite)
    return StripResult(output, graph.path, removed, graph.file.size, after, written)


def _strip(model: onnx.ModelProto, *, every: bool) -> dict[str, tuple[int, int]]:
    """Take entries out in place; how often and how much of each key."""
    times, sizes = Counter[str](), Counter[str]()
    for holder in _holders(model, every=every):
        kept = [entry for entry in holder.metadata_props if not (every or entry.key == STACK_TRACE)]
        for entry in holder.metadata_props:
            if every or entry.key == STACK_TRACE:
                times[entry.key] += 1
                sizes[entry.key] += len(entry.value)
        if len(kept) != len(holder.metadata_props):
            left = [(entry.key, entry.value) for entry in kept]
            del holder.metadata_props[:]
            for key, value in left:
                holder.metadata_props.add(key=key, value=value)
        text = holder.doc_string
        if text and (every or SOURCE_PATH.search(text)):
            times[DOC] += 1
            sizes[DOC] += len(text)
            holder.ClearField(DOC)
    return {key: (times[key], sizes[key]) for key in sorted(times)}


def _holders(model: onnx.ModelProto, *, every: bool) -> Iterator[Any]:
    """All that has metadata and a doc string: nodes, and if `every`, graphs, values, tensors and functions. The model keeps its own."""
    for graph in graphs_in(model.graph):
        yield from graph.node
        if every:
            yield graph
            yield from (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for function in model.functions:
        yield from function.node
        if every:
            yield function
