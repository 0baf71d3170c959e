# SPDX-License-Identifier: Apache-2.0
"""A graph by its file, or by the folder that it is alone in."""

from __future__ import annotations

from pathlib import Path

from surgery_formats.containers.onnx import OnnxGraph, open_graph
from surgery_formats.errors import FitError, NotFoundError
from surgery_formats.files.output.manifest import is_safe_name
from surgery_formats.text import listing, show

__all__ = ["check_places", "graph_at", "is_graph"]


def is_graph(path: Path) -> bool:
    """Whether a name is that of a graph's file."""
    return path.suffix == ".onnx" and path.is_file()


def graph_at(path: Path) -> OnnxGraph:
    """Open the graph at `path`; of a folder, the only one in it.

    Raises:
        NotFoundError: there is none.
        FitError: a folder with several.
        MalformedError: it is no graph.
    """
    if not path.is_dir():
        return open_graph(path)
    found = sorted(one for one in path.iterdir() if is_graph(one))
    if not found:
        raise NotFoundError(
            "no .onnx file in it",
            file=path,
            hint="name an .onnx file, or a folder with one: only a graph needs its base named",
        )
    if len(found) > 1:
        names = listing([one.name for one in found])
        raise FitError(f"several graphs: {names}", file=path, hint="name one of them")
    return open_graph(found[0])


def check_places(graph: OnnxGraph) -> None:
    """Refuse a graph whose weights have no place in an output, which keeps the names that the graph has for them.

    Raises:
        FitError: a file of weights lies two folders down, or is called what no output may hold.
    """
    folder = graph.path.parent
    for file in graph.external:
        name = file.path.relative_to(folder).as_posix() if file.path.is_relative_to(folder) else file.path.name
        if not is_safe_name(name):
            raise FitError(
                f"its weights lie in '{show(name)}', and an output has files beside the graph or one folder down",
                file=graph.path,
                hint="save it anew: onnx.save_model(onnx.load(GRAPH), NEW, save_as_external_data=True)",
            )
