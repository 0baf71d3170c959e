# SPDX-License-Identifier: Apache-2.0
"""The first of many patterns that matches a path, of which a file may have as many as modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from surgery_formats.adapters.peft.keys import bare_pattern, path_ends

__all__ = ["Patterns"]

_PLAIN = re.compile(r"(\^?)((?:[\w.\-]|\\[.\-])+)")
_CHARACTER = re.compile(r"\\?.")
Kind = tuple[bool, tuple[int, ...]]
"""Whether a pattern begins with ``^``, and so is for whole paths, and where any character may stand."""


class Patterns:
    """Regular expressions on paths or their ends, as PEFT matches them (``get_pattern_key``): the first that does counts.

    Most are paths, with dots that are escaped or match anything. These are not tried but looked up.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._special: list[tuple[int, str]] = []
        self._plain: dict[int, dict[Kind, dict[str, tuple[int, str]]]] = {}  # by length, by kind, by the path
        for number, pattern in enumerate(patterns):
            if (plain := _PLAIN.fullmatch(bare_pattern(pattern))) is None:
                self._special.append((number, pattern))
                continue
            characters = _CHARACTER.findall(plain[2])
            kind = bool(plain[1]), tuple(at for at, character in enumerate(characters) if character == ".")
            path = "".join(character[-1] for character in characters)
            self._plain.setdefault(len(path), {}).setdefault(kind, {}).setdefault(path, (number, pattern))

    def first(self, path: str, matches: Callable[[str], bool]) -> str | None:
        """The first pattern for a path without line breaks; `matches` tries those that cannot be looked up."""
        number, plain = min(self._found(path), default=(None, None))
        for other, pattern in self._special:
            if number is not None and other > number:
                break
            if matches(pattern):
                return pattern
        return plain

    def _found(self, path: str) -> Iterator[tuple[int, str]]:
        for end in path_ends(path):
            for (whole, anything), patterns in self._plain.get(len(end), {}).items():
                characters = list(end)
                for at in anything:
                    characters[at] = "."
                found = patterns.get("".join(characters))
                if found is not None and (end == path or not whole):
                    yield found
