# SPDX-License-Identifier: Apache-2.0
"""Zip archives of members that are stored as they are, of torch, numpy and Keras: where each member's bytes lie.

Only what these programs write is accepted: members stored (not compressed, so there are no zip bombs), not
encrypted, not overlapping, named once, in one archive that begins at byte 0 and ends at the last byte. Then
there is one way to read the file, and every loader and scanner sees the same members (differences between
them are how malicious checkpoints hide).
Layout: PKWARE APPNOTE.TXT 6.3, sections 4.3.7, 4.3.12, 4.3.14-4.3.16, 4.5.3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import File
from surgery_formats.text import show

__all__ = ["Member", "members"]

_END = struct.Struct("<4s4H2LH")  # end of central directory
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_DIRECTORY_LIMIT = 64 << 20
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_SATURATED = 0xFFFFFFFF  # the value is in the zip64 extra field


@dataclass(frozen=True, slots=True)
class Member:
    """One stored member: ``file[offset : offset + nbytes]``."""

    name: str
    offset: int
    nbytes: int


def _directory(file: File) -> tuple[int, int, int]:
    """``(offset, nbytes, entries)`` of the central directory, with nothing but its end records behind it."""

    def fail(what: str) -> MalformedError:
        return MalformedError(what, file=file.path)

    at = file.size - _END.size
    if at < 0:
        raise fail("too short for a zip archive")
    magic, disk, first_disk, here, entries, nbytes, offset, comment = _END.unpack(file.read(at, _END.size))
    if magic != b"PK\x05\x06" or comment:
        raise fail("the zip directory is not at the end of the file (cut short, or something was added)")
    if disk or first_disk or here != entries:
        raise fail("a zip archive of several parts")
    if at >= _END64_LOCATOR.size + _END64.size:
        locator = _END64_LOCATOR.unpack(file.read(at - _END64_LOCATOR.size, _END64_LOCATOR.size))
        if locator[0] == b"PK\x06\x07":
            at -= _END64_LOCATOR.size + _END64.size
            if locator[2] != at:
                raise fail("the zip64 end record is not where its locator says")
            magic, size, _, _, disk, first_disk, here, entries, nbytes, offset = _END64.unpack(
                file.read(at, _END64.size)
            )
            if magic != b"PK\x06\x06" or size != _END64.size - 12 or disk or first_disk or here != entries:
                raise fail("the zip64 end record is damaged")
    if offset + nbytes != at:
        raise fail("bytes before or after the zip archive")
    if nbytes > _DIRECTORY_LIMIT or entries * _CENTRAL.size > nbytes:
        raise fail(f"a zip directory of {nbytes} bytes for {entries} members")
    return offset, nbytes, entries


def _zip64(extra: bytes, values: list[int]) -> list[int]:
    """`values` (size, compressed size, offset), the saturated ones taken from the zip64 extra field."""
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        field = extra[at + 4 : at + 4 + length]
        if tag == 1:
            for i, value in enumerate(values):
                if value == _SATURATED and len(field) >= 8:
                    values[i], field = int.from_bytes(field[:8], "little"), field[8:]
            break
        at += 4 + length
    return values


def members(file: File) -> dict[str, Member]:
    """Every member of the archive by name, in order of position.

    Raises:
        MalformedError: not a zip archive, or one of another kind.
    """
    start, nbytes, entries = _directory(file)
    raw = bytes(file.read(start, nbytes))

    def fail(what: str, name: str) -> MalformedError:
        return MalformedError(f"zip member '{show(name)}': {what}", file=file.path)

    placed: list[tuple[int, int, Member]] = []
    at = 0
    for _ in range(entries):
        if at + _CENTRAL.size > nbytes:
            raise MalformedError("the zip directory is cut short", file=file.path)
        magic, _, _, flags, method, _, _, _, packed, size, *rest = _CENTRAL.unpack_from(raw, at)
        name_len, extra_len, comment_len, _, _, _, local = rest
        at += _CENTRAL.size
        plain = raw[at : at + name_len]
        extra = raw[at + name_len : at + name_len + extra_len]
        at += name_len + extra_len + comment_len
        if magic != b"PK\x01\x02" or at > nbytes:
            raise MalformedError("the zip directory is damaged", file=file.path)
        name = plain.decode("utf-8", "backslashreplace")
        size, packed, local = _zip64(extra, [size, packed, local])
        if method or size != packed:
            raise fail("it is compressed; only members stored as they are can be read", name)
        if flags & _ENCRYPTED:
            raise fail("it is encrypted", name)
        if local + _LOCAL.size > start:
            raise fail("it lies outside the archive", name)
        head = _LOCAL.unpack(file.read(local, _LOCAL.size))
        data = local + _LOCAL.size + head[9] + head[10]
        if head[0] != b"PK\x03\x04" or head[3] or head[2] & _ENCRYPTED or head[9] != name_len:
            raise fail("its local header disagrees with the directory", name)
        if data + size > start:
            raise fail("it reaches beyond the archive", name)
        if bytes(file.read(local + _LOCAL.size, name_len)) != plain:
            raise fail("it has another name in its local header", name)
        placed.append((local, data + size, Member(name, data, size)))
    if at != nbytes:
        raise MalformedError("bytes between the zip directory's entries and its end", file=file.path)

    placed.sort(key=lambda item: item[:2])
    result: dict[str, Member] = {}
    end = 0
    for local, stop, member in placed:
        if member.name in result:
            raise fail("it appears twice", member.name)
        if local < end or (not result and local != 0):
            raise fail("it overlaps another member" if local else "bytes before the archive", member.name)
        result[member.name] = member
        end = stop
    return result
