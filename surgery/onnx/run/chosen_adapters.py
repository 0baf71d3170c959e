# SPDX-License-Identifier: Apache-2.0
"""The adapters of a run: files, or names of those that were exported with the graph or are inside it, each at a strength."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt

from surgery.engine.inputs import StrPath
from surgery.onnx.graph.adapter_names import check_adapter_file
from surgery.onnx.run.adapter_file import read_adapter_file
from surgery.onnx.run.adapters import fill_slots
from surgery.onnx.run.opening import GraphSession
from surgery.onnx.run.strengths import gated_adapters, strength_arrays, strength_of, weighted_file, with_strength
from surgery_formats.files.output.manifest import is_safe_name

__all__ = ["ChosenAdapters", "choose_adapters", "is_same_file", "own_tokenizer", "slot_arrays"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class ChosenAdapters:
    """What was chosen.

    Attributes:
        files: Files with their strengths, in order.
        inside: Strengths of adapters inside the graph, by name.
        entries: What the graph's contract says of the files that it knows, in their order.
    """

    files: tuple[tuple[StrPath, float], ...] = ()
    inside: Mapping[str, float] = field(default_factory=dict)
    entries: tuple[Mapping[str, Any], ...] = ()


def choose_adapters(adapters: Sequence[StrPath], graph: GraphSession) -> ChosenAdapters:
    """Look up `adapters`: ``FILE``, ``NAME``, or either ``=0.5``; a file always wins.

    The name of an adapter for slots that was exported with the graph is its file beside it.

    Raises:
        NotFoundError: neither a file nor an adapter of this name.
        FitError: a strength that is no number, or a folder.
    """
    inside = gated_adapters(graph.contract, graph.inputs)
    beside = _swapped(graph)
    files: list[tuple[StrPath, float]] = []
    strengths: dict[str, float] = {}
    for adapter in adapters:
        name, equals, number = os.fspath(adapter).partition("=")
        if name not in inside or os.path.exists(adapter):
            if (own := beside.get(name)) is not None and not os.path.isfile(name) and not os.path.isfile(adapter):
                files.append((own, strength_of(name, number) if equals else 1.0))
                continue
            file, strength = weighted_file(adapter)
            check_adapter_file(file, graph.path, [*inside, *beside])
            files.append((file, strength))
            continue
        strengths[name] = strength_of(name, number) if equals else 1.0
    return ChosenAdapters(tuple(files), strengths, tuple(_entries(graph, [file for file, _ in files])))


def _swapped(graph: GraphSession) -> dict[str, Path]:
    """Files of the adapters for slots that were exported with a graph, by name."""
    entries = [one for one in graph.contract.adapters if one.get("mode") == "swapped"]
    files = {str(one.get("name")): str(one.get("file")) for one in entries}
    found = {name: graph.folder / file for name, file in files.items() if is_safe_name(file)}
    return {name: file for name, file in found.items() if file.is_file()}


def _entries(graph: GraphSession, files: Sequence[StrPath]) -> Iterator[Mapping[str, Any]]:
    for file in files:
        for entry in graph.contract.adapters:
            known = entry.get("file")
            if isinstance(known, str) and is_same_file(graph.folder / known, file):
                yield entry


def is_same_file(one: StrPath, other: StrPath) -> bool:
    """Whether both are there, and one file."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # ValueError: a NUL in a name
        return False


def slot_arrays(chosen: ChosenAdapters, graph: GraphSession) -> dict[str, Array]:
    """The arrays of adapters by input of the graph.

    Raises:
        FitError: an adapter that does not fit the graph.
    """
    files = [
        (os.fspath(file), with_strength(read_adapter_file(file), strength, graph.contract, file))
        for file, strength in chosen.files
    ]
    gates = strength_arrays(chosen.inside, graph.contract, graph.inputs, graph.optional)
    return fill_slots(files, graph.contract, graph.inputs, graph.optional) | gates


def own_tokenizer(chosen: ChosenAdapters, graph: GraphSession) -> Path:
    """The folder of the tokenizer and template that the first of these adapters brought along, else the graph's."""
    for entry in chosen.entries:
        folder = entry.get("tokenizer")
        if isinstance(folder, str) and is_safe_name(folder) and (graph.folder / folder).is_dir():
            return graph.folder / folder
    return graph.folder
