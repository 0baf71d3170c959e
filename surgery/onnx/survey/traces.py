# SPDX-License-Identifier: Apache-2.0
"""What a graph tells of the machine it was exported on: torch's exporters write the lines of source of every node into it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from surgery.onnx.edit.strip import SOURCE_PATH, STACK_TRACE
from surgery.onnx.edit.uses import graphs_in
from surgery_formats.text import nbytes, show

if TYPE_CHECKING:
    import onnx

__all__ = ["traces_of"]


def traces_of(model: onnx.ModelProto) -> str:
    """A warning that names a path of the exporting machine and how much is told of it; empty if nothing is."""
    count, size, example = 0, 0, ""
    for text in _texts(model):
        found = SOURCE_PATH.search(text)
        if found is None:
            continue
        count, size, example = count + 1, size + len(text), example or found[0]
    if not count:
        return ""
    return (
        f"{count} nodes tell lines of source of the machine it was exported on ({nbytes(size)}), such as "
        f"'{show(example)}': in '{STACK_TRACE}' or doc_string; 'surgery strip' takes them out"
    )


def _texts(model: onnx.ModelProto) -> Iterator[str]:
    for nodes in (*(graph.node for graph in graphs_in(model.graph)), *(function.node for function in model.functions)):
        for node in nodes:
            traces = [entry.value for entry in node.metadata_props if entry.key == STACK_TRACE]
            if text := "\n".join([*traces, node.doc_string]).strip():
                yield text
