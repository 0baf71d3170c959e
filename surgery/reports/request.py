# SPDX-License-Identifier: Apache-2.0
"""What was asked for: the verb that a caller called, or the recipe that it applies, for the manifest of what is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Request", "asked", "current_request", "unrecorded"]


@dataclass(frozen=True, slots=True)
class Request:
    """A call of a verb, or a recipe.

    Attributes:
        verb: The function.
        args: Of the call.
        kwargs: Of the call.
        recipe: What is being applied, ready for the manifest; None for a call.
        results: What the recipe calls the results of earlier steps, by where they lie.
    """

    verb: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    recipe: Mapping[str, Any] | None = None
    results: Mapping[Path, str] = field(default_factory=dict)


_CURRENT: ContextVar[Request | None] = ContextVar("request", default=None)


def current_request() -> Request | None:
    """The outermost request: of a verb that calls others, what it was asked itself."""
    return _CURRENT.get()


@contextmanager
def asked(request: Request) -> Iterator[None]:
    """A context of this request, unless there is one around it; a recipe takes the place of its own call."""
    if _CURRENT.get() is not None and request.recipe is None:
        yield
        return
    token = _CURRENT.set(request)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def unrecorded() -> Iterator[None]:
    """A context whose outputs name no recipe: they are a second result of a verb, and a recipe makes the first."""
    token = _CURRENT.set(None)
    try:
        yield
    finally:
        _CURRENT.reset(token)
