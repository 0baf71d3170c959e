# SPDX-License-Identifier: Apache-2.0
"""Which layers a network is to have: old numbers in their new order, from what people write."""

from __future__ import annotations

import re

from surgery_formats.errors import FitError
from surgery_formats.text import show

__all__ = ["chosen_order", "with_repeated", "without"]

_RANGE = re.compile(r"(\d{1,6})(?:\s*-\s*(\d{1,6})?)?(?:x(\d{1,3}))?")
_MOST = 4096  # layers of an output


def chosen_order(text: str, count: int) -> tuple[int, ...]:
    """``0-19,24-31`` of `count` layers: these, in this order. A layer that is named twice is there twice.

    Raises:
        FitError: not a list of ranges, or of layers that are not there.
    """
    order = [number for numbers, times in _ranges(text, count) for _ in range(times or 1) for number in numbers]
    return _checked(order)


def without(text: str, count: int) -> tuple[int, ...]:
    """All but those of ``20-23``.

    Raises:
        FitError: as `chosen_order`; or none is left.
    """
    gone = {number for numbers, times in _ranges(text, count) for number in _plain(numbers, times)}
    return _checked([number for number in range(count) if number not in gone])


def with_repeated(text: str, count: int) -> tuple[int, ...]:
    """All, and behind the last of ``8-15`` the same layers again; ``8-15x3`` has them three times in all.

    Raises:
        FitError: as `chosen_order`; or two ranges that overlap.
    """
    after: dict[int, list[int]] = {}
    taken: set[int] = set()
    for numbers, times in _ranges(text, count):
        if taken & set(numbers):
            raise FitError(f"'{show(text)}' names a layer in two ranges", hint="`keep` says every layer in its order")
        taken |= set(numbers)
        if times is not None and times < 2:
            raise FitError(f"'{show(text)}' repeats nothing: x2 is the layers, and once more the same")
        after[numbers[-1]] = list(numbers) * ((times or 2) - 1)
    return _checked([layer for number in range(count) for layer in (number, *after.get(number, ()))])


def _checked(order: list[int]) -> tuple[int, ...]:
    if not order:
        raise FitError("no layer would be left")
    if len(order) > _MOST:
        raise FitError(f"{len(order)} layers are more than {_MOST}")
    return tuple(order)


def _plain(numbers: range, times: int | None) -> range:
    if times is not None:
        raise FitError("a layer is dropped once")
    return numbers


def _ranges(text: str, count: int) -> list[tuple[range, int | None]]:
    """Ranges and how often each is said to be there."""
    found = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise FitError(f"'{show(part)}' is no range of layers", hint="write 0-19,24-31; the first layer is 0")
        first = int(match[1])
        last = first if "-" not in part else int(match[2]) if match[2] else count - 1
        if first > last:
            raise FitError(f"'{show(part)}' ends before it begins")
        if last >= count:
            raise FitError(f"there is no layer {last}", hint=f"the last of {count} is {count - 1}")
        found.append((range(first, last + 1), int(match[3]) if match[3] else None))
    return found
