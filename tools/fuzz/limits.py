# SPDX-License-Identifier: Apache-2.0
"""What an execution may take and do: a time, an amount of memory, and no more than reading."""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import Any

__all__ = ["MEMORY", "SECONDS", "ForbiddenError", "Limited", "TooSlowError", "bound_memory"]

SECONDS = 10.0
"""Of the processor: a busy machine makes no fault."""
WAITING = 60.0  # seconds of the clock, for what waits and takes no processor
MEMORY = 1 << 30
"""Bytes of addresses, beyond those of the program without an input."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = frozenset(
    (
        *(
            "os.mkdir",
            "os.remove",
            "os.rename",
            "os.rmdir",
            "os.link",
            "os.symlink",
            "os.truncate",
            "os.chmod",
            "os.chown",
        ),
        *("os.utime", "os.setxattr", "os.putenv", "os.unsetenv", "os.chdir", "shutil.rmtree", "shutil.move"),
        *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "os.kill"),
        *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"),
        "pickle.find_class",
    )
)
_watching = False


class TooSlowError(BaseException):
    """An execution took longer than it may; no handler of errors catches it."""


class ForbiddenError(BaseException):
    """An execution did more than reading. It did not succeed."""


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event == "open":
        if isinstance(arguments[2], int) and arguments[2] & _WRITING and arguments[0] not in (os.devnull, b"/dev/null"):
            raise ForbiddenError(f"opened {arguments[0]!r:.200} to write to it")
    elif event in _FORBIDDEN:
        raise ForbiddenError(f"{event} {arguments!r:.200}")


sys.addaudithook(_watch)
sys.dont_write_bytecode = True


def _over(*_: Any) -> None:
    raise TooSlowError(f"more than {SECONDS} seconds of the processor, or {WAITING} of the clock")


class Limited:
    """A context in which what is done is watched, and ended when it takes too long."""

    def __enter__(self) -> None:
        global _watching
        signal.signal(signal.SIGPROF, _over)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.signal(signal.SIGALRM, _over)
        signal.setitimer(signal.ITIMER_REAL, WAITING)
        _watching = True

    def __exit__(self, *_: object) -> None:
        global _watching
        _watching = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def bound_memory() -> None:
    """Let this process have no more than `MEMORY` beyond what it has."""
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
