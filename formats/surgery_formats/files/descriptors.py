# SPDX-License-Identifier: Apache-2.0
"""Open files, of which no more than half of what the system allows are really open at a time.

A model may have ten thousand files, and a process 1024 descriptors, or 64. So a file that was not used for the longest time
is closed when there are too many, and opened again when it is used; it must then be the file that it was.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable

__all__ = ["Descriptor", "most_open"]

_LEAST = 8


def most_open() -> int:
    """Files of ours that are open at a time: half of the limit; the rest is for folders, pipes, libraries and imports."""
    try:
        import resource
    except ImportError:  # Windows
        return 256
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if soft == resource.RLIM_INFINITY else max(_LEAST, soft // 2)


class Descriptor:
    """A descriptor that may be closed between two uses: ``with descriptor as fd``.

    It is closed for good with its last reference, or by `close`.
    """

    __slots__ = ("__weakref__", "_fd", "_reopen", "_users")

    def __init__(self, fd: int, reopen: Callable[[], int] | None) -> None:
        """Take over `fd`. `reopen` opens the same file again, or raises; without it the descriptor stays open."""
        self._fd = fd
        self._reopen = reopen
        self._users = 0
        if reopen is not None:
            with _open.lock:
                _open.add(self)

    def __enter__(self) -> int:
        with _open.lock:
            if self._fd < 0:
                if self._reopen is None:
                    raise ValueError("the descriptor is closed")
                self._fd = self._reopen()
                _open.add(self)
            elif self._reopen is not None:
                _open.touch(self)
            self._users += 1
            return self._fd

    def __exit__(self, *error: object) -> None:
        with _open.lock:
            self._users -= 1

    def close(self) -> None:
        """Close it for good; may be called twice."""
        with _open.lock:
            self._reopen = None
            self._close()

    def __del__(self) -> None:
        self.close()

    def _close(self) -> None:
        _open.forget(self)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def rest(self) -> bool:
        """Close it until its next use, unless it is in use."""
        if self._users or self._fd < 0:
            return False
        self._close()
        return True


class _Open:
    """Those that are open, in the order of their last use."""

    def __init__(self) -> None:
        # A descriptor may be given up by the collector at any moment, in a thread that holds the lock.
        self.lock = threading.RLock()
        self._order: dict[int, weakref.ref[Descriptor]] = {}
        self._most = 0

    def add(self, one: Descriptor) -> None:
        self._order[id(one)] = weakref.ref(one)
        if not self._most:
            self._most = most_open()
        if len(self._order) > self._most:
            # a few at once, so that this is not done at every use
            excess = len(self._order) - self._most + self._most // 8
            for key, reference in list(self._order.items()):
                other = reference()
                if other is None:
                    self._order.pop(key, None)
                elif other is not one and other.rest():
                    excess -= 1
                if excess <= 0:
                    break

    def touch(self, one: Descriptor) -> None:
        reference = self._order.pop(id(one), None)
        if reference is not None:
            self._order[id(one)] = reference

    def forget(self, one: Descriptor) -> None:
        self._order.pop(id(one), None)


_open = _Open()
if hasattr(
    os, "register_at_fork"
):  # a fork may come while a thread holds the lock, which nobody would release in the child
    os.register_at_fork(
        before=_open.lock.acquire, after_in_parent=_open.lock.release, after_in_child=_open.lock.release
    )
