# SPDX-License-Identifier: Apache-2.0
"""The wire format of protocol buffers, read where it lies: fields of a message with the places of their bytes.

A parser of protocol buffers copies every value. This reader goes from field to field and skips what is long, so that a
graph of gigabytes is looked at in the memory of a window, and the place of each weight in the file is known.

Format: https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import File

__all__ = ["BYTES", "FIXED32", "FIXED64", "VARINT", "Field", "Pieces", "WireReader", "varint", "varints"]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types; groups are not among those that ONNX has."""

_WINDOW = 1 << 18
_LONGEST = 24  # bytes of a tag and a varint, and some to spare
_FIELDS = 20_000_000  # of a file; a graph of 100,000 nodes has some 2 million
_MASK = (1 << 64) - 1


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        number: Which field it is.
        wire: Its wire type.
        start: Position of its tag.
        begin: Position of its value.
        end: Position behind its value.
        value: Of a varint; else 0.
    """

    number: int
    wire: int
    start: int
    begin: int
    end: int
    value: int


class WireReader:
    """Messages of a file, read through a window."""

    def __init__(self, file: File) -> None:
        self.file = file
        self._start = self._stop = 0
        self._window = bytes(_LONGEST)
        self._left = _FIELDS

    def fields(self, begin: int, end: int) -> Iterator[Field]:
        """The fields of the message in bytes ``[begin, end)``, in order.

        Raises:
            MalformedError: they are not fields, or end elsewhere.
        """
        at = begin
        while at < end:
            if not self._start <= at <= self._stop - _LONGEST:
                self._load(at)
            window, base = self._window, self._start
            start, i = at, at - base
            key = window[i]
            i += 1
            if key > 0x7F:
                key, i = self._varint(i - 1)
            number, wire, value = key >> 3, key & 7, 0
            at = base + i
            if wire == BYTES:
                size = window[i]
                i += 1
                if size > 0x7F:
                    size, i = self._varint(i - 1)
                at = base + i
                stop = at + size
            elif wire == VARINT:
                value, i = self._varint(i)
                stop = base + i
            elif wire in (FIXED32, FIXED64):
                stop = at + (4 if wire == FIXED32 else 8)
            else:
                raise self.malformed(start)
            if stop > end or not number:
                raise self.malformed(start)
            self._left -= 1
            if self._left < 0:
                raise MalformedError(f"more than {_FIELDS} fields", file=self.file.path)
            yield Field(number, wire, start, at, stop, value)
            at = stop

    def between(self, begin: int, end: int) -> bytes:
        """Bytes ``[begin, end)`` of the file."""
        if self._start <= begin and end <= self._stop:
            return self._window[begin - self._start : end - self._start]
        return bytes(self.file.read(begin, end - begin))

    def text(self, field: Field) -> str:
        """The value of a field that holds a name.

        Raises:
            MalformedError: not UTF-8, or longer than names are.
        """
        if field.wire != BYTES or field.end - field.begin > 1 << 16:
            raise self.malformed(field.start)
        try:
            return self.between(field.begin, field.end).decode()
        except UnicodeDecodeError as error:
            raise MalformedError(f"a name at byte {field.begin} is not UTF-8", file=self.file.path) from error

    def malformed(self, at: int) -> MalformedError:
        """The error for what begins at byte `at`."""
        return MalformedError(f"not an ONNX model: what begins at byte {at} is no field of it", file=self.file.path)

    def _load(self, at: int) -> None:
        self._start, self._stop = at, min(at + _WINDOW, self.file.size)
        # Zeros behind the end spare a check of every byte; a field that reaches into them reaches beyond its message.
        self._window = bytes(self.file.read(at, self._stop - at)) + bytes(_LONGEST)
        if self._stop == self.file.size:
            self._stop += _LONGEST

    def _varint(self, i: int) -> tuple[int, int]:
        window, value, shift = self._window, 0, 0
        while shift < 70:
            byte = window[i]
            value |= (byte & 0x7F) << shift
            i += 1
            if byte < 0x80:
                return value & _MASK, i
            shift += 7
        raise self.malformed(self._start + i)


def varint(value: int) -> bytes:
    """`value` as it is written."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def varints(data: bytes, limit: int) -> tuple[int, ...] | None:
    """The numbers of a packed field; None if they are broken, or more than `limit`."""
    numbers, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(value & _MASK)
            value = shift = 0
        if shift >= 70 or len(numbers) > limit:
            return None
    return None if shift else tuple(numbers)


class Pieces:
    """A message without some of its bytes: ranges of a file, and bytes between them.

    Attributes:
        nbytes: Of the message.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[int, int] | bytes] = []
        self.nbytes = 0

    def keep(self, begin: int, end: int) -> None:
        """Append bytes ``[begin, end)`` of the file."""
        if begin == end:
            return
        self.nbytes += end - begin
        last = self._pieces[-1] if self._pieces else b""
        if isinstance(last, tuple) and last[1] == begin:
            self._pieces[-1] = last[0], end
        else:
            self._pieces.append((begin, end))

    def nest(self, field: Field, inner: Pieces) -> None:
        """Append `inner` as the message that `field` holds."""
        tag = varint(field.number << 3 | BYTES) + varint(inner.nbytes)
        self._pieces += (tag, *inner._pieces)
        self.nbytes += len(tag) + inner.nbytes

    def join(self, file: File) -> bytes:
        """The message."""
        return b"".join(
            piece if isinstance(piece, bytes) else file.read(piece[0], piece[1] - piece[0]) for piece in self._pieces
        )
