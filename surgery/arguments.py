# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of verbs by their annotations, so that a wrong type is one clear error everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from surgery_formats.errors import UsageError

__all__ = ["check_types", "checked", "wrong_type"]

P = ParamSpec("P")
R = TypeVar("R")

_EXPECTED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "int": (lambda value: isinstance(value, Integral) and not isinstance(value, bool), "a whole number"),
    "float": (lambda value: isinstance(value, Real) and not isinstance(value, bool), "a number"),
    "str | None": (lambda value: isinstance(value, str), "a text"),
    "Callback": (callable, "a function that takes a surgery.Progress"),
    "Callable[[int, str], None]": (callable, "a function that takes a number and a text"),
    "EngineLike": (
        lambda value: isinstance(value, str) or hasattr(value, "shares"),
        "'local', 'ray', 'ray:HOST:PORT' or a cluster",
    ),
}
"""By annotation; what has another one is checked where it is read."""


def checked(verb: Callable[P, R]) -> Callable[P, R]:
    """`verb` with its keyword arguments checked before it runs (`check_types`), and numpy's numbers made Python's.

    Results and manifests hold arguments, and JSON knows no other numbers.
    """

    @wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        check_types(verb.__annotations__, kwargs)
        kwargs.update((name, _plain(value)) for name, value in kwargs.items() if isinstance(value, Real))
        return verb(*args, **kwargs)

    return run


def check_types(annotations: Mapping[str, str], arguments: Mapping[str, object]) -> None:
    """Check arguments that are flags, numbers, functions or engines.

    Raises:
        UsageError: one is of another type.
    """
    for name, value in arguments.items():
        annotation = annotations.get(name, "")
        expected = _EXPECTED.get(annotation) or _EXPECTED.get(annotation.removesuffix(" | None"))
        if expected and not (value is None and annotation.endswith(" | None")) and not expected[0](value):
            raise wrong_type(value, name, expected[1])


def _plain(value: Real) -> int | float:
    if isinstance(value, bool):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def wrong_type(value: object, argument: str, expected: str) -> UsageError:
    """The error for an argument of a wrong type; `expected` says what it is."""
    return UsageError(f"{argument} is {expected}, not {type(value).__name__}")
