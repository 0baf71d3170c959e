# SPDX-License-Identifier: Apache-2.0
"""Cores, and one of them per thread: products and factorisations round differently when split over different numbers of threads."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["LARGEST_COUNT", "MOST_THREADS", "blas_kernels", "cores", "one_thread"]

LARGEST_COUNT = 2**63 - 1
"""Of anything that an argument counts."""
MOST_THREADS = 1024
"""That an argument may ask for: a million take the machine, and no machine is quicker for them."""


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def blas_kernels() -> str:
    """The name of the kernels that OpenBLAS has chosen for this processor; nothing with another library, or with several."""
    libraries = [library for library in _controller().info() if library["user_api"] == "blas"]
    names = {library.get("architecture", "") for library in libraries if library["internal_api"] == "openblas"}
    return names.pop() if len(libraries) == len(names) == 1 else ""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit the linear algebra library of numpy to one thread while any caller is inside.

    The limit is the process's, not the calling thread's: it holds from the first entry to the last exit.
    """
    _limit.enter()
    try:
        yield
    finally:
        _limit.leave()


class _Limit:
    """Counts the callers inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._active: Any = None

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._active = _controller().limit(limits=1, user_api="blas")
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._active.restore_original_limits()


@functools.cache
def _controller() -> Any:
    """The libraries of this process; looking for them takes a millisecond."""
    import numpy  # noqa: F401 - loads the library to be limited
    import threadpoolctl

    return threadpoolctl.ThreadpoolController()


_limit = _Limit()
