# SPDX-License-Identifier: Apache-2.0
"""Strengths of adapters: ``FILE=0.7`` scales its factors, ``NAME=0.7`` is the value of an input of the graph."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.graph.contract import Contract
from surgery.onnx.run.ports import Port
from surgery_formats.errors import FitError
from surgery_formats.text import show

__all__ = ["gated_adapters", "strength_arrays", "strength_of", "weighted_file", "with_strength"]

Array = npt.NDArray[Any]


def gated_adapters(contract: Contract, inputs: Collection[str]) -> dict[str, Mapping[str, Any]]:
    """What the contract says of each adapter inside the graph that has an input for its strength, by name."""
    return {str(one.get("name")): one for one in contract.adapters if one.get("strength") in inputs}


def strength_of(name: str, number: str) -> float:
    """The strength that is written behind a name.

    Raises:
        FitError: no finite number.
    """
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
    return name, strength_of(name, number)


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
    if whole := sorted(set(arrays) - set(contract.slot_inputs)):
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
    for name, entry in gated_adapters(contract, inputs).items():
        gate = str(entry["strength"])
        if name in strengths or gate not in optional:
            weight = strengths.get(name, entry.get("weight"))
            number = float(weight) if isinstance(weight, int | float) else 1.0
            arrays[gate] = np.full([1], number, inputs[gate].dtype)
    return arrays
