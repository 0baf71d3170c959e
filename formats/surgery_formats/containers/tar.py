# SPDX-License-Identifier: Apache-2.0
"""Tar archives: where each member's bytes lie. Nothing is unpacked, so that names lead nowhere.

Layout: POSIX.1-2001 pax interchange format and ustar, and GNU's long names and binary sizes.
"""

from __future__ import annotations

import os

from surgery_formats.containers.stored_zip import Member
from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import File, first_bytes
from surgery_formats.text import show

__all__ = ["is_tar", "tar_members"]

_BLOCK = 512
_MEMBERS = 10_000
_EXTENSION_LIMIT = 1 << 16
_REGULAR, _FOLDER, _PAX, _LONG_NAME = b"0\x007", b"5", b"xg", b"L"


def is_tar(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins with the header of a member."""
    return (first_bytes(path, _BLOCK) or b"")[257:262] == b"ustar"


def tar_members(file: File) -> dict[str, Member]:
    """Every regular file of the archive by name, without a leading ``./``.

    Raises:
        MalformedError: not such an archive, a member that is no plain file or folder, or a name twice.
    """
    found: dict[str, Member] = {}
    at, name, size = 0, "", -1  # the latter two from extensions of the next header
    for _ in range(2 * _MEMBERS):
        if at + _BLOCK > file.size:
            raise MalformedError("the tar archive is cut short", file=file.path)
        header = bytes(file.read(at, _BLOCK))
        if not any(header):
            return found
        kind, nbytes = header[156:157], _number(header[124:136], file)
        if _number(header[148:156], file) != sum(header[:148]) + 8 * 32 + sum(header[156:]):
            raise MalformedError("the header of a tar member is damaged", file=file.path)
        begin = at + _BLOCK
        nbytes = size if size >= 0 and kind not in _PAX + _LONG_NAME else nbytes
        if begin + nbytes > file.size:
            raise MalformedError("a tar member reaches beyond the archive", file=file.path)
        at = begin + -(-nbytes // _BLOCK) * _BLOCK
        if kind in _PAX + _LONG_NAME:
            if nbytes > _EXTENSION_LIMIT:
                raise MalformedError(f"{nbytes} bytes of names of a tar member", file=file.path)
            content = bytes(file.read(begin, nbytes))
            if kind == _LONG_NAME:
                name = _text(content, file)
                continue
            records = _records(content, file)
            if kind == b"g" and records.keys() & {"path", "size"}:  # programs differ in whether these reach a member
                raise MalformedError("a name or a size for all tar members", file=file.path)
            name = records.get("path", name)
            size = _decimal(records["size"], file) if "size" in records else size
            continue
        prefix = _text(header[345:500], file) if header[257:263] == b"ustar\x00" else ""
        known = name or "/".join(part for part in (prefix, _text(header[:100], file)) if part)
        name, size = "", -1
        if kind in _REGULAR:
            known = known.removeprefix("./")
            if known in found:
                raise MalformedError(f"the tar member '{show(known)}' appears twice", file=file.path)
            found[known] = Member(known, begin, nbytes)
        elif kind != _FOLDER:
            raise MalformedError(f"the tar member '{show(known)}' is no plain file", file=file.path)
    raise MalformedError(f"more than {_MEMBERS} members", file=file.path)


def _text(raw: bytes, file: File) -> str:
    try:
        return raw.split(b"\x00", 1)[0].decode()
    except UnicodeDecodeError as error:
        raise MalformedError("the name of a tar member is not UTF-8", file=file.path) from error


def _number(raw: bytes, file: File) -> int:
    """A field of a header: octal digits, or GNU's binary form."""
    if raw[0] == 0x80:
        return int.from_bytes(raw[1:], "big")
    digits = raw.strip(b" \x00")
    if not all(digit in b"01234567" for digit in digits):
        raise MalformedError("the header of a tar member is damaged", file=file.path)
    return int(digits or b"0", 8)


def _decimal(text: str, file: File) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise MalformedError("the size of a tar member is no number", file=file.path)
    return int(text)


def _records(content: bytes, file: File) -> dict[str, str]:
    """``length key=value`` lines."""
    records: dict[str, str] = {}
    at = 0
    while at < len(content):
        digits, space, _ = content[at : at + 20].partition(b" ")
        length = _decimal(digits.decode("latin-1"), file) if space else 0
        line = content[at + len(digits) + 1 : at + length]
        key, equals, value = line.removesuffix(b"\n").partition(b"=")
        if not equals or not line.endswith(b"\n") or at + length > len(content):
            raise MalformedError("the extended header of a tar member is damaged", file=file.path)
        if key.startswith(b"GNU.sparse"):
            raise MalformedError("a tar member with holes", file=file.path)
        records[_text(key, file)] = _text(value, file)
        at += length
    return records
