# SPDX-License-Identifier: Apache-2.0
"""Solutions are found once while they are remembered, and their errors are never forgotten."""

from __future__ import annotations

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
