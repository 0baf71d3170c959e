# SPDX-License-Identifier: Apache-2.0
"""Damage to texts: a word, a line or a character more, less, twice or in another place."""

from __future__ import annotations

import random
import re

from .words import Words

__all__ = ["change_text", "text_of"]

_ODD = (
    *(
        "\0",
        "\x1b[2J",
        "\u202e",
        "\u2028",
        "\ud800",
        "\t",
        "\r\n",
        "\n",
        "  ",
        '"',
        "'",
        "\\",
        "`",
        "|",
        "<b>",
        "&",
        "%s",
        "{}",
        "*",
        "?",
    ),
    *(
        "[",
        "]",
        "[!a]",
        "..",
        "/",
        "//",
        "~",
        ":",
        "::",
        "@",
        "-",
        "--",
        "-1",
        "0",
        "0x1F",
        "1e9",
        "1e999",
        "9" * 40,
        "é",
        "\u0663",
    ),
    *(
        "&a",
        "*a",
        "!!python/name:os.system",
        "---\n",
        "? ",
        "- ",
        "{",
        "}",
        "|\n",
        ">-\n",
        "yes",
        "null",
        "~",
        ".nan",
        "1:30",
        "<<: ",
    ),
    *("{{ x }}", "{% for i in y %}", "${HOME}", "$(id)", "a" * 300, "*a" * 30),
)
_PIECE = re.compile(r"\s+|\w+|[^\w\s]")


def text_of(raw: bytes) -> str | None:
    """The text that a file is; None if it is none."""
    if len(raw) > 20_000 or b"\0" in raw:
        return None
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def change_text(draw: random.Random, text: str, words: Words) -> bytes:
    """The text with something changed."""
    whole = draw.random() < 0.3
    pieces = text.splitlines(keepends=True) if whole else _PIECE.findall(text)
    at = draw.randrange(len(pieces) + 1)
    choice = draw.random()
    if choice < 0.35 or not pieces:
        pieces.insert(at, draw.choice(_ODD) if draw.random() < 0.7 else str(draw.choice(words.keys or ("a",))))
    elif choice < 0.5:
        del pieces[at : at + draw.choice((1, 1, 2, 5))]
    elif choice < 0.65:
        pieces.insert(at, draw.choice(pieces) * draw.choice((1, 1, 2, 40)))
    elif choice < 0.75:
        other = draw.randrange(len(pieces))
        at = min(at, len(pieces) - 1)
        pieces[at], pieces[other] = pieces[other], pieces[at]
    else:
        pieces[min(at, len(pieces) - 1)] = draw.choice(_ODD)
    return "".join(pieces).encode("utf-8", "surrogatepass")
