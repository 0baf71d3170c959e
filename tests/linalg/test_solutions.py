# SPDX-License-Identifier: Apache-2.0
"""Solutions are found once while they are remembered, and their errors are never forgotten."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from time import sleep

from surgery_formats.linalg.solutions import RecentSolutions


def test_a_remembered_solution_is_not_solved_again() -> None:
    solved: list[str] = []
    solutions = RecentSolutions[bytes](len, limit=10)

    def solve(key: str) -> bytes:
        return solutions.of(key, lambda: (solved.append(key) or key.encode() * 4, 0.25))

    assert [solve(key) for key in "aabba"] == [b"aaaa", b"aaaa", b"bbbb", b"bbbb", b"aaaa"]
    assert solved == ["a", "b"]
    solve("c")  # 12 bytes: what was asked for longest ago goes
    solve("a")
    solve("b")
    assert solved == ["a", "b", "c", "b"]


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


def test_of_what_is_done_with_only_the_last_few_are_kept() -> None:
    solved: list[str] = []
    solutions = RecentSolutions[bytes](len, groups=2)

    def solve(key: str, group: str) -> bytes:
        return solutions.of(key, lambda: (solved.append(key) or bytes(4), 0.5), group)

    for key in ("a1", "a2", "a3", "a1", "a2", "a3"):  # the experts of one weight: one factor of all, then the other
        solve(key, "a")
    assert solved == ["a1", "a2", "a3"]
    solve("b", "b")
    solve("a1", "a")
    solve("c", "c")
    solve("a3", "a")
    assert solved == ["a1", "a2", "a3", "b", "c"]
    solve("b", "b")
    assert solved[5:] == ["b"]
    assert solutions.error_of("a1", lambda: (b"", -1.0)) == 0.5, "the error of what is forgotten is not"
    assert solutions.error_of("d", lambda: (b"", 0.75)) == 0.75


def test_what_a_thread_is_at_is_kept_however_many_threads_there_are() -> None:
    solutions, solved = RecentSolutions[bytes](len, groups=1), []
    all_have_one = Barrier(6)

    def both_factors(key: str) -> None:
        solutions.of(key, lambda: (solved.append(key) or bytes(4), 0.0))
        all_have_one.wait(300)
        solutions.of(key, lambda: (solved.append(key) or bytes(4), 0.0))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(both_factors, "abcdef"))
    assert sorted(solved) == list("abcdef")
