# SPDX-License-Identifier: Apache-2.0
"""``surgery`` and ``python -m surgery_cli``: signals and streams of the process, then the command."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
import traceback
import warnings
from typing import NoReturn

from surgery_cli import interruption

__all__ = ["main"]

USAGE = 2


def main() -> NoReturn:
    """Run the command line of this process and leave with its exit code."""
    # Whatever an interruption hits, be it an import or the way out, the exit code is its own.
    code = 1
    try:
        interruption.listen()
        code = _run()
    except KeyboardInterrupt:
        code = interruption.exit_code()
        os.write(2, b"error: interrupted\n")
    except Exception:  # what the error map does not know, or fails in itself: os._exit would hide it
        traceback.print_exc()
    finally:
        os._exit(interruption.exit_code() if code == 1 and interruption.asked() else code)


def _run() -> int:
    if not _streams():
        os.write(2, b"error: stdout is closed\n  hint: send it to /dev/null if nobody reads it\n")
        return USAGE
    # All products run in one thread (`surgery_formats.threads`): numpy need not start a team that waits beside them,
    # which on 16 cores costs a merge a third of its processor time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Importing torch makes a million objects that stay: looking for garbage among them costs a tenth of a short merge,
    # and taking the interpreter apart at the end a tenth more.
    gc.set_threshold(200_000, 50, 1000)
    # What numpy makes of NaN and of numbers too large is checked where it matters, and told in words that name the tensor.
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    from surgery_cli.group import surgery  # now, where an interruption is heard

    try:
        surgery.main(sys.argv[1:], prog_name="surgery")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    interruption.ignore()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


def _streams() -> bool:
    """Prepare the streams; False if stdout is closed, as nobody would see the answer.

    A closed descriptor is opened, or else the file that is opened next gets what is meant for a screen.
    """
    stdout = sys.stdout is not None
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  # lives as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name no terminal encoding has is shown, not a crash
    return stdout


if __name__ == "__main__":
    main()
