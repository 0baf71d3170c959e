# SPDX-License-Identifier: Apache-2.0
"""Damage to files that knows what they are made of: JSON, safetensors, texts, zip archives with pickles or arrays, and prefixed strings.

Every function takes a random generator, some bytes, and words that occur in other files; it returns other bytes.
"""

from __future__ import annotations

import io
import random
import zipfile

from .documents import another_name, change_document, change_tensors
from .plain_text import change_text, text_of
from .words import Words, json_of, safetensors_of

__all__ = ["mutated"]


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
    if safetensors_of(raw) is not None:
        return change_tensors(draw, raw, words)
    if json_of(raw) is not None:
        return change_document(draw, raw, words)
    if (text := text_of(raw)) is not None:
        return change_text(draw, text, words)
    return draw.choice((_bytes, _numbers, _strings, _strings, _numbers))(draw, raw, words)


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
                    another_name(draw, old, words)
                    if draw.random() < 0.7
                    else draw.choice((*words.keys[:400], "", "x" * 255))
                )
                made = new.encode("utf-8", "surrogatepass")[: 256**width - 1]
                return raw[:at] + len(made).to_bytes(width, "little") + made + raw[at + width + length :]
    return _bytes(draw, raw, words)
