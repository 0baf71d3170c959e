# SPDX-License-Identifier: Apache-2.0
"""Texts at which a generation ends: what comes from the first of them on is cut off, and never shown in part."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["CutText"]


class CutText:
    """The text of one row, which grows piece by piece until one of some words is in it."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = [word for word in words if word]
        self._longest = max(map(len, self._words), default=0)
        self.text = ""
        self.ended = False
        self._shown = 0

    def push(self, piece: str) -> str:
        """Add a piece; returns the text that can be shown now: no beginning of a word is among it."""
        if self.ended:
            return ""
        begin = max(0, len(self.text) - self._longest)
        self.text += piece
        places = [at for word in self._words if (at := self.text.find(word, begin)) >= 0]
        if places:
            self.text, self.ended = self.text[: min(places)], True
            return self._show(len(self.text))
        return self._show(len(self.text) - self._begun())

    def close(self, piece: str = "") -> str:
        """The rest, after a last piece."""
        shown = self.push(piece)
        return shown + self._show(len(self.text))

    def _show(self, end: int) -> str:
        begin, self._shown = self._shown, max(self._shown, end)
        return self.text[begin : self._shown]

    def _begun(self) -> int:
        """Characters at the end of the text that a word may begin with."""
        tail = self.text[-self._longest :] if self._longest else ""
        ends = (tail[at:] for at in range(len(tail)))
        return next((len(end) for end in ends if any(word.startswith(end) for word in self._words)), 0)
