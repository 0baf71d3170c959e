# SPDX-License-Identifier: Apache-2.0
"""Where the weights on disk lie inside a parameter that transformers makes of them, without reading one.

A parameter is seen as matrices, one for each expert, each of pieces one below the other. The operations of the records
in ``eras.json`` move pieces about, so that what is left is a view of what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery_formats.errors import FitError
from surgery_formats.models.eras import Era
from surgery_formats.storage.parameter import Parameter
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.views import expert, interleaved, permute, rows, transpose, whole, window
from surgery_formats.text import listing

__all__ = ["SUPPORTED", "expert_parts", "matrices_of", "pieces_of"]

Matrix = tuple[Parameter, ...]
"""Pieces of one matrix, one below the other."""

Matrices = tuple[Matrix, ...]
"""One matrix, or one for each expert."""

SUPPORTED = frozenset(
    {"Chunk", "Concatenate", "Interleave", "MergeModulelist", "PermuteForRope", "Transpose", "Offset", "Together"}
)
"""Operations that are views. `Split` needs the sizes of the model's own parameters."""


def pieces_of(
    name: str, era: Era, stored: Callable[[str], Parameter], config: Mapping[str, Any]
) -> tuple[Parameter, ...]:
    """The pieces of the parameter `name`, each placed in it by its view's origin; empty if they cannot be told.

    Raises:
        FitError: an expert is missing from the checkpoint.
    """
    if era.conversion is None:
        (path,) = era.stored.values()
        return (_stacked(stored(path), name),)
    return tuple(_placed(matrices_of(name, era, stored, config)))


def matrices_of(name: str, era: Era, stored: Callable[[str], Parameter], config: Mapping[str, Any]) -> Matrices:
    """The matrices of the converted parameter `name`; empty if they cannot be told.

    Raises:
        FitError: an expert is missing from the checkpoint.
    """
    conversion = era.conversion
    if conversion is None:
        return ()
    if not all(step in SUPPORTED for step, _ in conversion.steps):
        return ()
    values = {number: _gathered(name, number, era, stored) for number in sorted({n for n, _ in era.stored})}
    if len(values) < len(conversion.patterns):
        return ()
    targets = len(conversion.targets)
    for step, given in conversion.steps:
        if step == "Concatenate":
            values = {0: _concatenated(list(values.values()), int(given.get("dim", 0)))}
        elif step == "Chunk":
            (stack,) = values.values()
            if "num_shards_attribute" in given or int(given.get("dim", 0)) != (len(stack) > 1):
                return ()
            values = {number: _chunk(stack, number, targets) for number in range(targets)}
        elif step == "Interleave":
            values = {number: tuple(_interleaved(matrix) for matrix in value) for number, value in values.items()}
        elif step == "Transpose":
            if not given.get("check_dims"):
                values = {number: _transposed(value) for number, value in values.items()}
        elif step == "PermuteForRope":
            values = {
                number: _rotated(value, config, given) if _rotates(conversion.targets[number], given) else value
                for number, value in values.items()
            }
        if any(not value for value in values.values()):
            return ()
    return values[era.part if len(values) > 1 else 0]


def expert_parts(pieces: Sequence[Parameter], number: int, position: int, count: int) -> tuple[Parameter, ...]:
    """Of a stack of experts the rows of part `position` of `count` of one expert, if they are pieces of their own."""
    (piece,) = pieces if len(pieces) == 1 else (None,)
    if piece is None or len(piece.sizes) != 3 or number >= piece.sizes[0] or not piece.is_whole:
        return ()
    (matrix,) = _experts(piece)[number]
    height = matrix.shape[0] // count
    return (replace(matrix, view=rows(matrix.view, position * height, (position + 1) * height)),)


def _gathered(name: str, number: int, era: Era, stored: Callable[[str], Parameter]) -> Matrices:
    """What the pattern `number` finds: a matrix, the experts of a stack, or experts that lie one by one."""
    found = sorted((at, path) for (of, at), path in era.stored.items() if of == number)
    if found[0][0] < 0:
        return _experts(stored(found[0][1]))
    if [at for at, _ in found] != list(range(len(found))):
        numbers = listing([str(at) for at, _ in found])
        raise FitError(f"the base has only the experts {numbers} of '{name}'", tensor=found[0][1])
    return tuple((stored(path),) for _, path in found)


def _stacked(parameter: Parameter, name: str) -> Parameter:
    """A tensor of three axes as a stack of experts where the model's code has no module of the name ``weight``."""
    storage = parameter.storage
    if len(parameter.sizes) != 3 or name.endswith(".weight") or storage.elements is None or not parameter.is_whole:
        return parameter
    stack = Plain.of(storage.elements, stacked=True)
    return replace(parameter, storage=stack, view=whole(stack.shape))


def _experts(parameter: Parameter) -> Matrices:
    if len(parameter.sizes) != 3 or parameter.storage.elements is None or not parameter.is_whole:
        return ((parameter,),)
    count, height, width = parameter.sizes
    stack = replace(parameter, storage=Plain.of(parameter.storage.elements, stacked=True))
    return tuple((replace(stack, view=expert(number, count, (height, width))),) for number in range(count))


def _concatenated(values: Sequence[Matrices], dim: int) -> Matrices:
    """Matrices below each other, or of each expert; nothing along columns."""
    counts = {len(value) for value in values}
    if len(counts) > 1 or dim != (counts != {1}):
        return ()
    return tuple(tuple(piece for matrix in matrices for piece in matrix) for matrices in zip(*values, strict=True))


def _chunk(value: Matrices, number: int, count: int) -> Matrices:
    """Part `number` of `count` of the rows of every matrix."""
    return tuple(tuple(_cut(matrix, number, count)) for matrix in value)


def _cut(matrix: Matrix, number: int, count: int) -> Iterator[Parameter]:
    height = -(-sum(piece.shape[0] for piece in matrix) // count)
    at = 0
    for piece in matrix:
        low, high = max(0, number * height - at), min(piece.shape[0], (number + 1) * height - at)
        if low < high:
            yield replace(piece, view=rows(piece.view, low, high))
        at += piece.shape[0]


def _interleaved(matrix: Matrix) -> Matrix:
    """Even rows, then odd ones."""
    if len(matrix) != 1:
        return ()
    (piece,) = matrix
    return tuple(replace(piece, view=rows(piece.view, first, piece.shape[0], 2)) for first in (0, 1))


def _transposed(value: Matrices) -> Matrices:
    if any(len(matrix) != 1 for matrix in value):
        return ()
    return tuple((replace(piece, view=transpose(piece.view)),) for (piece,) in value)


def _rotates(target: str, given: Mapping[str, Any]) -> bool:
    names = given.get("permute_layer_names")
    return names is None or any(name in target for name in names)


def _rotated(value: Matrices, config: Mapping[str, Any], given: Mapping[str, Any]) -> Matrices:
    """Rows of rotary pairs in halves, as the model's code has them."""
    part = config.get(str(given.get("subconfig_key")), config)
    heads = part.get("num_attention_heads") if isinstance(part, Mapping) else None
    if not isinstance(heads, int) or heads < 1 or any(len(matrix) != 1 for matrix in value):
        return ()
    if any(piece.shape[0] % (2 * heads) for (piece,) in value):
        return ()
    return tuple(
        (replace(piece, view=permute(piece.view, interleaved(heads, piece.shape[0] // heads))),) for (piece,) in value
    )


def _placed(value: Matrices) -> Iterator[Parameter]:
    """Every piece with the row of the whole parameter at which it begins."""
    row = 0
    for matrix in value:
        for piece in matrix:
            yield replace(piece, view=window(piece.view, row_origin=row))
            row += piece.shape[0]
