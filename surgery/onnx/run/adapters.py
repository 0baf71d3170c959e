# SPDX-License-Identifier: Apache-2.0
"""Adapters for one run: LoRA factors for the slots of a graph, and a soft prompt for its cache.

onnxruntime feeds the arrays of an active adapter as inputs. So does this module, from buffers that do not move: runs
with a binding, which CUDA graphs need, ignore active adapters. LoRA adapters are added by concatenating their ranks:
``[A1 | A2] [B1 ; B2]``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.graph.contract import Contract
from surgery.onnx.run.ports import Port
from surgery_formats.errors import FitError
from surgery_formats.text import closest, show

__all__ = ["Past", "fill_slots", "past_names", "prompt_past"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Past:
    """Keys and values at the start of every sequence.

    Attributes:
        tokens: Number of virtual tokens.
        arrays: ``past_key_values.N.key|value`` -> ``(1, kv_heads, tokens, head_dim)``.
    """

    tokens: int
    arrays: Mapping[str, Array]

    def of_type(self, name: str, dtype: np.dtype[Any]) -> Array:
        """One of the arrays, which must be of the cache's type.

        Raises:
            FitError: it is of another.
        """
        array = self.arrays[name]
        if array.dtype != dtype:
            short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(str(dtype), str(dtype))
            hint = f"surgery prompt bake PROMPT BASE --as kv --dtype {short} writes it in that type"
            raise FitError(f"the soft prompt is {array.dtype}, but the cache is {dtype}", tensor=name, hint=hint)
        return array


def past_names(contract: Contract) -> list[str]:
    """``past_key_values.0.key``, ``past_key_values.0.value``, ...; of layers with keys and values."""
    layers = (layer for layer in range(contract.layers) if layer not in contract.convolutions)
    return [f"past_key_values.{layer}.{kind}" for layer in layers for kind in ("key", "value")]


def prompt_past(arrays: Mapping[str, Array], contract: Contract, *, file: str) -> Past:
    """Read the soft prompt in an adapter file.

    Raises:
        FitError: an extra or missing array, or a shape or type that differs from the cache's.
    """
    names = past_names(contract)
    if extra := sorted(set(arrays) - set(names)):
        raise FitError("not part of a soft prompt for this graph", file=file, tensor=extra[0])
    lengths = set()
    for name in names:
        if name not in arrays:
            raise FitError(f"the soft prompt has no array for {name}", file=file)
        shape = arrays[name].shape
        if len(shape) != 4 or (shape[0], shape[1], shape[3]) != (1, contract.kv_heads, contract.head_dim):
            expected = f"[1, {contract.kv_heads}, tokens, {contract.head_dim}]"
            raise FitError(f"has the shape {list(shape)}, but the cache takes {expected}", file=file, tensor=name)
        lengths.add(shape[2])
    if len(lengths) != 1 or not (tokens := lengths.pop()):
        raise FitError("the layers of the soft prompt differ in length, or have no tokens", file=file)
    return Past(tokens, {name: arrays[name] for name in names})


def fill_slots(
    adapters: Sequence[tuple[str, Mapping[str, Array]]],
    contract: Contract,
    inputs: Mapping[str, Port],
    optional: Collection[str] | None = None,
) -> dict[str, Array]:
    """Combine adapters, each with the name of its file, into arrays for the graph's inputs.

    Several LoRAs add up. A parameter that is replaced is so by one adapter.

    Slots that no adapter fills are empty: those that are not `optional` get factors of rank 0.

    Raises:
        FitError: the graph lacks a slot, half of a slot is missing, a shape or type does not fit, or two adapters replace
            one parameter.
    """
    pairs = {slot.A: slot.B for slot in contract.slots}
    arrays_by_input: dict[str, list[Array]] = {}
    free: dict[str, int] = {}
    for file, arrays in adapters:
        inputs_of_slots = {*pairs, *pairs.values(), *contract.replaceable}
        for name in sorted(set(arrays) & set(contract.replaceable)):
            if name in arrays_by_input:
                raise FitError("two adapters fill this input", file=file, tensor=name, hint="one at a time")
            _check_type(file, arrays, name, inputs)
            _check_sizes(file, arrays[name], name, inputs[name], free)
            arrays_by_input[name] = [arrays[name]]
        _check_complete(file, arrays, contract)
        if extra := sorted(set(arrays) - inputs_of_slots):
            has_slots = contract.slots or contract.replaceable
            reason = "the graph has no such slot" if has_slots else "the graph has no slots"
            near = closest(extra[0], inputs_of_slots) if has_slots else None
            hint = near or (
                "surgery convert writes it for this graph" if has_slots else "surgery insert gives it slots"
            )
            raise FitError(reason, file=file, tensor=extra[0], hint=hint)
        for a, b in pairs.items():
            if (a in arrays) != (b in arrays):
                raise FitError("the other half of this slot is missing", file=file, tensor=a if a in arrays else b)
            if a in arrays:
                _check(file, arrays, a, b, inputs)
                arrays_by_input.setdefault(a, []).append(arrays[a])
                arrays_by_input.setdefault(b, []).append(arrays[b])
    for a, b in pairs.items():
        if optional is not None and a not in arrays_by_input and not {a, b} <= {*optional}:
            arrays_by_input |= {a: [_empty(inputs[a])], b: [_empty(inputs[b])]}
    axis = {**dict.fromkeys(pairs, 1), **dict.fromkeys(pairs.values(), 0)}
    return {
        name: parts[0] if len(parts) == 1 else np.concatenate(parts, axis[name])
        for name, parts in arrays_by_input.items()
    }


def _empty(port: Port) -> Array:
    """A factor of rank 0."""
    return np.zeros([size if isinstance(size, int) else 0 for size in port.shape], port.dtype)


def _check(file: str, arrays: Mapping[str, Array], a: str, b: str, inputs: Mapping[str, Port]) -> None:
    for name in (a, b):
        _check_type(file, arrays, name, inputs)
    A, B = arrays[a], arrays[b]
    inner, outer = inputs[a].shape[0], inputs[b].shape[1]
    if A.ndim != 2 or B.ndim != 2 or A.shape[1] != B.shape[0] or A.shape[0] != inner or B.shape[1] != outer:
        slot = f"the slot takes [{show(inner)}, rank] and [rank, {show(outer)}]"
        text = f"the shapes are {list(A.shape)} and {list(B.shape)}, but {slot}"
        raise FitError(text, file=file, tensor=a)


def _check_type(file: str, arrays: Mapping[str, Array], name: str, inputs: Mapping[str, Port]) -> None:
    if arrays[name].dtype != inputs[name].dtype:
        text = f"is {arrays[name].dtype}, but the graph takes {inputs[name].dtype}"
        raise FitError(text, file=file, tensor=name, hint="write the adapter for this graph's type")


def _check_sizes(file: str, array: Array, name: str, port: Port, free: dict[str, int]) -> None:
    """Compare a parameter with its input; `free` collects the sizes of axes that have a name."""
    fits = array.ndim == len(port.shape)
    for size, expected in zip(array.shape, port.shape, strict=False):
        fits &= size == (free.setdefault(expected, size) if isinstance(expected, str) else expected)
    if not fits:
        wanted = [free.get(size, size) if isinstance(size, str) else size for size in port.shape]
        raise FitError(f"has the shape {list(array.shape)}, but the graph takes {wanted}", file=file, tensor=name)


def _check_complete(file: str, names: Collection[str], contract: Contract) -> None:
    """Refuse an adapter with a part of an inserted module: it comes whole or not at all."""
    for module in contract.inserted:
        whole = {name for name in contract.replaceable if name.startswith(f"{module['module']}.")}
        if whole & set(names) and (missing := sorted(whole - set(names))):
            raise FitError("a part of an inserted module is missing", file=file, tensor=missing[0])
