# SPDX-License-Identifier: Apache-2.0
"""``surgery`` and ``python -m surgery_cli``: signals and streams of the process, then the command."""

from __future__ import annotations

import io
import signal
import sys
from types import FrameType
from typing import NoReturn

from surgery_cli.group import surgery

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line of this process and leave with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name no terminal encoding has is shown, not a crash
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # under nohup it stays ignored
            signal.signal(number, _interrupt)
    surgery.main(sys.argv[1:], prog_name="surgery")


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """As Ctrl-C: what was begun is taken back on the way out."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
