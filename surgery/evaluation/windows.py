# SPDX-License-Identifier: Apache-2.0
"""Windows over the tokens of a text, so that each is predicted once, and most with many tokens before them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from surgery_formats.errors import FitError

__all__ = ["CONTEXT", "STRIDE", "Window", "cut"]

CONTEXT, STRIDE = 480, 240


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that a model sees together.

    Attributes:
        start: Index of the first.
        stop: Index behind the last.
        scored: Index of the first that no earlier window has scored.
    """

    start: int
    stop: int
    scored: int


def cut(tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows of at most `context` tokens, which begin `stride` tokens apart.

    Every token is scored by one window and, past the first, with at least ``context - stride`` tokens before it.

    Raises:
        FitError: windows with gaps between them.
    """
    if stride > context:
        raise FitError(f"windows of {context} tokens, {stride} apart, leave some out", hint=f"stride {context} or less")
    for start in range(0, max(1, tokens - context + stride), stride):
        yield Window(start, min(start + context, tokens), start if start == 0 else start + context - stride)
