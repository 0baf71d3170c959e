# SPDX-License-Identifier: Apache-2.0
"""Bytes that several threads read, handed to one observer in order."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["ByteObserver", "InOrder", "Observed"]

ByteObserver = Callable[[int, memoryview], None]


class Observed:
    """Tells a reader that it may use a buffer again.

    Args:
        then: Called when the bytes were observed, or never will be.
    """

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then
        self._event = threading.Event()

    def done(self) -> None:
        """It is so."""
        self._event.set()
        self._then()

    def wait(self) -> None:
        """Wait until it is so."""
        self._event.wait()


class InOrder:
    """Hands the bytes of one tensor to an observer in order, whichever reader has them.

    No reader waits for another: bytes whose turn has not come stay in their buffer, and the reader that hands on those
    before them hands them on too.
    """

    def __init__(self, observe: ByteObserver, first: int) -> None:
        self._observe, self._next = observe, first
        self._held: dict[int, tuple[memoryview, Observed]] = {}
        self._busy = self._failed = False
        self._lock = threading.Lock()

    def offer(self, offset: int, data: memoryview, observed: Observed) -> None:
        """Hand on these bytes, now or later, and then say so to `observed`; `data` must stay as it is until then."""
        with self._lock:
            self._held[offset] = data, observed
        while (turn := self._turn()) is not None:
            offset, data, observed = turn
            try:
                self._observe(offset, data)
            except BaseException:
                self.give_up()
                raise
            finally:
                with self._lock:
                    self._next, self._busy = offset + len(data), False
                observed.done()
        self._let_go()

    def give_up(self) -> None:
        """A part could not be read: nothing more is handed on."""
        with self._lock:
            self._failed = True
        self._let_go()

    def _turn(self) -> tuple[int, memoryview, Observed] | None:
        with self._lock:
            if self._failed or self._busy or self._next not in self._held:
                return None
            self._busy = True
            return self._next, *self._held.pop(self._next)

    def _let_go(self) -> None:
        with self._lock:
            given_up = list(self._held.values()) if self._failed else []
            if self._failed:
                self._held.clear()
        for _, observed in given_up:
            observed.done()
