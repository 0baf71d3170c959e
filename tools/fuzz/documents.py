# SPDX-License-Identifier: Apache-2.0
"""Damage to JSON and to safetensors: another value, key, name, type or shape, most of it in files that are still well formed.

Every function takes a random generator and what it changes, and words that occur in other files.
"""

from __future__ import annotations

import json
import math
import random
import struct
from typing import Any

from .words import Words, json_of, places_of, safetensors_of

__all__ = ["another_name", "change_document", "change_tensors"]

_NUMBERS = (
    None, True, False, 0, 1, -1, 2, 3, 4, 7, 8, 64, 0.0, 0.5, -0.0, 1e-300, 1e300, 2**31, 2**53, 2**63, -(2**63), 10**40,
)  # fmt: skip
_STRINGS = (
    "", "0", "1", "1.5", "nan", "inf", "none", "all", "F32", "F16", "BF16", "I64", "U8", "BOOL", "a.b", ".", "/", "../../x", "\0",
    "(a+)+$", "[", "(?P<", ".*", "\ud800", "é", "weight", "x" * 300, "9" * 400,
)  # fmt: skip
ODD: tuple[Any, ...] = (*_NUMBERS, *_STRINGS, [], {}, [[]], [{}], {"": None}, [1, 2], ["a"])
RAW = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b'"\\ud800"',
    b"[" * 200 + b"]" * 200,
    b'{"a":' * 90 + b"1" + b"}" * 90,
)
BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1,
}  # fmt: skip
SIZES = (0, 1, 1, 2, 2, 3, 4, 5, 8, 16, 24, 40)


def _value(draw: random.Random, words: Words) -> Any:
    return draw.choice(words.values) if words.values and draw.random() < 0.4 else draw.choice(ODD)


def _edit(draw: random.Random, document: Any, words: Words) -> Any:
    """One place of a document with another value, no value, or another key."""
    places = places_of(document)
    if not places:
        return {draw.choice(words.keys or ("r",)): _value(draw, words)}
    place, key = draw.choice(places)
    choice = draw.random()
    if choice < 0.15:
        del place[key]
    elif choice < 0.35 and isinstance(place, dict):
        place[draw.choice(words.keys or ("r",))] = _value(draw, words)
    elif choice < 0.45 and isinstance(place, dict):
        place[draw.choice(words.keys or ("r",))] = place.pop(key)
    elif choice < 0.6:
        other, where = draw.choice(places)
        place[key] = json.loads(json.dumps(other[where]))
    elif choice < 0.7:
        place[key] = draw.choice(([place[key]], {"default": place[key]}, str(place[key])))
    elif choice < 0.8 and isinstance(place[key], int | float):
        place[key] = draw.choice((-place[key], place[key] + 1, place[key] * 2, float(place[key]), str(place[key])))
    else:
        place[key] = _value(draw, words)
    return document


def change_document(draw: random.Random, raw: bytes, words: Words) -> bytes:
    """JSON with one place changed, now and then with text in it that is not JSON."""
    text = json.dumps(_edit(draw, json_of(raw), words)).encode()
    if draw.random() < 0.08:
        cut = [i for i, byte in enumerate(text) if byte in b":,["]
        at = draw.choice(cut) + 1 if cut else 0
        text = text[:at] + draw.choice(RAW) + draw.choice((b"", b",")) + text[at:]
    return text


def another_name(draw: random.Random, name: str, words: Words) -> str:
    """Another name for a tensor."""
    parts = name.split(".")
    choice = draw.random()
    if choice < 0.2 and words.names:
        return draw.choice(words.names)
    if choice < 0.45 and words.segments:
        parts[-1 - min(int(draw.expovariate(1)), len(parts) - 1)] = draw.choice(words.segments)
    elif choice < 0.6 and words.segments:
        parts.insert(draw.randrange(len(parts) + 1), draw.choice(words.segments))
    elif choice < 0.75:
        del parts[draw.randrange(len(parts))]
    elif choice < 0.85 and words.names:
        other = draw.choice(words.names).split(".")
        parts = parts[: draw.randrange(len(parts) + 1)] + other[draw.randrange(len(other)) :]
    elif choice < 0.93:
        return draw.choice(
            (name.replace(".", "_"), name.replace("_", "."), name.upper(), f"{name}.", f".{name}", name * 2)
        )
    else:
        parts[draw.randrange(len(parts))] = draw.choice(
            ("", "0", "99999999999", "-1", "\u0663", "a\nb", "\x1b[31m", "\ud7ff", "x" * 500)
        )
    return ".".join(parts)


def _shape(draw: random.Random, shape: list[int]) -> list[int]:
    shape = list(shape)
    choice = draw.random()
    if choice < 0.3 and shape:
        shape[draw.randrange(len(shape))] = draw.choice(SIZES)
    elif choice < 0.45:
        shape.insert(draw.randrange(len(shape) + 1), draw.choice(SIZES))
    elif choice < 0.6 and shape:
        del shape[draw.randrange(len(shape))]
    elif choice < 0.75:
        shape.reverse()
    else:
        shape = [draw.choice(SIZES) for _ in range(draw.choice((0, 1, 2, 2, 3, 4, 5)))]
    return shape


def change_tensors(draw: random.Random, raw: bytes, words: Words) -> bytes:
    """Safetensors with another string, header or tensor, and now and then a wrong length of the header."""
    taken = safetensors_of(raw)
    assert taken is not None
    header, data = taken
    metadata = header.pop("__metadata__", None)
    if draw.random() < 0.25 and isinstance(metadata, dict | None):
        metadata = _free_strings(draw, metadata or {}, words)
    elif draw.random() < 0.12:
        header = _edit(draw, header, words)  # as a hostile writer would have it
    else:
        header, data = _rewritten(draw, header, data, words)
    whole = header if metadata is None or not isinstance(header, dict) else {"__metadata__": metadata, **header}
    text = json.dumps(whole).encode()
    text += b" " * (-len(text) % 8)
    length = len(text) if draw.random() < 0.99 else draw.choice((0, 2, len(text) - 1, len(text) + 8, 2**62, 2**64 - 1))
    return struct.pack("<Q", length) + text + data


def _free_strings(draw: random.Random, metadata: dict[str, Any], words: Words) -> Any:
    """Metadata with a string changed, or with JSON inside a string changed."""
    nested = [key for key, value in metadata.items() if isinstance(value, str) and value[:1] in ("{", "[")]
    if nested and draw.random() < 0.6:
        key = draw.choice(nested)
        metadata[key] = (
            change_document(draw, metadata[key].encode(), words).decode() if json_of(metadata[key].encode()) else "{"
        )
        return metadata
    key = draw.choice(words.keys or ("format",))
    value = _value(draw, words)
    metadata[key] = value if draw.random() < 0.1 else value if isinstance(value, str) else json.dumps(value)
    return metadata if draw.random() < 0.97 else value


def _rewritten(draw: random.Random, header: dict[str, Any], data: bytes, words: Words) -> tuple[dict[str, Any], bytes]:
    """A file whose header and data agree, with a tensor renamed, removed, copied, or of another type or shape."""
    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            tensors[name] = str(entry["dtype"]), [int(size) for size in entry["shape"]], data[begin:end]
        except (TypeError, KeyError, ValueError, OverflowError):
            continue  # damaged before
    for name in draw.sample(list(tensors), min(len(tensors), 1 + int(draw.expovariate(0.7)))):
        dtype, shape, values = tensors[name]
        choice = draw.random()
        if choice < 0.15:
            del tensors[name]
        elif choice < 0.45:
            del tensors[name]
            tensors[another_name(draw, name, words)] = dtype, shape, values
        elif choice < 0.55:
            tensors[another_name(draw, name, words)] = dtype, shape, values
        elif choice < 0.62:
            tensors[name] = dtype, shape, _odd_values(draw, dtype, len(values))
        elif choice < 0.7:
            tensors[name] = dtype, shape[::-1], values
        else:
            dtype = draw.choice(list(BYTES)) if draw.random() < 0.25 else dtype
            shape = _shape(draw, shape) if draw.random() < 0.8 else shape
            count = BYTES.get(dtype, 4) * math.prod(shape)
            if 0 <= count <= 1 << 18:
                tensors[name] = (
                    dtype,
                    shape,
                    (values * (1 + count // max(len(values), 1)))[:count] if values else bytes(count),
                )
    made: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape, values) in tensors.items():
        made[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(values)]}
        at += len(values)
    return made, b"".join(values for _, _, values in tensors.values())


def _odd_values(draw: random.Random, dtype: str, nbytes: int) -> bytes:
    """Zeros, ones, great and small numbers, NaN."""
    size = BYTES.get(dtype, 4)
    patterns = (b"\0", b"\xff", b"\x7f", b"\x80", b"\x01", b"\x3f")
    return ((draw.choice(patterns) * size) * (nbytes // size + 1))[:nbytes]
