# SPDX-License-Identifier: Apache-2.0
"""Where the time of a run goes, by name of its parts."""

from __future__ import annotations

import time
from collections.abc import Mapping

__all__ = ["Watch"]


class Watch:
    """Counts from when it is made; parts of the same name add up."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._parts: dict[str, float] = {}

    def lap(self, name: str, until: float | None = None) -> None:
        """What has passed since the last lap was `name`; it ended now, or at `until` (`time.monotonic`)."""
        now = time.monotonic() if until is None else until
        self._parts[name] = self._parts.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def parts(self) -> Mapping[str, float]:
        """Seconds, in the order in which the parts began."""
        return dict(self._parts)
