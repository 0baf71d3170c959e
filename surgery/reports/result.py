# SPDX-License-Identifier: Apache-2.0
"""The protocol of all results of verbs, and the decorator that records their time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import field, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, runtime_checkable

from surgery.arguments import checked
from surgery.reports.request import Request, asked
from surgery_formats.extras import explained
from surgery_formats.text import show

if TYPE_CHECKING:
    from surgery.reports.summary import Summary

__all__ = ["Result", "elapsed", "summarised", "timed"]

_log = logging.getLogger("surgery.verbs")

P = ParamSpec("P")
R = TypeVar("R")
Kind = TypeVar("Kind", bound="Result")


@runtime_checkable
class Result(Protocol):
    """What a verb returns: a frozen record that can be shown and sent."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings for the user."""

    @property
    def seconds(self) -> float:
        """How long the verb took; of a run, the generation without loading."""

    @property
    def nbytes(self) -> int:
        """Bytes that were written.

        Of a verb that only reads, the size of the weight files it read; 0 where these are not counted.
        """

    def as_json(self) -> dict[str, Any]:
        """Plain values, as ``--json`` shows them."""

    def summary(self, *, verbose: bool = False) -> Summary:
        """The summary for people; everything if `verbose`."""


def summarised(result: type[Kind]) -> type[Kind]:
    """Class decorator: derive ``__str__``, a one-line ``__repr__``, and what notebooks show, from ``summary()``."""

    def text(self: Kind) -> str:
        return self.summary().as_text()

    def brief(self: Kind) -> str:
        return f"<{type(self).__name__} {self.summary().brief()}>"

    def markdown(self: Kind) -> str:
        return self.summary().as_markdown()

    def html(self: Kind) -> str:
        return self.summary()._repr_html_()

    shown = {"__str__": text, "__repr__": brief, "_repr_markdown_": markdown, "_repr_html_": html}
    for name, method in shown.items():
        setattr(result, name, method)
    return result


def elapsed() -> Any:
    """The field ``seconds`` of a result: neither compared, nor in what is the same for the same inputs."""
    return field(default=0.0, compare=False, metadata={"json": False})


def timed(verb: Callable[P, R]) -> Callable[P, R]:
    """`verb` with its keyword arguments checked, told to manifests, and with the seconds it took in its result."""
    verb = explained(checked(verb))

    @wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        began = time.monotonic()
        # What can be read once is read here: the manifest tells it, too.
        given = [list(one) if isinstance(one, Iterator) else one for one in args]
        named = {name: list(one) if isinstance(one, Iterator) else one for name, one in kwargs.items()}
        _log.info("%s of %s", verb.__name__, ", ".join(show(str(one), 200) for one in given))
        with asked(Request(verb, tuple(given), named)):
            result = verb(*given, **named)  # type: ignore[arg-type]  # lists in the place of iterators
        seconds = time.monotonic() - began
        _log.info("%s took %.3f s", verb.__name__, seconds)
        return replace(result, seconds=seconds)  # type: ignore[type-var]  # every result is a dataclass

    return run
