# SPDX-License-Identifier: Apache-2.0
"""Names of a base in every layout of its family: which stored rows, in which order, another program's name stands for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from surgery_formats.models.layouts.rule import Network, Piece, Rule

__all__ = ["LayoutIndex", "Rows", "filled"]

_LEAVES = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a stored parameter, in fractions of its height.

    Attributes:
        name: The parameter as the base has it.
        start: First row, counted in parts.
        stop: Row behind the last.
        parts: Into how many parts the height is divided.
        transposed: Whether they are columns as stored.
    """

    name: str
    start: int = 0
    stop: int = 1
    parts: int = 1
    transposed: bool = False

    @property
    def reduced(self) -> Rows:
        """The same rows, the whole as one part."""
        whole = self.start == 0 and self.stop == self.parts
        return replace(self, stop=1, parts=1) if whole else self

    def part(self, number: int, count: int) -> Rows:
        """One of `count` equal parts of these rows."""
        height = self.stop - self.start
        start = self.start * count + number * height
        return Rows(self.name, start, start + height, self.parts * count, self.transposed)


def _joined(rows: Iterable[Rows]) -> Iterator[Rows]:
    """Rows that lie one behind the other as one."""
    last: Rows | None = None
    for part in rows:
        follows = last is not None and replace(part, start=last.start) == replace(last, stop=part.stop)
        if last is not None and follows and last.stop == part.start:
            last = replace(last, stop=part.stop)
        else:
            if last is not None:
                yield last.reduced
            last = part
    if last is not None:
        yield last.reduced


_Table = Mapping[str, list[Rule]]


@dataclass(frozen=True)
class LayoutIndex:
    """What the names of a family stand for in one base.

    Attributes:
        network: The family.
        known: How many names of the base belong to it.
        held: For names of diffusers that the base has under another one: where it holds their rows.
        names: The base's own names.
        tables: Rules by the names of the layouts, numbers left out.
        back: Rules by the names of their pieces.
    """

    network: Network
    known: int
    held: Mapping[str, tuple[Rows, ...]]
    names: Collection[str]
    tables: _Table
    back: _Table

    @classmethod
    def of(cls, network: Network, names: Collection[str]) -> LayoutIndex:
        """The index of a base with these names."""
        rules = [rule for layout in network.layouts for rule in layout(names)]
        tables: dict[str, list[Rule]] = {}
        back: dict[str, list[Rule]] = {}
        for rule in rules:
            tables.setdefault(_key(rule.name), []).append(rule)
            for key in dict.fromkeys(_key(piece.name) for piece in rule.pieces):
                back.setdefault(key, []).append(rule)
        parts: dict[str, dict[int, Rows]] = {}
        counts: dict[str, int] = {}
        known = 0
        keys = tables.keys() | back.keys()
        for name in names:
            if _key(name) not in keys and _key(name.rpartition(".")[0]) not in keys:
                continue  # most names, of most families
            matches = list(_matches(name, tables))
            known += bool(matches) or next(_matches(name, back, pieces=True), None) is not None
            for rule, numbers, leaf in matches:
                total, row = sum(piece.units for piece in rule.pieces), 0
                for piece in rule.pieces:
                    pivot = filled(piece.name, numbers) + leaf
                    if pivot != name:
                        rows = Rows(name, row, row + piece.units, total, rule.transposed)
                        parts.setdefault(pivot, {}).setdefault(piece.part, rows)
                        counts[pivot] = piece.parts
                    row += piece.units
        held = {
            pivot: tuple(rows for _, rows in sorted(found.items()))
            for pivot, found in parts.items()
            if pivot not in names and len(found) == counts[pivot]
        }
        return cls(network, known, held, names, tables, back)

    def rows(self, name: str) -> tuple[Rows, ...]:
        """What `name` stands for, from top to bottom; empty if the base has no such rows, or has them as `name`."""
        if name in self.held:
            return self.held[name]
        for rule, numbers, leaf in _matches(name, self.tables):
            found = [self._piece(piece, filled(piece.name, numbers) + leaf, rule) for piece in rule.pieces]
            if found and all(found):
                return tuple(_joined(rows for some in found for rows in some))
        return self._numbered_part(name) or self._by_omis_name(name)

    def _by_omis_name(self, name: str) -> tuple[Rows, ...]:
        module, _, leaf = name.rpartition(".")
        for ours, theirs in self.network.in_omi.items():
            if (end := f".{module}").endswith(f".{theirs}"):
                return self.rows(f"{end.removesuffix(theirs)}{ours}.{leaf}"[1:])
        return ()

    def _numbered_part(self, name: str) -> tuple[Rows, ...]:
        """What ``qkv.1`` stands for, by which OMI calls the second part of ``qkv``."""
        module, _, leaf = name.rpartition(".")
        whole, _, number = module.rpartition(".")
        for rule, numbers, rest in _matches(f"{whole}.{leaf}", self.tables) if number.isdigit() else ():
            if int(number) < len(rule.pieces) > 1 and rule.pieces[0].parts == 1:
                piece = rule.pieces[int(number)]
                return self._piece(piece, filled(piece.name, numbers) + rest, rule)
        return ()

    def pieces_of(self, name: str) -> tuple[str, ...]:
        """What diffusers calls the base's `name`, or its pieces from top to bottom; empty if no rule knows it."""
        if name in self.held or any(_matches(name, self.back, pieces=True)):
            return (name,)
        for rule, numbers, leaf in _matches(name, self.tables):
            return tuple(filled(piece.name, numbers) + leaf for piece in rule.pieces)
        return ()

    def in_release(self, name: str) -> str:
        """What its makers call a weight, or the one that it is a part of, where the base has diffusers' name for it.

        Empty if the base has another name, if it lacks another part, or if no rule knows it.
        """
        for rule, numbers, leaf in self.rules_for(name) if name in self.names else ():
            parts = (filled(piece.name, numbers) + leaf for piece in rule.pieces)
            if not rule.transposed and all(part in self.names for part in parts):
                return filled(rule.name, numbers) + leaf
        return ""

    def in_omi(self, pivot: str) -> str:
        """What OMI calls what diffusers calls `pivot`: its makers' name, and the number of the part where theirs has several."""
        for rule, numbers, leaf in self.rules_for(pivot):
            parts = list(dict.fromkeys(filled(piece.name, numbers) + leaf for piece in rule.pieces))
            part = f".{parts.index(pivot)}" if len(parts) > 1 else ""
            module = f".{filled(rule.name, numbers)}"
            for ours, theirs in self.network.in_omi.items():
                if module.endswith(f".{ours}"):
                    module = module.removesuffix(ours) + theirs
            return f"{module[1:]}{part}{leaf}"
        return pivot

    def _piece(self, piece: Piece, pivot: str, rule: Rule) -> tuple[Rows, ...]:
        whole = (Rows(pivot),) if pivot in self.names else self.held.get(pivot, ())
        if rule.transposed:
            whole = tuple(Rows(r.name, r.start, r.stop, r.parts, not r.transposed) for r in whole)
        if piece.parts == 1:
            return whole
        if len(whole) == piece.parts:  # held in as many parts, in the order of the whole
            return whole[piece.part : piece.part + 1]
        return (whole[0].part(piece.part, piece.parts),) if len(whole) == 1 else ()

    def rules_for(self, pivot: str) -> Iterator[tuple[Rule, tuple[str, ...], str]]:
        """The rules with a piece that diffusers calls `pivot`, the numbers in it, and the leaf behind the module."""
        return _matches(pivot, self.back, pieces=True)

    def other_names(self) -> Iterator[str]:
        """Names that `rows` knows, and the base has not."""
        seen: dict[str, None] = dict.fromkeys(self.held)
        for pivot in (*self.names, *self.held):
            for rule, numbers, leaf in self.rules_for(pivot):
                seen.setdefault(filled(rule.name, numbers) + leaf)
        yield from (name for name in seen if name not in self.names and self.rows(name))


def _matches(name: str, table: _Table, *, pieces: bool = False) -> Iterator[tuple[Rule, tuple[str, ...], str]]:
    """Rules for a parameter, or for its module, with the numbers in its name and the leaf behind the module."""
    module, _, leaf = name.rpartition(".")
    for path, rest in ((name, ""), (module, f".{leaf}")):
        if rest and leaf not in _LEAVES:
            continue
        for rule in table.get(_key(path), ()):
            for pattern in (piece.name for piece in rule.pieces) if pieces else (rule.name,):
                if (numbers := _numbers(path, pattern)) is not None:
                    yield rule, numbers, rest
                    break


@lru_cache(maxsize=1 << 14)  # every family asks for every name of a base
def _key(path: str) -> str:
    return ".".join("#" if segment.isdigit() else segment for segment in path.split("."))


def _numbers(path: str, pattern: str) -> tuple[str, ...] | None:
    """What stands for each ``#`` of a pattern; None if the path is not of it."""
    segments, wanted = path.split("."), pattern.split(".")
    if len(segments) != len(wanted):
        return None
    pairs = list(zip(segments, wanted, strict=True))
    if any(want not in ("#", have) for have, want in pairs):
        return None
    numbers = tuple(have for have, want in pairs if want == "#")
    return numbers if all(number.isdigit() for number in numbers) else None


def filled(pattern: str, numbers: tuple[str, ...]) -> str:
    """A pattern with its numbers put in."""
    left = iter(numbers)
    return ".".join(next(left) if segment == "#" else segment for segment in pattern.split("."))
