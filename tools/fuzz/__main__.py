# SPDX-License-Identifier: Apache-2.0
"""``python -m tools.fuzz``: run, and print how often each target was executed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from . import __doc__ as about


def main() -> int:
    """Run; 0 if there was no fault."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--executions", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first execution")
    parser.add_argument("--within", type=float, default=float("inf"), help="seconds after which no more are begun")
    parser.add_argument("--match", default="", help="only targets whose name contains this")
    parser.add_argument("--only", type=int, help="run one execution here, and show its traceback")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs of faults")
    parser.add_argument("--json", type=Path, help="a file for the counts")
    parser.add_argument(
        "--guided", metavar="TARGET", help="this target alone, by the code that inputs reach (needs atheris)"
    )
    options = parser.parse_args()
    if options.guided:
        from .guided import run_guided

        return run_guided(options.guided, options.executions, options.seed)
    from .runs import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
