# SPDX-License-Identifier: Apache-2.0
"""Damage to bytes that costs a few microseconds: for parsers that take no longer."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence

from .target import Seed

__all__ = ["quickly_damaged", "tokens_of"]

_BYTES = (0, 1, 2, 0x20, 0x22, 0x2C, 0x2E, 0x30, 0x39, 0x3A, 0x5B, 0x5D, 0x7B, 0x7D, 0x7F, 0x80, 0xFF)
_WIDTHS = (1, 2, 4, 8)
_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    16,
    63,
    64,
    127,
    128,
    255,
    256,
    *(2**n - 1 for n in (16, 31, 32, 64)),
    *(2**n for n in (15, 31, 62, 63)),
)


_ODD = (
    *(
        b"NaN",
        b"1e999",
        b"-0",
        b"9" * 30,
        b"null",
        b"true",
        b"[",
        b"]",
        b"{}",
        b'""',
        b'"a":1,',
        b"\\ud800",
        b"\xed\xa0\x80",
        b"\xc3\xa9",
    ),
    *(
        b"\0" * 16,
        b"\xff" * 8,
        b"../x",
        b"/",
        b"\n",
        b"\r",
        b"\x1b[2J",
        b"'",
        b"\\",
        b"BF16",
        b"F4",
        b"()tR.",
        b"\x80\x02}q\x00.",
        b"PK\x05\x06",
    ),
)
_WORD = re.compile(rb"[\w./-]{2,40}")


def tokens_of(seeds: Iterable[Seed]) -> list[bytes]:
    """Words of the seeds, and odd ones."""
    found = [word for seed in seeds for raw in seed.files.values() for word in _WORD.findall(raw)]
    return [*dict.fromkeys(found), *_ODD]


def quickly_damaged(draw: random.Random, raw: bytes, tokens: Sequence[bytes]) -> bytes:
    """The bytes with one to four things changed.

    Args:
        draw: Decides what.
        raw: The bytes.
        tokens: What is put in, or in the place of other bytes.
    """
    number = draw.random
    made = bytearray(raw)
    for _ in range(1 + int(number() ** 2 * 4)):
        size = len(made)
        at = int(number() * (size + 1))
        choice = int(number() * 10)
        if choice < 2 and at < size:
            made[at] = _BYTES[int(number() * len(_BYTES))]
        elif choice == 2 and at < size:
            made[at] ^= 1 << int(number() * 8)
        elif choice < 5:
            width = _WIDTHS[int(number() * 4)]
            value = _NUMBERS[int(number() * len(_NUMBERS))] if number() < 0.7 else at
            made[at : at + width] = (value % 256**width).to_bytes(width, "little")
        elif choice == 5:
            del made[at : at + 1 + int(number() ** 3 * 40)]
        elif choice == 6:
            start = int(number() * size)
            made[at:at] = made[start : start + 1 + int(number() ** 3 * 60)]
        elif choice == 7 and number() < 0.3:
            del made[at:]
        else:
            token = tokens[int(number() * len(tokens))]
            made[at : at + (len(token) if number() < 0.5 else 0)] = token
    return bytes(made)
