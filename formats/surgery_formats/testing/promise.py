# SPDX-License-Identifier: Apache-2.0
"""Checks of a suite as promises: whose broke, which one, and where."""

from __future__ import annotations

import functools
import linecache
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ParamSpec

from surgery_formats.text import show

__all__ = ["promised"]

P = ParamSpec("P")


def promised(
    noun: str, name: Callable[[Any], str], checks: Iterable[Callable[P, None]]
) -> tuple[Callable[P, None], ...]:
    """`checks` that say what was promised when they fail: the first line of their docstrings.

    Args:
        noun: What is under test, for messages (``format``).
        name: Of what a case tests.
        checks: Functions of a case; each raises AssertionError, and lets through what the case's object raises.
    """

    def kept(check: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(check)
        def told(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                check(*args, **kwargs)
            except Exception as error:  # whatever is raised breaks the promise; it stays the cause
                promise = (check.__doc__ or "").partition("\n")[0].rstrip(".")
                whose = f"the {noun} '{name(args[0])}'"
                raise AssertionError(f"{whose} breaks {check.__name__} ({promise}): {_what(error)}") from error

        return told

    return tuple(map(kept, checks))


def _what(error: Exception) -> str:
    """What went wrong: the words of the error, or the line that asserts; where it was raised in others' code."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if not isinstance(error, AssertionError):
        return f"{type(error).__name__}: {show(error, 300)}, raised at {Path(frame.filename).name}:{frame.lineno}"
    return str(error) or linecache.getline(frame.filename, frame.lineno or 0).strip()
