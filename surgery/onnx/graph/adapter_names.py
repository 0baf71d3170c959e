# SPDX-License-Identifier: Apache-2.0
"""Names of adapters that a user gives for a graph: files for its inputs, or names of those inside."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from surgery_formats.errors import FitError, NotFoundError
from surgery_formats.text import closest, listing, show

__all__ = ["check_adapter_file"]

_FOLDER, _SUFFIX = "adapters", ".onnx_adapter"


def check_adapter_file(
    file: str | os.PathLike[str], graph: Path, inside: Collection[str] = (), *, prompt: bool = False
) -> None:
    """Refuse what is no file, and say what may have been meant.

    Args:
        file: What was named.
        graph: The graph it is for.
        inside: Names of the adapters in the graph that have a strength.
        prompt: Whether a soft prompt was meant.

    Raises:
        NotFoundError: there is no such file.
        FitError: a folder.
    """
    path = Path(file)
    if path.is_dir():
        raise FitError(f"a folder, not an {_SUFFIX} file", file=path, hint=_hint_for_folder(path, prompt))
    if path.exists():
        return
    name = path.name.partition("=")[0]
    beside = graph.parent / _FOLDER / f"{name.removesuffix(_SUFFIX)}{_SUFFIX}"
    if beside.is_file():
        hint: str | None = f"did you mean '{show(beside)}'?"
    else:
        files = [show(path, 200) for path in sorted((graph.parent / _FOLDER).glob(f"*{_SUFFIX}"))]
        hint = closest(name, inside) or (f"adapters of the graph: {listing(inside)}" if inside else None)
        hint = hint or (f"beside the graph there are {listing(files)}" if files else None)
    raise NotFoundError("no such file", file=path, hint=hint)


def _hint_for_folder(folder: Path, prompt: bool) -> str:
    """The file in it that must be meant, or what makes one of such a folder."""
    files = sorted(folder.glob(f"*{_SUFFIX}"))
    if len(files) == 1:
        return f"did you mean '{show(files[0], 200)}'?"
    if files:
        return f"name one of {listing([file.name for file in files])}"
    if prompt:
        return f"surgery prompt bake {show(folder.name)} BASE --as kv writes one of a soft prompt"
    return "surgery convert writes an adapter for this graph, surgery insert gives it slots"
