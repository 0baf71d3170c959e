# SPDX-License-Identifier: Apache-2.0
"""Damage to files that knows what they are made of: JSON, safetensors, zip archives with pickles or arrays, and prefixed strings.

Every function takes a random generator, some bytes, and words that occur in other files; it returns other bytes.
"""

from __future__ import annotations

import io
import json
import math
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Words", "mutated"]

ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        4,
        7,
        8,
        64,
        0.0,
        0.5,
        -0.0,
        1e-300,
        1e300,
        2**31,
        2**53,
        2**63,
        -(2**63),
        10**40,
    ),
    *(
        "",
        "0",
        "1",
        "1.5",
        "nan",
        "inf",
        "none",
        "all",
        "F32",
        "F16",
        "BF16",
        "I64",
        "U8",
        "BOOL",
        "a.b",
        ".",
        "/",
        "../../x",
        "\0",
    ),
    *(
        "(a+)+$",
        "[",
        "(?P<",
        ".*",
        "\ud800",
        "é",
        "weight",
        "x" * 300,
        "9" * 400,
        [],
        {},
        [[]],
        [{}],
        {"": None},
        [1, 2],
        ["a"],
    ),
)
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
BITS = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
}
SIZES = (0, 1, 1, 2, 2, 3, 4, 5, 8, 16, 24, 40)


@dataclass(frozen=True)
class Words:
    """What other files hold.

    Attributes:
        names: Names of tensors.
        segments: Parts of such names.
        keys: Keys of JSON objects, headers' free strings among them.
        values: Values of JSON objects.
    """

    names: tuple[str, ...]
    segments: tuple[str, ...]
    keys: tuple[str, ...]
    values: tuple[Any, ...]

    @classmethod
    def of(cls, files: list[bytes]) -> Words:
        """Those of these files."""
        names: dict[str, None] = {}
        keys: dict[str, None] = {}
        values: dict[str, Any] = {}
        for raw in files:
            document = _json(raw)
            if (taken := _safetensors(raw)) is not None:
                document = taken[0].pop("__metadata__", {})
                names |= dict.fromkeys(taken[0])
            if document is not None:
                for place, key in _places(document):
                    keys |= {key: None} if isinstance(key, str) else {}
                    values[repr(place[key])[:200]] = place[key]
        segments = dict.fromkeys(part for name in names for part in name.replace("_", ".").split("."))
        leaves = dict.fromkeys(name.split(".", 1)[-1] for name in names)
        return cls(tuple(names), (*segments, *leaves), tuple(keys), tuple(values.values()))


Change = Callable[[random.Random, bytes, Words], bytes]


def mutated(draw: random.Random, files: dict[str, bytes], words: Words) -> dict[str, bytes]:
    """The files with one to five things changed in them."""
    files = dict(files)
    for _ in range(min(1 + int(draw.expovariate(1.2)), 5)):
        name = draw.choice(list(files))
        if len(files) > 1 and draw.random() < 0.04:
            del files[name]
        elif len(files) > 1 and draw.random() < 0.02:
            files[name] = files[draw.choice(list(files))]
        else:
            files[name] = _change(draw, files[name], words)
    return files


def _change(draw: random.Random, raw: bytes, words: Words) -> bytes:
    if draw.random() < 0.1:
        return _bytes(draw, raw, words)
    if raw.startswith(b"PK\x03\x04"):
        return _archive(draw, raw, words)
    if _safetensors(raw) is not None:
        return _tensors(draw, raw, words)
    if _json(raw) is not None:
        return _document(draw, raw, words)
    return draw.choice((_bytes, _numbers, _strings, _strings, _numbers))(draw, raw, words)


# --- JSON ---------------------------------------------------------------------------------------------------------------


def _json(raw: bytes) -> Any:
    if raw[:1] not in (b"{", b"["):
        return None
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every place of a document: its object or list, and the key in it."""
    found: list[tuple[Any, Any]] = []
    left = [document]
    while left:
        value = left.pop()
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in inner:
            found.append((value, key))
            left.append(item)
    return found


def _value(draw: random.Random, words: Words) -> Any:
    return draw.choice(words.values) if words.values and draw.random() < 0.4 else draw.choice(ODD)


def _edit(draw: random.Random, document: Any, words: Words) -> Any:
    """One place of a document with another value, no value, or another key."""
    places = _places(document)
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


def _document(draw: random.Random, raw: bytes, words: Words) -> bytes:
    text = json.dumps(_edit(draw, _json(raw), words)).encode()
    if draw.random() < 0.08:
        cut = [i for i, byte in enumerate(text) if byte in b":,["]
        at = draw.choice(cut) + 1 if cut else 0
        text = text[:at] + draw.choice(RAW) + draw.choice((b"", b",")) + text[at:]
    return text


# --- safetensors ----------------------------------------------------------------------------------------------------------


def _safetensors(raw: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Header and data."""
    if len(raw) < 10 or raw[8:9] != b"{":
        return None
    length = struct.unpack_from("<Q", raw)[0]
    header = _json(raw[8 : 8 + length]) if length <= len(raw) - 8 else None
    return (header, raw[8 + length :]) if isinstance(header, dict) else None


def _name(draw: random.Random, name: str, words: Words) -> str:
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


def _tensors(draw: random.Random, raw: bytes, words: Words) -> bytes:
    taken = _safetensors(raw)
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
            _document(draw, metadata[key].encode(), words).decode() if _json(metadata[key].encode()) else "{"
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
            tensors[_name(draw, name, words)] = dtype, shape, values
        elif choice < 0.55:
            tensors[_name(draw, name, words)] = dtype, shape, values
        elif choice < 0.62:
            tensors[name] = dtype, shape, _odd_values(draw, dtype, len(values))
        elif choice < 0.7:
            tensors[name] = dtype, shape[::-1], values
        else:
            dtype = draw.choice(list(BITS)) if draw.random() < 0.25 else dtype
            shape = _shape(draw, shape) if draw.random() < 0.8 else shape
            count = BITS.get(dtype, 4) * math.prod(shape)
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
    size = BITS.get(dtype, 4)
    patterns = (b"\0", b"\xff", b"\x7f", b"\x80", b"\x01", b"\x3f")
    return ((draw.choice(patterns) * size) * (nbytes // size + 1))[:nbytes]


# --- archives, pickles, arrays --------------------------------------------------------------------------------------------


def _archive(draw: random.Random, raw: bytes, words: Words) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            entries = {info.filename: archive.read(info) for info in archive.infolist()}
    except Exception:  # damaged before, in one of the many ways that zipfile does not foresee
        return _bytes(draw, raw, words)
    if not entries:
        return _bytes(draw, raw, words)
    inner = [name for name in entries if name.endswith(("data.pkl", ".npy"))]
    name = draw.choice(inner) if inner and draw.random() < 0.8 else draw.choice(list(entries))
    choice = draw.random()
    if choice < 0.05:
        del entries[name]
    elif choice < 0.1:
        entries[draw.choice(("data.pkl", "archive/data/0", "../x", name + "x", name.upper()))] = entries.pop(name)
    else:
        entries[name] = draw.choice((_opcodes, _strings, _small, _bytes))(draw, entries[name], words)
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if draw.random() < 0.03 else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for entry, content in entries.items():
            archive.writestr(zipfile.ZipInfo(entry), content, method)
    return buffer.getvalue()


def _opcodes(draw: random.Random, raw: bytes, words: Words) -> bytes:
    """A byte of a pickle turned into an opcode, or an opcode put in."""
    if not raw:
        return raw
    at = draw.randrange(len(raw))
    code = bytes([draw.choice(b"()tRbsuaqrhjKMJXceB.0N\x80\x81\x85\x86\x87\x88\x89\x8a\x8c\x8d\x93\x94Q]}lde2")])
    return raw[:at] + code + raw[at + (draw.random() < 0.7) :]


def _small(draw: random.Random, raw: bytes, words: Words) -> bytes:
    """A small whole number of a pickle (BININT1, BININT2, BININT) with another value."""
    places = [i for i in range(len(raw) - 5) if raw[i] in b"KMJ"]
    if not places:
        return _bytes(draw, raw, words)
    at = draw.choice(places)
    width = {ord("K"): 1, ord("M"): 2, ord("J"): 4}[raw[at]]
    value = draw.choice((0, 1, 2, 3, 4, 127, 255, 256, 65535, 2**31 - 1, 2**32 - 1, draw.randrange(256)))
    return raw[: at + 1] + (value % 256**width).to_bytes(width, "little") + raw[at + 1 + width :]


# --- anything -------------------------------------------------------------------------------------------------------------


def _bytes(draw: random.Random, raw: bytes, words: Words) -> bytes:
    """Bytes changed, removed, repeated, or the end cut off; mostly near the beginning, where headers are."""
    if not raw:
        return draw.randbytes(draw.randrange(20))
    at = draw.randrange(len(raw)) if draw.random() < 0.4 else min(int(draw.expovariate(1 / 200)), len(raw) - 1)
    choice = draw.random()
    if choice < 0.2:
        return raw[:at]
    if choice < 0.3:
        return raw[:at] + raw[at + draw.randrange(1, 17) :]
    if choice < 0.4:
        return raw[:at] + raw[at : at + draw.randrange(1, 33)] * 2 + raw[at:]
    if choice < 0.5:
        return raw + draw.randbytes(draw.randrange(1, 17))
    damaged = bytearray(raw)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 8))):
        damaged[min(at, len(damaged) - 1)] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        at += draw.choice((1, 1, 4, 8))
    return bytes(damaged)


def _numbers(draw: random.Random, raw: bytes, words: Words) -> bytes:
    """A number of 2, 4 or 8 bytes with another value."""
    width = draw.choice((2, 4, 4, 8, 8))
    if len(raw) < width:
        return _bytes(draw, raw, words)
    at = (
        draw.randrange(len(raw) - width + 1)
        if draw.random() < 0.4
        else int(draw.expovariate(1 / 400)) % (len(raw) - width + 1)
    )
    old = int.from_bytes(raw[at : at + width], "little")
    new = draw.choice(
        (0, 1, 2, 3, 4, 12, old + 1, old - 1, old * 2, old // 2, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(raw))
    )
    return raw[:at] + (new % 256**width).to_bytes(width, "little") + raw[at + width :]


def _strings(draw: random.Random, raw: bytes, words: Words) -> bytes:
    """A string with its length in front of it, with another text: of GGUF, flatbuffers, pickles, protocol buffers."""
    limit = min(len(raw), 20_000)
    start = draw.randrange(limit) if limit > 1 else 0
    for at in range(start, min(limit, start + 2000)):
        for width in (8, 4, 1):
            length = int.from_bytes(raw[at : at + width], "little")
            text = raw[at + width : at + width + length]
            if (
                3 <= length < 200
                and len(text) == length
                and text.isascii()
                and text.replace(b"\n", b"").decode().isprintable()
            ):
                old = text.decode()
                new = (
                    _name(draw, old, words) if draw.random() < 0.7 else draw.choice((*words.keys[:400], "", "x" * 255))
                )
                made = new.encode("utf-8", "surrogatepass")[: 256**width - 1]
                return raw[:at] + len(made).to_bytes(width, "little") + made + raw[at + width + length :]
    return _bytes(draw, raw, words)
