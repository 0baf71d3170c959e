# SPDX-License-Identifier: Apache-2.0
"""Text that came from files, made safe to show; numbers made easy to read."""

from __future__ import annotations

import difflib
import os.path
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = [
    "clean",
    "closest",
    "count",
    "encodable",
    "exact",
    "listing",
    "local_name",
    "markdown",
    "markdown_code",
    "nbytes",
    "numbered",
    "show",
    "summed_up",
    "verbatim",
    "without_local_paths",
]


_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~$&])")
_ACTING = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Categories of characters that no glyph shows: controls, bidirectional and other formats, half surrogates, separators of lines."""
_LOCAL = re.compile(r"(?:/|~[/\\]|\.{1,2}[/\\]|[A-Za-z]:[\\/]|\\\\)[^\r\n]*")


def show(text: object, limit: int = 120) -> str:
    r"""Return `text` as one printable line of at most `limit` characters.

    Terminal escapes, line breaks, bidirectional overrides and lone surrogates become ``\\x..`` escapes, so that a
    tensor's name can neither forge a message nor move the cursor.
    """
    raw = str(text)
    cut = raw if len(raw) <= limit else f"{raw[: limit // 2]}...{raw[-(limit // 2 - 3) :]}"
    return "".join(c if c.isprintable() and c != "\\" else ascii(c)[1:-1] for c in cut)


def clean(text: str) -> str:
    """`text` without anything a terminal would act upon. Unlike `show` it leaves what `show` has escaped as it is."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def verbatim(text: str) -> str:
    """Text of many lines made safe for a terminal: line breaks, tabs and spaces of all widths stay, what acts is escaped."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in _ACTING and c not in "\n\t" else c for c in text)


def markdown(text: str) -> str:
    """One line of our own words, or of a message, as Markdown without any markup or HTML in it."""
    return _MARKUP.sub(r"\\\1", clean(text))


def markdown_code(text: str) -> str:
    """What `show` returned as a code span; it ends neither the span nor the cell of a table."""
    bare = clean(text).replace("`", "'").replace("|", "\u00a6").strip()
    return f"`{bare}`" if bare else ""


def encodable(text: str) -> str:
    """`text` as it may stand in JSON: half of a surrogate pair, which no encoding has, becomes an escape."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def listing(names: Iterable[str], limit: int = 4) -> str:
    """Join names for a message: ``a, b, c, d and 5 more``."""
    shown = list(names)
    head = ", ".join(show(name) for name in shown[:limit])
    return head if len(shown) <= limit else f"{head} and {len(shown) - limit} more"


def summed_up(names: Iterable[str]) -> list[str]:
    """Names that differ by one number alone as one name, in order: ``blocks.0-39.attn.q``, ``blocks.[1,3].attn.k``."""
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for name in names:
        pieces = re.split(r"(\d{1,9})", name)
        groups.setdefault(tuple(pieces[::2]), []).append(tuple(pieces[1::2]))
    return [text for words, numbers in groups.items() for text in _as_ranges(words, numbers)]


def _as_ranges(words: tuple[str, ...], numbers: list[tuple[str, ...]]) -> Iterator[str]:
    """The first number that varies as a range; a name for each of the others."""
    varies = [at for at in range(len(words) - 1) if len({row[at] for row in numbers}) > 1]
    first = varies[0] if varies else -1
    rest: dict[tuple[str, ...], list[int]] = {}
    for row in numbers:
        key = tuple(number for at, number in enumerate(row) if at != first)
        rest.setdefault(key, []).append(int(row[first]) if varies else 0)
    for key, values in rest.items():
        fixed = list(key)
        if varies:
            low, high = min(values), max(values)
            whole = sorted(set(values)) == list(range(low, high + 1))
            every = f"{low}-{high}" if whole else f"[{','.join(map(str, sorted(set(values))))}]"
            fixed.insert(first, str(low) if low == high else every)
        yield "".join(text for pair in zip(words, [*fixed, ""], strict=True) for text in pair)


def local_name(text: str) -> str:
    """The last part of a path of somebody's machine, which is nobody else's business; other text as it is."""
    parts = re.split(r"[/\\]+", text.rstrip("/\\")) if _LOCAL.fullmatch(text) else [text]
    return parts[-1]


def without_local_paths(value: Any) -> Any:
    """A JSON value whose strings are no paths of somebody's machine, but their last part."""
    if isinstance(value, Mapping):
        return {key: without_local_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_local_paths(entry) for entry in value]
    return local_name(value) if isinstance(value, str) else value


def closest(name: str, known: Iterable[str], *, within: str = "") -> str | None:
    """Return a "did you mean" hint for `name`, or None if nothing in `known` is close.

    Args:
        name: What was given.
        known: What there is.
        within: The folder that both are names in, which the hint repeats.
    """
    others = [other for other in known if other != name][:20_000]  # one of its own name may be there, and be unusable
    matches = difflib.get_close_matches(name, others, n=1, cutoff=0.6)
    return (
        f"did you mean '{show(os.path.join(within, matches[0]) if within != '.' else matches[0])}'?"
        if matches
        else None
    )


def numbered(number: int, noun: str) -> str:
    """A number of things: ``1 token``, ``2 tokens``, ``12,000 tokens``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def count(number: float) -> str:
    """Shorten a number of parameters: ``1.24 B``. Numbers below ten thousand stay exact."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            return f"{number / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{number:g}"


def exact(number: float) -> str:
    """The fewest digits that are read as the same float again: ``0.7``, ``2``, ``0.3333333333333333``."""
    return repr(float(number)).removesuffix(".0")


def nbytes(number: float) -> str:
    """Shorten a number of bytes: ``2.47 GB``, in decimal units as disks and hubs count."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g} B"
