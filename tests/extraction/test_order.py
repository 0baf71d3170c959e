# SPDX-License-Identifier: Apache-2.0
"""Bytes that come in any order are observed in order, and nobody waits for his turn."""

import itertools

import pytest

from surgery.extraction.stream.order import InOrder, Observed


@pytest.mark.parametrize("order", itertools.permutations(range(4)), ids=str)
def test_bytes_are_observed_in_order(order: tuple[int, ...]) -> None:
    seen: list[tuple[int, bytes]] = []
    done: list[int] = []
    line = InOrder(lambda offset, data: seen.append((offset, bytes(data))), 10)
    for count, number in enumerate(order, 1):
        line.offer(
            10 + 2 * number, memoryview(bytes([number] * 2)), Observed(lambda number=number: done.append(number))
        )
        there = next(n for n in range(5) if n not in order[:count])  # all before it have come
        assert seen == [(10 + 2 * n, bytes([n] * 2)) for n in range(there)]
        assert done == list(range(there))


def test_after_a_failure_nothing_is_observed_and_nobody_waits() -> None:
    seen: list[int] = []
    line = InOrder(lambda offset, data: seen.append(offset), 0)
    first, later = (Observed(lambda: None) for _ in range(2))
    line.offer(2, memoryview(b"ab"), first)
    line.give_up()
    first.wait()
    line.offer(0, memoryview(b"cd"), later)
    later.wait()
    assert not seen


def test_an_observer_that_fails_is_heard_and_lets_the_others_go() -> None:
    def fail(offset: int, data: memoryview) -> None:
        raise ValueError("no")

    line = InOrder(fail, 0)
    held, own = (Observed(lambda: None) for _ in range(2))
    line.offer(2, memoryview(b"ab"), held)
    with pytest.raises(ValueError, match="no"):
        line.offer(0, memoryview(b"cd"), own)
    own.wait()
    held.wait()
