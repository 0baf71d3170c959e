# SPDX-License-Identifier: Apache-2.0
"""The small files of an export as they are written: graphs with their weights inside or named as the layout has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from surgery.onnx.export.assemble import Assembly
from surgery.onnx.export.embed import embed
from surgery.onnx.export.inserted import INSERTED
from surgery.onnx.export.layouts import Arrangement
from surgery.onnx.export.prompt_past import WeightLocation
from surgery.onnx.export.sentence import SENTENCE_FILE
from surgery.onnx.export.triton import triton_config
from surgery.onnx.graph.build import GraphSet
from surgery.onnx.run.adapter_file import SmallFiles
from surgery_formats.files.raw import File, nameless_file

__all__ = ["GraphFiles", "graph_files"]


class GraphFiles(NamedTuple):
    """What was made.

    Attributes:
        files: The contents of all small files, by their path in the output.
        graphs: The graphs, with the contract that they have in the output.
        held: The weight files that are inside of them, by the names that they had for these; none of graphs that refer to
            files.
    """

    files: SmallFiles
    graphs: GraphSet
    held: Mapping[str, File]


def graph_files(
    assembly: Assembly, arrangement: Arrangement, location: WeightLocation, held: Mapping[str, File] | None, name: str
) -> GraphFiles:
    """Make the small files.

    Args:
        assembly: What the graphs are made of.
        arrangement: The names of all files.
        location: Where the weights lie now.
        held: Weight files to put into the graphs, by the names that these have for them; None to refer to files.
        name: Of the folder, by which Triton calls the model.

    Raises:
        FitError, ProofError: see `Assembly.files` and `embed`.
    """
    files, graph_set = assembly.files(location)
    inside = dict(held or {})
    if held is not None:
        small = {file: files.pop(file) for file in (INSERTED, SENTENCE_FILE) if file in files}
        inside |= {file: nameless_file(data, Path(file)) for file, data in small.items() if isinstance(data, bytes)}
    for file, packed in graph_set.graphs.items():
        if held is None and arrangement.keeps_names:
            files[file] = packed.data
            continue
        graph = packed.unpacked()
        if held is not None:
            embed(graph, inside)
        arrangement.apply(graph)
        if arrangement.layout.name == "triton":
            files["config.pbtxt"] = triton_config(graph, name)
        files[file] = graph.SerializeToString(deterministic=True)
    placed = {arrangement.path(file): data for file, data in files.items()}
    return GraphFiles(placed, replace(graph_set, contract=arrangement.contract(graph_set.contract)), inside)
