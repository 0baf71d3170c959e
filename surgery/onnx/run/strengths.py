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
from surgery_formats.files.output.manifest import is_safe_name
from surgery_formats.text import show

__all__ = ["named_strengths", "strength_arrays", "weighted_file", "with_strength"]

Array = npt.NDArray[Any]
Paths = Sequence[str | os.PathLike[str]]


def _gated(contract: Contract, inputs: Collection[str]) -> dict[str, Mapping[str, Any]]:
    return {str(one.get("name")): one for one in contract.adapters if one.get("strength") in inputs}


def _swapped(contract: Contract, graph: Path) -> dict[str, Path]:
    """Files of the adapters for slots that lie beside a graph, by name."""
    files = {str(one.get("name")): str(one.get("file")) for one in contract.adapters if one.get("mode") == "swapped"}
    found = {name: graph.parent / file for name, file in files.items() if is_safe_name(file)}
    return {name: file for name, file in found.items() if file.is_file()}


def named_strengths(
    adapters: Paths, graph: Path, contract: Contract, inputs: Collection[str]
) -> tuple[list[tuple[str | os.PathLike[str], float]], dict[str, float]]:
    """The files among `adapters` with their strengths, and those of names of adapters inside; a file always wins.

    The name of an adapter for slots that was exported with the graph is its file beside it.

    Raises:
        NotFoundError: neither a file nor an adapter of this name.
        FitError: a strength that is no number, or a folder.
    """
    inside = _gated(contract, inputs)
    beside = _swapped(contract, graph)
    files: list[tuple[str | os.PathLike[str], float]] = []
    strengths: dict[str, float] = {}
    for adapter in adapters:
        name, equals, number = os.fspath(adapter).partition("=")
        if name not in inside or os.path.exists(adapter):
            if (own := beside.get(name)) is not None and not os.path.isfile(name) and not os.path.isfile(adapter):
                files.append((own, _strength(name, number) if equals else 1.0))
                continue
            file, strength = weighted_file(adapter)
            check_adapter_file(file, graph, [*inside, *beside])
            files.append((file, strength))
            continue
        strengths[name] = _strength(name, number) if equals else 1.0
    return files, strengths


def _strength(name: str, number: str) -> float:
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise FitError(f"'{show(number, 40)}' is no strength of '{show(name)}'")
    return strength


def weighted_file(adapter: str | os.PathLike[str]) -> tuple[str | os.PathLike[str], float]:
    """The file and the strength of ``FILE=0.7``; what is a file as it stands has the strength 1.

    Raises:
        FitError: a strength that is no number.
    """
    name, equals, number = os.fspath(adapter).rpartition("=")
    if not equals or os.path.exists(adapter) or not os.path.exists(name):
        return adapter, 1.0
    return name, _strength(name, number)


def with_strength(
    arrays: Mapping[str, Array], strength: float, contract: Contract, file: str | os.PathLike[str]
) -> Mapping[str, Array]:
    """The arrays of an adapter at a strength, which multiplies the second factor of every slot.

    Raises:
        FitError: another strength than 1 of an adapter that gives parameters in full, or keys and values.
    """
    if strength == 1.0:
        return arrays
    second = {slot.B for slot in contract.slots}
    if whole := sorted(set(arrays) - second - {slot.A for slot in contract.slots}):
        raise FitError("is not a factor, so it has no strength", file=file, tensor=whole[0], hint="without =NUMBER")
    return {
        name: (array * np.float32(strength)).astype(array.dtype) if name in second else array
        for name, array in arrays.items()
    }


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
