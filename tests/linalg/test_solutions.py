# SPDX-License-Identifier: Apache-2.0
"""Solutions are found once while they are remembered, and their errors are never forgotten."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from time import sleep

from surgery_formats.linalg.solutions import RecentSolutions


def test_a_remembered_solution_is_not_solved_again() -> None:
    solved: list[str] = []
    solutions = RecentSolutions[bytes](len, limit=10)

    def solve(key: str) -> bytes:
        return solutions.of(key, lambda: (solved.append(key) or key.encode() * 4, 0.25))

    assert [solve(key) for key in "aabba"] == [b"aaaa", b"aaaa", b"bbbb", b"bbbb", b"aaaa"]
    assert solved == ["a", "b"]
    solve("c")  # 12 bytes: the oldest goes
    solve("b")
    solve("a")
    assert solved == ["a", "b", "c", "a"]


def test_the_last_solution_is_kept_whatever_its_size_and_all_errors_are() -> None:
    solutions = RecentSolutions[bytes](len, limit=1)
    for number, key in enumerate("abc"):
        solutions.of(key, lambda: (bytes(100), float(number)))  # noqa: B023
        assert solutions.of(key, lambda: (b"", -1.0)) == bytes(100)
    assert solutions.errors == {"a": 0.0, "b": 1.0, "c": 2.0}


def test_threads_share_a_solution_and_never_lose_one() -> None:
    solutions, solved = RecentSolutions[bytes](len, limit=4 << 10), []

    def solve(key: str) -> tuple[bytes, float]:
        solved.append(key)
        return key.encode() * 512, 0.0

    keys = [str(number // 2) for number in range(4000)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda key: solutions.of(key, lambda: solve(key)), keys))
    assert found == [key.encode() * 512 for key in keys]
    assert solutions.errors.keys() == set(keys)
    asked = RecentSolutions[bytes](len)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: asked.of("one", lambda: (sleep(0.01), solve("one"))[1]), range(8)))
    assert solved.count("one") == 1
