# SPDX-License-Identifier: Apache-2.0
"""Fields of a JSON configuration, read with their types and ranges checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery_formats.adapters.alphas import LARGEST_ALPHA
from surgery_formats.errors import MalformedError
from surgery_formats.text import show

__all__ = ["FieldReader"]


@dataclass(frozen=True, slots=True)
class FieldReader:
    """Fields of one configuration, each checked for its type and range.

    Attributes:
        raw: The whole file.
        file: For messages.
    """

    raw: Mapping[str, Any]
    file: Path

    def fail(self, key: str, value: object, expected: str) -> MalformedError:
        """The error of a field that is not what was expected."""
        return MalformedError(f"'{show(key)}' is {show(repr(value), 40)}, not {expected}", file=self.file)

    def check_integer(self, key: str, value: object, low: int) -> int:
        """A whole number from `low` to below 2**31."""
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 1 << 31:
            raise self.fail(key, value, f"a whole number of at least {low}")
        return value

    def check_number(self, key: str, value: object) -> float:
        """A finite number that is no larger than an alpha can be."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_ALPHA:
            raise self.fail(key, value, f"a finite number of at most {LARGEST_ALPHA:g}")
        return float(value)

    def integer(self, key: str, default: int, low: int) -> int:
        """A whole number of at least `low`."""
        value = self.raw.get(key)
        return default if value is None else self.check_integer(key, value, low)

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = self.raw.get(key)
        return default if value is None else self.check_number(key, value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return default if value is None else value

    def check_rank(self, key: str, value: object) -> int:
        """A rank: a whole number above 0."""
        return self.check_integer(key, value, 1)

    def count(self, key: str, value: object) -> int:
        """How many of a list of switches are on."""
        if not isinstance(value, list) or not all(isinstance(kept, bool) for kept in value):
            raise self.fail(key, value, "a list of true and false")
        return sum(value)

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """One of these words, the first by default."""
        value = self.raw.get(key, allowed[0])
        if value not in allowed:
            raise self.fail(key, value, f"one of {', '.join(allowed)}")
        return str(value)

    def bias(self) -> str:
        """Which biases were trained: ``none``, ``all`` or ``<kind>_only``."""
        value = self.raw.get("bias", "none")
        if value not in ("none", "all") and not (isinstance(value, str) and value.endswith("_only")):
            raise self.fail("bias", value, "one of none, all and <kind>_only")
        return str(value)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names, sorted."""
        value = self.raw.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.fail(key, value, "a list of names")
        return tuple(sorted(value))

    def pattern(self, key: str, check: Any) -> Mapping[str, Any]:
        """An object whose values pass `check`."""
        value = self.raw.get(key) or {}
        if not isinstance(value, Mapping):
            raise self.fail(key, value, "an object")
        return {name: check(f"{key}.{name}", entry) for name, entry in value.items()}

    def indices(self, key: str, value: object) -> tuple[int, ...]:
        """A list of distinct token ids."""
        if not isinstance(value, list):
            raise self.fail(key, value, "a list of token ids")
        ids = tuple(self.check_integer(key, entry, 0) for entry in value)
        if len(set(ids)) != len(ids):
            raise self.fail(key, value, "a list of distinct token ids")
        return ids
