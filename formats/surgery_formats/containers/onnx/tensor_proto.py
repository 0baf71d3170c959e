# SPDX-License-Identifier: Apache-2.0
"""One ``TensorProto``: what it says of itself, where its values lie, and the message without them."""

from __future__ import annotations

from dataclasses import dataclass

from surgery_formats.containers.base import MAX_DIMS, SIZE_LIMIT
from surgery_formats.containers.onnx.elements import STRING
from surgery_formats.containers.onnx.wire import BYTES, VARINT, Field, Pieces, WireReader, varints
from surgery_formats.errors import MalformedError

__all__ = ["KEPT", "FoundTensor", "find_tensor"]

KEPT = 1024
"""Bytes of a tensor up to which its values stay in the graph: shapes, axes and scalars, which readers of it need."""
_DIMS, _TYPE, _SEGMENT, _NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 3, 8, 9, 13, 14
_VALUES = frozenset((4, 5, 6, 7, _RAW, 10, 11))
_ONCE = frozenset((_TYPE, _NAME, _RAW, _LOCATION))
_AS_IN_MEMORY = frozenset(((4, 1), (4, 14), (10, 11)))  # field and type of floats, which lie as raw bytes do if packed
_ELSEWHERE = 1  # DataLocation.EXTERNAL
_SHAPE_NBYTES = 1024


@dataclass(frozen=True, slots=True)
class FoundTensor:
    """A tensor of a graph.

    Attributes:
        key: Its name in the graph, see `surgery_formats.containers.onnx.walk`.
        holder: ``initializer``, ``Constant``, ``attribute`` or ``SparseTensor``.
        elements: Number of its type.
        shape: Its sizes.
        message: Range of the whole message in the file.
        raw: Range of its values if they lie there as they are in memory.
        external: What it says of its place in another file, or None.
    """

    key: str
    holder: str
    elements: int
    shape: tuple[int, ...]
    message: tuple[int, int]
    raw: tuple[int, int] | None
    external: dict[str, str] | None


def find_tensor(
    reader: WireReader, whole: Field, holder: str, scope: str, key: str = ""
) -> tuple[FoundTensor, Pieces | None]:
    """The tensor in the field `whole`, and its message without values; None if those stay.

    Args:
        reader: Of the file.
        whole: The field that holds it.
        holder: What `FoundTensor.holder` is to be.
        scope: What its own name is put behind.
        key: Its name, if that is not its own.

    Raises:
        MalformedError: no tensor, or one that means two things.
    """
    if whole.wire != BYTES:
        raise reader.malformed(whole.start)
    large = whole.end - whole.begin > KEPT
    shape: list[int] = []
    once: dict[int, Field] = {}
    external: dict[str, str] = {}
    values: dict[int, list[Field]] = {}
    rest = Pieces()

    def fail(what: str) -> MalformedError:
        named = key or (scope + reader.text(once[_NAME]) if _NAME in once else None)
        return MalformedError(what, file=reader.file.path, tensor=named)

    for one in reader.fields(whole.begin, whole.end):
        number = one.number
        if number in _ONCE and once.setdefault(number, one) is not one:
            raise fail("a field of it stands twice")
        if number in _VALUES:
            if one.wire == BYTES and one.begin == one.end:
                continue  # an empty field is none
            if len(seen := values.setdefault(number, [])) < 2:
                seen.append(one)
            if large:
                continue
        elif number == _DIMS:
            shape += _sizes(reader, one)
            if len(shape) > MAX_DIMS:
                break
        elif number == _EXTERNAL:
            external |= _entry(reader, one)
        elif number == _SEGMENT:
            raise fail("is a segment of a tensor, which no program reads")
        rest.keep(one.start, one.end)
    if len(shape) > MAX_DIMS or any(size >= SIZE_LIMIT for size in shape):
        raise fail(f"its shape is not a list of at most {MAX_DIMS} sizes")
    elsewhere = _LOCATION in once and once[_LOCATION].value == _ELSEWHERE
    if len(values) > 1 or (elsewhere and values):
        raise fail("holds values in two places")
    elements = once[_TYPE].value if _TYPE in once else 0
    if not values and not elsewhere and elements != STRING and 0 not in shape:
        raise fail("has no values")
    found = FoundTensor(
        key or scope + (reader.text(once[_NAME]) if _NAME in once else ""),
        holder,
        elements,
        tuple(shape),
        (whole.begin, whole.end),
        next((_raw(number, elements, fields) for number, fields in values.items()), None),
        external if elsewhere else None,
    )
    return found, rest if large and values else None


def _raw(number: int, elements: int, fields: list[Field]) -> tuple[int, int] | None:
    as_in_memory = number == _RAW or (number, elements) in _AS_IN_MEMORY
    if not as_in_memory or len(fields) > 1 or fields[0].wire != BYTES:
        return None
    return fields[0].begin, fields[0].end


def _sizes(reader: WireReader, one: Field) -> tuple[int, ...]:
    if one.wire == VARINT:
        return (one.value,)
    within = one.wire == BYTES and one.end - one.begin <= _SHAPE_NBYTES
    sizes = varints(reader.between(one.begin, one.end), MAX_DIMS) if within else None
    if sizes is None:
        raise reader.malformed(one.start)
    return sizes


def _entry(reader: WireReader, one: Field) -> dict[str, str]:
    """A ``StringStringEntryProto``."""
    if one.wire != BYTES:
        raise reader.malformed(one.start)
    parts = {part.number: part for part in reader.fields(one.begin, one.end)}
    return {reader.text(parts[1]) if 1 in parts else "": reader.text(parts[2]) if 2 in parts else ""}
