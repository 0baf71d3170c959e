# SPDX-License-Identifier: Apache-2.0
"""The safetensors container: a bounded header parser and a deterministic header writer.

Format (https://github.com/huggingface/safetensors, "Format"): 8 bytes of little-endian header length, that
many bytes of JSON ``{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}``,
then the data, little endian, C order.

This reader accepts a subset of what the reference implementation accepts, so that no file means two
things: besides its rules (ranges contiguous, without holes, overlaps or trailing bytes; sizes without
overflow; whole bytes) a name may appear only once, ``{`` comes first, and entries hold nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from surgery_formats.collector import collector_paused
from surgery_formats.containers.base import (
    CUT_OFF,
    MAX_DIMS,
    SIZE_LIMIT,
    FileLayout,
    Shard,
    ShardSet,
    TensorSpec,
    one_file,
)
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError, SurgeryError
from surgery_formats.files.bounded_json import parse_object
from surgery_formats.files.raw import File, open_file
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["METADATA_KEY", "SAFETENSORS", "layout", "open_safetensors", "read_header", "reference_order"]

_HEADER_LIMIT = 100_000_000  # the reference's MAX_HEADER_SIZE
METADATA_KEY = "__metadata__"
_LENGTH_NBYTES = 8
_ALIGNMENT = 8
_OVERFLOW = 1 << 64  # the reference multiplies sizes as 64-bit unsigned integers
_KEYS = frozenset(("dtype", "shape", "data_offsets"))
_BY_LABEL = {dtype.label: dtype for dtype in DType}
_REFERENCE_RANK = {  # order of the reference's Dtype enum, which it sorts by, widest last
    label: rank
    for rank, label in enumerate(
        (
            *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"),
            *("F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16"),
            *("I32", "U32", "F32", "C64", "F64", "I64", "U64"),
        )
    )
}


def _check_text(texts: Iterable[str], file: File) -> None:
    """Lone surrogates cannot be written as UTF-8; the reference refuses them, Python's JSON does not."""
    listed = list(texts)
    try:
        "".join(listed).encode()
    except UnicodeEncodeError:
        for text in listed:
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise MalformedError(f"'{show(text)}' is not Unicode (a lone surrogate)", file=file.path) from None


def _refuse_minus_zero(raw: bytearray, file: File) -> None:
    """``-0`` is the integer 0 for Python and a float, hence no size, for the reference."""

    def integer(text: str) -> int:
        if text.startswith("-"):
            raise MalformedError(f"a negative size or offset ({show(text, 40)})", file=file.path)
        return 0

    if b"-0" in raw:
        json.loads(raw.decode(), parse_int=integer)


def _metadata(metadata: Any, file: File) -> dict[str, str]:
    if type(metadata) is not dict:
        raise MalformedError(f"{METADATA_KEY} is not an object", file=file.path)
    for key, value in metadata.items():
        if type(value) is not str:
            raise MalformedError(f"{METADATA_KEY}: '{show(key)}' is not a string", file=file.path)
    _check_text(metadata, file)
    _check_text(metadata.values(), file)
    return metadata


def _brief(value: Any) -> str:
    """A wrong value for a message; containers by type only (they may be deep, or large)."""
    return f"'{show(value, 40)}'" if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _nbytes(dtype: DType, shape: Sequence[int]) -> int | str:
    """Bytes of a tensor, or what is wrong with its sizes."""
    bits = 1
    for size in shape:
        bits *= size
        if bits >= _OVERFLOW:
            return "the number of elements overflows"
    bits *= dtype.bits
    if bits >= _OVERFLOW:
        return "the number of bytes overflows"
    return f"{bits} bits are not whole bytes" if bits % 8 else bits // 8


def _entry(name: str, entry: Any, file: File) -> tuple[int, int, str, DType, tuple[int, ...]]:
    """``(begin, end, name, dtype, shape)`` of one entry, each checked by itself."""

    def fail(what: str) -> MalformedError:
        return MalformedError(what, file=file.path, tensor=name)

    if type(entry) is not dict:
        raise fail("its entry is not an object")
    if entry.keys() != _KEYS:
        odd = sorted(entry.keys() ^ _KEYS)[0]
        raise fail(f"its entry {'has the unknown key' if odd in entry else 'lacks'} '{show(odd)}'")
    label, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = _BY_LABEL.get(label) if type(label) is str else None
    if dtype is None:
        raise fail(f"unknown dtype {_brief(label)}")
    if type(shape) is not list or len(shape) > MAX_DIMS:
        raise fail(f"its shape is not a list of at most {MAX_DIMS} sizes")
    for size in shape:
        if (
            type(size) is not int or not 0 <= size < SIZE_LIMIT
        ):  # as `is_size`, without a call for each of 100,000 tensors
            raise fail(f"{_brief(size)} in its shape is not a size")
    if type(offsets) is not list or len(offsets) != 2 or type(offsets[0]) is not int or type(offsets[1]) is not int:
        raise fail("its data_offsets are not two integers")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise fail(f"its data_offsets [{begin}, {end}] are not a range")
    expected = _nbytes(dtype, shape)
    if isinstance(expected, str):
        raise fail(expected)
    if end - begin != expected:
        raise fail(f"{end - begin} bytes for {dtype.label} {shape}, which takes {expected}")
    return begin, end, name, dtype, tuple(shape)


def read_header(file: File) -> Shard:
    """Check the header of an open file as a whole, see `open_safetensors`."""

    def fail(what: str, tensor: str | None = None, hint: str | None = None) -> MalformedError:
        return MalformedError(what, file=file.path, tensor=tensor, hint=hint)

    if file.size < _LENGTH_NBYTES:
        raise fail(f"{file.size} bytes are too few for a safetensors file")
    length = int.from_bytes(file.read(0, _LENGTH_NBYTES), "little")
    available = file.size - _LENGTH_NBYTES
    if length > min(available, _HEADER_LIMIT):
        why = f"of which {available} are there" if length > available else f"at most {_HEADER_LIMIT} are read"
        raise fail(f"a header of {length} bytes, {why}", hint=CUT_OFF if length <= _HEADER_LIMIT else None)
    raw = file.read(_LENGTH_NBYTES, length)
    if raw[:1] != b"{":
        raise fail("the header does not begin with '{'")
    entries = parse_object(raw, file=file.path)
    _refuse_minus_zero(raw, file)
    noted = entries.pop(METADATA_KEY, None)  # null where MLX wrote the file; the reference takes that for none
    metadata = {} if noted is None else _metadata(noted, file)
    _check_text(entries, file)

    ranges = [_entry(name, entry, file) for name, entry in entries.items()]
    ranges.sort(key=itemgetter(0, 1))
    data = _LENGTH_NBYTES + length
    at = 0
    for begin, end, name, _, _ in ranges:
        if begin != at:
            hole = f"leaves a hole of {begin - at} bytes before it"
            raise fail(hole if begin > at else "overlaps the tensor before it", name)
        at = end
    there = file.size - data
    if at > there:
        raise fail(f"the file ends {at - there} bytes early", ranges[-1][2], CUT_OFF)
    if at < there:
        raise fail(f"{there - at} bytes after the last tensor")
    tensors = tuple(
        StoredTensor(name, dtype, shape, file, data + begin, end - begin) for begin, end, name, dtype, shape in ranges
    )
    return Shard(file.path, "safetensors", file, tensors, metadata, data)


def open_safetensors(path: str | os.PathLike[str]) -> Shard:
    """Open `path`, and check its header as a whole before any tensor is read.

    Tensors are in order of position; empty ones come before the tensor that starts at the same place.

    Raises:
        NotFoundError: no such file.
        MalformedError: not a regular file, or any rule of the format is broken; the message names the file and, where
            there is one, the tensor.
    """
    with collector_paused():
        return read_header(open_file(path))


def reference_order(entries: Iterable[TensorSpec]) -> list[TensorSpec]:
    """`entries` as the reference writes them: by its enum of element types, widest first, then by name."""
    return sorted(entries, key=lambda entry: (-_REFERENCE_RANK[entry[1].label], entry[0]))


def layout(
    entries: Sequence[TensorSpec], metadata: Mapping[str, str], alignment: int = 1
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header for `entries` in the order given, and where the bytes of each belong.

    The same input gives the same bytes: metadata sorted, ASCII JSON without spaces, padded with spaces to a
    multiple of 8, or so that the data begins at a multiple of `alignment`.

    Returns:
        The first bytes of the file, and ``{name: (absolute offset, nbytes)}``; the file ends with the last
        range.

    Raises:
        FitError: a name twice or reserved, sizes that overflow or are no whole bytes, text that is not
            Unicode, a header too large.
    """
    header: dict[str, Any] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name, dtype, shape in entries:
        if name in header or name == METADATA_KEY:
            raise FitError("the name is reserved" if name == METADATA_KEY else "the name appears twice", tensor=name)
        nbytes = _nbytes(dtype, shape)
        if isinstance(nbytes, str) or len(shape) > MAX_DIMS:
            raise FitError(f"cannot be stored: {nbytes if isinstance(nbytes, str) else 'too many axes'}", tensor=name)
        header[name] = {"dtype": dtype.label, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    for text in (*header, *metadata, *metadata.values()):
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise FitError(f"'{show(text)}' is not Unicode (a lone surrogate)")
    body = json.dumps(header, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")
    body += b" " * (-len(body) % _ALIGNMENT)
    body += b" " * (-(_LENGTH_NBYTES + len(body)) % alignment)
    if len(body) > _HEADER_LIMIT:
        raise FitError(f"a header of {len(body)} bytes (at most {_HEADER_LIMIT} can be read back)")
    data = _LENGTH_NBYTES + len(body)
    header.pop(METADATA_KEY, None)
    ranges = {
        name: (data + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
    }
    return len(body).to_bytes(_LENGTH_NBYTES, "little") + body, ranges


@dataclass(frozen=True, slots=True)
class _Safetensors:
    name: str = "safetensors"
    title: str = "model.safetensors"
    written_as: str = "safetensors"
    suffixes: tuple[str, ...] = (".safetensors",)

    def detect(self, path: Path) -> bool:
        """A file that begins with the length of a header, and then with the header's brace."""
        try:
            file = open_file(path)
            head = bytes(file.read(0, min(file.size, _LENGTH_NBYTES + 1)))
        except (SurgeryError, OSError):
            return False
        return (
            head[_LENGTH_NBYTES:] == b"{"
            and int.from_bytes(head[:_LENGTH_NBYTES], "little") + _LENGTH_NBYTES <= file.size
        )

    def open(self, path: Path) -> dict[str, ShardSet]:
        """See `open_safetensors`."""
        return one_file(replace(open_safetensors(path), container=self.name))

    def lay_out(self, tensors: Sequence[TensorSpec], like: Shard | None = None, alignment: int = 1) -> FileLayout:
        """The header of `like` byte for byte if it still describes the content, else one of our own (see `layout`)."""
        same = like is not None and like.container == self.name and like.header_nbytes > 0
        if like is not None and same and [(t.name, t.dtype, t.shape) for t in like.tensors] == list(tensors):
            header = bytes(like.file.read(0, like.header_nbytes))
            ranges = {tensor.name: (tensor.offset, tensor.nbytes) for tensor in like.tensors}
        else:
            header, ranges = layout(tensors, {"format": "pt", **(like.metadata if like else {})}, alignment)
        return FileLayout(header, ranges, max([len(header), *(offset + nbytes for offset, nbytes in ranges.values())]))


SAFETENSORS = _Safetensors()
