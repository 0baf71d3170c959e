# SPDX-License-Identifier: Apache-2.0
"""Signals that ask the command to stop: heard at any moment, and answered where an exception does no harm.

An exception that is raised in an import may be lost or made another of, by code in C and by the import itself; one that is
raised in a finaliser is printed and lost. So there, and in functions of the library that are not to be left halfway, it waits.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

__all__ = ["asked", "check", "exit_code", "ignore", "listen"]

_WAIT = 0.01  # seconds until it is tried again
_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]  # not all on Windows
_WHOLE = "surgery_formats.whole"
_heard = 0  # the first signal
_listening = False


def listen() -> None:
    """Hear signals from now on; those that are ignored, as under nohup, stay so."""
    global _listening
    _listening = True
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _hear)


def ignore() -> None:
    """The command is at its end, and what it says is not to be cut off."""
    if not _listening:  # a part of another program
        return
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


def asked() -> bool:
    """Whether the user asked to stop."""
    return _heard != 0


def exit_code() -> int:
    """As shells have it: 128 and the number of the signal; 130 for Ctrl-C."""
    return 128 + (_heard or signal.SIGINT)


def check() -> None:
    """Raise KeyboardInterrupt if the user asked, from whatever thread."""
    if asked():
        raise KeyboardInterrupt


def _hear(number: int, frame: FrameType | None) -> None:
    global _heard
    _heard = _heard or number
    _stop(number, frame)


def _stop(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, now or soon."""
    if hasattr(signal, "setitimer") and _does_harm(frame):
        signal.signal(signal.SIGALRM, _stop)
        signal.setitimer(signal.ITIMER_REAL, _WAIT)
        return
    raise KeyboardInterrupt


def _does_harm(frame: FrameType | None) -> bool:
    """Whether an exception would be lost in this frame, or leave something half done."""
    marked = sys.modules.get(_WHOLE)
    if marked is not None and marked.is_within_whole(frame):
        return True
    while frame is not None:
        code = frame.f_code
        if (
            code.co_filename.startswith("<frozen importlib")
            or code.co_name == "__del__"
            or code.co_filename == _finalisers()
        ):
            return True
        frame = frame.f_back
    return False


def _finalisers() -> str:
    """The file of ``weakref``."""
    return getattr(sys.modules.get("weakref"), "__file__", None) or ""
