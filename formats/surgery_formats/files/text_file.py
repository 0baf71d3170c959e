# SPDX-License-Identifier: Apache-2.0
"""A user's text: UTF-8, and nothing else taken for it."""

from __future__ import annotations

import os

from surgery_formats.errors import FitError, MalformedError
from surgery_formats.files.raw import open_file

__all__ = ["read_text_file"]

_MOST = 256 << 20  # bytes that are tokenised in one piece
_CUT = 3  # bytes of a character that a limit may cut off


def read_text_file(path: str | os.PathLike[str], limit: int | None = None) -> tuple[bytes, bool]:
    """The text, or as many whole characters of it as have `limit` bytes, and whether it goes on.

    Raises:
        NotFoundError, MalformedError: no file, or not UTF-8.
        FitError: nothing in it, or too much.
    """
    source = open_file(path)
    size = source.size if limit is None else min(limit, source.size)
    if size > _MOST:
        raise FitError(f"has {source.size:,} bytes (at most {_MOST:,} are read)", file=path, hint="give a part of it")
    data = bytes(source.read(0, size))
    limited = size < source.size
    end = size
    try:
        data.decode()
    except UnicodeDecodeError as error:
        end = error.start
        if not limited or size - end > _CUT or error.reason != "unexpected end of data":
            raise MalformedError(
                f"not a text in UTF-8 (byte {error.start})",
                file=path,
                hint="convert it, for example with iconv -t UTF-8",
            ) from error
    if b"\0" in data:
        raise MalformedError(
            f"not a text: byte {data.index(0)} is zero, as in UTF-16", file=path, hint="convert it to UTF-8"
        )
    if not data[:end].strip():
        hint = "give a higher limit of bytes" if limited else "give a file that has one"
        raise FitError("there is no text in it", file=path, hint=hint)
    return data[:end], limited
