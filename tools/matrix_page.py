# SPDX-License-Identifier: Apache-2.0
"""Write docs/matrix.md: `python tools/matrix_page.py` converts every golden adapter to every format (a minute or two)."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "formats"), str(ROOT / "cli")]

from surgery._version import __version__
from tests.support.matrix import outcomes
from tests.support.matrix_page import PAGE, page
from tests.support.matrix_rows import ROWS, sources_of


def main() -> None:
    """Run all, and write the page."""
    pairs = []
    for row in ROWS:
        with tempfile.TemporaryDirectory(prefix="surgery-matrix-") as folder:
            for source in sources_of(row, Path(folder) / "made", example=False):
                print(source.name, flush=True)
                pairs += outcomes(source, Path(folder) / "tried")
    PAGE.write_text(page(pairs, __version__), encoding="utf-8")


if __name__ == "__main__":
    main()
