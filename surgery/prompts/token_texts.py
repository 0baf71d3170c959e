# SPDX-License-Identifier: Apache-2.0
"""What tokens stand for: as their vocabulary spells them, and as people read them.

A vocabulary has marks of its own: byte-level BPE writes a space as ``Ġ`` and a line break as ``Ċ``, SentencePiece a space as
``▁`` and lone bytes as ``<0xE2>``. The decoder of a ``tokenizer.json`` says which of them it has.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from surgery.prompts.vocabulary import TOKENIZER, spelt_tokens
from surgery_formats.files.bounded_json import TOKENIZER_LIMIT, read_object

__all__ = ["read_as", "token_texts"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ESCAPES = {"\n": r"\n", "\r": r"\r", "\t": r"\t", '"': r"\"", "\\": r"\\"}


def token_texts(folder: Path, ids: Collection[int]) -> tuple[dict[int, str], dict[int, str]]:
    """Tokens by id, as the tokenizer in `folder` spells them and as people read them; empty without a ``tokenizer.json``."""
    file = folder / TOKENIZER
    if not file.is_file():
        return {}, {}
    tokenizer = read_object(file, TOKENIZER_LIMIT)
    spelt = {row: text for row, text in spelt_tokens(tokenizer).items() if row in ids}
    return spelt, read_as(tokenizer, spelt)


def read_as(tokenizer: Mapping[str, Any], spelt: Mapping[int, str]) -> dict[int, str]:
    """Tokens in quotation marks, as the text that they stand for; special tokens as they are.

    Args:
        tokenizer: A ``tokenizer.json``.
        spelt: Tokens by id, as it spells them.
    """
    added = tokenizer.get("added_tokens")
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    entries = [entry for entry in entries if isinstance(entry.get("id"), int)]
    special = {entry["id"] for entry in entries if entry.get("special") is True}
    literal = {entry["id"] for entry in entries}
    decoders = list(_parts(tokenizer.get("decoder"))) or list(_parts(tokenizer.get("pre_tokenizer")))
    kinds = [part.get("type") for part in decoders]
    space = _space(decoders)

    def text_of(row: int, token: str) -> str:
        if row in literal:
            return token
        if "ByteLevel" in kinds:
            return _from_bytes(token)
        if "ByteFallback" in kinds and (byte := _BYTE.fullmatch(token)) is not None:
            return bytes([int(byte[1], 16)]).decode(errors="surrogateescape")
        return token.replace(space, " ") if space else token

    return {row: token if row in special else _quoted(text_of(row, token)) for row, token in spelt.items()}


def _parts(node: object) -> Iterator[Mapping[str, Any]]:
    """A decoder or pre-tokenizer, or those of a sequence."""
    if isinstance(node, dict):
        inner = node.get("decoders") or node.get("pretokenizers")
        if node.get("type") == "Sequence" and isinstance(inner, list):
            yield from (part for part in inner if isinstance(part, dict))
        else:
            yield node


def _space(decoders: list[Mapping[str, Any]]) -> str:
    """How a space is written; empty where it is no mark."""
    for part in decoders:
        if part.get("type") == "Metaspace":
            mark = part.get("replacement")
            return mark if isinstance(mark, str) else ""
        pattern = part.get("pattern")
        if part.get("type") == "Replace" and part.get("content") == " " and isinstance(pattern, dict):
            mark = pattern.get("String")
            return mark if isinstance(mark, str) else ""
    return ""


@cache
def _alphabet() -> Mapping[str, int]:
    """Byte-level BPE's characters of the 256 bytes (GPT-2's ``bytes_to_unicode``): printable ones are themselves."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _from_bytes(token: str) -> str:
    """A byte-level token as text; bytes that are no UTF-8 by themselves become surrogates."""
    alphabet = _alphabet()
    if any(char not in alphabet for char in token):
        return token
    return bytes(alphabet[char] for char in token).decode(errors="surrogateescape")


def _quoted(text: str) -> str:
    return f'"{"".join(map(_character, text))}"'


def _character(char: str) -> str:
    if 0xDC80 <= ord(char) <= 0xDCFF:  # a lone byte
        return rf"\x{ord(char) - 0xDC00:02x}"
    return _ESCAPES.get(char, char)
