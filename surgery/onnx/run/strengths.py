# SPDX-License-Identifier: Apache-2.0
"""Adapters that are inside a graph, each behind an input for its strength: ``NAME`` or ``NAME=0.5`` among the adapters of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.graph.adapter_names import check_adapter_file
from surgery.onnx.graph.contract import Contract
from surgery.onnx.run.ports import Port
from surgery_formats.errors import FitError
from surgery_formats.text import show

__all__ = ["named_strengths", "strength_arrays"]

Array = npt.NDArray[Any]
Paths = Sequence[str | os.PathLike[str]]


def _gated(contract: Contract, inputs: Collection[str]) -> dict[str, Mapping[str, Any]]:
    return {str(one.get("name")): one for one in contract.adapters if one.get("strength") in inputs}


def named_strengths(
    adapters: Paths, graph: Path, contract: Contract, inputs: Collection[str]
) -> tuple[list[str | os.PathLike[str]], dict[str, float]]:
    """The files among `adapters`, and the strengths of those that are names of adapters inside; a file always wins.

    Raises:
        NotFoundError: neither a file nor an adapter of this name.
        FitError: a strength that is no number, or a folder.
    """
    inside = _gated(contract, inputs)
    files: list[str | os.PathLike[str]] = []
    strengths: dict[str, float] = {}
    for adapter in adapters:
        name, equals, number = os.fspath(adapter).partition("=")
        if name not in inside or os.path.exists(adapter):
            check_adapter_file(adapter, graph, inside)
            files.append(adapter)
            continue
        try:
            strengths[name] = float(number) if equals else 1.0
        except ValueError:
            strengths[name] = math.nan
        if not math.isfinite(strengths[name]):
            raise FitError(f"'{show(number, 40)}' is no strength of '{show(name)}'")
    return files, strengths


def strength_arrays(
    strengths: Mapping[str, float], contract: Contract, inputs: Mapping[str, Port], optional: Collection[str]
) -> dict[str, Array]:
    """Arrays for the inputs of strengths: what was chosen, and for the others that have no default in the graph their own."""
    arrays: dict[str, Array] = {}
    for name, entry in _gated(contract, inputs).items():
        gate = str(entry["strength"])
        if name in strengths or gate not in optional:
            weight = strengths.get(name, entry.get("weight"))
            number = float(weight) if isinstance(weight, int | float) else 1.0
            arrays[gate] = np.full([1], number, inputs[gate].dtype)
    return arrays
