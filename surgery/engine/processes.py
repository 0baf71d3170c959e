# SPDX-License-Identifier: Apache-2.0
"""Processes that compute for this one, where many threads would wait for one interpreter.

They are forked, so that they have all that this process has: open files, plans, functions. A process that has started
a thread cannot be forked safely: the others' locks stay locked in the copy. So `can_fork` says no there, and threads do
the work.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from surgery_formats.errors import ResourceError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

__all__ = ["Processes", "Stop", "can_fork", "forked"]

_PR_SET_PDEATHSIG = 1
Result = TypeVar("Result")


class Stop:
    """A flag that other processes see too."""

    def __init__(self) -> None:
        self._flag = mmap.mmap(-1, 1)

    def set(self) -> None:
        """Raise it; it stays."""
        self._flag[0] = 1

    def is_set(self) -> bool:
        """Whether it is raised."""
        return self._flag[0] == 1


def can_fork() -> bool:
    """Whether this process is on Linux, has one thread, libraries' included, and no torch, which starts them at need."""
    if not sys.platform.startswith("linux") or "torch" in sys.modules:
        return False
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


class _Child(NamedTuple):
    """A process, and this end of a pipe to it."""

    process: BaseProcess
    pipe: Connection


class Processes(Generic[Result]):
    """Copies of this process that wait for numbers; any number of threads may ask."""

    def __init__(self, children: Sequence[_Child]) -> None:
        self._idle: SimpleQueue[_Child] = SimpleQueue()
        for child in children:
            self._idle.put(child)

    def run(self, number: int) -> Result:
        """`work` of a number, by a process that is idle.

        Raises:
            ResourceError: the process has ended.
            BaseException: what `work` raised.
        """
        child = self._idle.get()
        try:
            child.pipe.send(number)
            failure, result = child.pipe.recv()
        except (EOFError, OSError) as error:
            raise ResourceError(
                "a process that computed weights has ended", hint="was memory short? try fewer `workers=`"
            ) from error
        finally:
            self._idle.put(child)
        if failure is not None:
            raise failure
        done: Result = result
        return done


@contextlib.contextmanager
def forked(count: int, work: Callable[[int], Result]) -> Iterator[Processes[Result]]:
    """`count` copies of this process that do `work`; they end with the block, or when this process does.

    Results and errors are pickled.
    """
    from multiprocessing import Pipe, get_context

    children: list[_Child] = []
    try:
        for _ in range(count):
            ours, theirs = Pipe()
            process = get_context("fork").Process(target=_serve, args=(work, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()  # so that a read fails when the process has ended
            children.append(_Child(process, ours))
        yield Processes(children)
    finally:
        for child in children:
            with contextlib.suppress(OSError):  # it has ended
                child.pipe.send(None)
        for child in children:
            child.process.join()
            child.pipe.close()


def _serve(work: Callable[[int], object], pipe: Connection, parent: int) -> None:
    # Ctrl-C reaches all processes of a terminal; the parent raises the flag that `work` looks at.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        return
    while (number := pipe.recv()) is not None:
        try:
            reply = None, work(number)
        except BaseException as error:
            pipe.send((error, None))
        else:
            pipe.send(reply)
