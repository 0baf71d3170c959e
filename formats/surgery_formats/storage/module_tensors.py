# SPDX-License-Identifier: Apache-2.0
"""The stored tensors of quantised modules, found by their names, and what a configuration says of their groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = [
    "FLOATS",
    "check_bits",
    "check_types",
    "clear_size",
    "group_size",
    "is_rotated",
    "module_tensors",
    "settings_of",
]

FLOATS = (DType.F16, DType.BF16, DType.F32)
"""Types of scales."""

_KEYS = {"bits": "bits", "w_bit": "bits", "group_size": "group_size", "q_group_size": "group_size"}
_NESTED = ("dynamic", "extra_config")
_ROTATIONS = ("rotation", "rotation_config", "spinquant_config")
_USUAL = (128, 64, 32, 256, 512, 1024, 16)


def module_tensors(
    tensors: Mapping[str, StoredTensor], needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, StoredTensor]]]:
    """Every module that has a tensor ``X`` + the first ending of `needed`: its name X, and its tensors by ending.

    Args:
        tensors: Of a network, by name.
        needed: Endings of a module's tensors, the first two of them its own.
        optional: Endings of others that it may have.

    Raises:
        MalformedError: one with the first or the second ending lacks a tensor.
    """
    first, second = needed[:2]
    for name, tensor in tensors.items():
        if not name.endswith((first, second)):
            continue
        stem = name.removesuffix(first).removesuffix(second)
        lacking = next((stem + other for other in needed if stem + other not in tensors), None)
        if lacking is not None:
            raise MalformedError(f"there is no '{show(lacking)}' beside it", file=tensor.path, tensor=name)
        if not name.endswith(first):
            continue
        own = {each: tensors[stem + each] for each in (*needed, *optional) if stem + each in tensors}
        yield stem, own


def settings_of(named: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """All numbers of bits, and sizes of groups, that a configuration names: for all layers, then for some."""
    found: dict[str, list[int]] = {}
    layers = [named.get(key) for key in _NESTED]
    for holder in (named, *(each for layer in layers if isinstance(layer, Mapping) for each in layer.values())):
        for key, value in holder.items() if isinstance(holder, Mapping) else ():
            if key in _KEYS and isinstance(value, int) and not isinstance(value, bool):
                found.setdefault(_KEYS[key], []).append(value)
    return {key: tuple(dict.fromkeys(values)) for key, values in found.items()}


def is_rotated(named: Mapping[str, Any]) -> bool:
    """Whether layers get their inputs rotated (QuaRot, SpinQuant), so that their weights are not the model's."""
    return any(named.get(key) for key in _ROTATIONS)


def group_size(count: int, groups: int, named: tuple[int, ...], scales: StoredTensor) -> int:
    """Inputs of a group, if `count` inputs have so many groups: see `clear_size`."""

    def fits(size: int) -> bool:
        return -(-count // size) == groups

    even = [count // groups] if count % groups == 0 else []
    usual = [count] if groups == 1 else [size for size in _USUAL if fits(size)] or even
    return clear_size(count, named, usual, fits, f"{count} inputs are not clearly in {groups} groups", scales)


def clear_size(
    count: int,
    named: Iterable[int],
    usual: Iterable[int],
    fits: Callable[[int], bool],
    unclear: str,
    tensor: StoredTensor,
) -> int:
    """Inputs of a group.

    Args:
        count: Inputs of the layer.
        named: Sizes that the configuration names for any layer, -1 for all inputs.
        usual: Sizes that may be meant where it names none.
        fits: Whether groups of a size have the shapes that are stored.
        unclear: What to say where not one size fits.
        tensor: Whose shape tells, for messages.

    Raises:
        MalformedError: not one size fits, or none of those that are named, for which a program would make room.
    """
    told = dict.fromkeys(count if size == -1 else min(size, count) for size in named if size == -1 or size > 0)
    by_shape = sorted(size for size in usual if fits(size))
    fitting = sorted(filter(fits, told)) if told else by_shape
    if len(fitting) == 1:
        return fitting[0]
    if told and not fitting and by_shape:
        what = f"has groups of {_either(by_shape)} inputs, where its configuration says {_either(told)}"
    else:
        what = unclear + (f" of {_either(fitting)} inputs" if fitting else "")
    raise MalformedError(what, file=tensor.path, tensor=tensor.name)


def check_bits(bits: int, named: tuple[int, ...], tensor: StoredTensor) -> None:
    """Raise MalformedError if the configuration names other bits of a code than the shape of `tensor` tells."""
    if named and bits not in named:
        what = f"has codes of {bits} bits, where its configuration says {_either(named)}"
        raise MalformedError(what, file=tensor.path, tensor=tensor.name)


def _either(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, numbers))


def check_types(tensor: StoredTensor, dtypes: tuple[DType, ...], axes: tuple[int, ...] = (2,)) -> None:
    """Raise MalformedError unless it is of one of these types and numbers of axes, and not empty."""
    if tensor.dtype not in dtypes or len(tensor.shape) not in axes or 0 in tensor.shape:
        types, counts = " or ".join(dtype.label for dtype in dtypes), " or ".join(map(str, axes))
        raise MalformedError(
            f"is {tensor.dtype.label} {list(tensor.shape)}, not {types} of {counts} axes",
            file=tensor.path,
            tensor=tensor.name,
        )
