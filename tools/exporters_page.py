# SPDX-License-Identifier: Apache-2.0
"""Write docs/exporters.md: `python tools/exporters_page.py` merges into, and inserts slots into, every golden graph (a minute)."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "formats"), str(ROOT / "cli")]

from surgery._version import __version__
from tests.support.graph_page import PAGE, line_of, other_line, page
from tests.support.graph_pairs import PAIRS, exported_here
from tests.support.graph_table import BUILT_IN, main_adapter, measured, slotted


def main() -> None:
    """Measure all, and write the page."""
    lines, others = [], []
    with tempfile.TemporaryDirectory(prefix="surgery-exporters-") as place:
        for name, pair in (PAIRS | exported_here(Path(place))).items():
            print(name, flush=True)
            adapter = main_adapter(pair)
            results = {} if name in BUILT_IN else {one: measured(pair, one) for one in pair.adapters}
            lines.append(line_of(pair, adapter, results.pop(adapter, None), slotted(pair, adapter)))
            others += [other_line(name, results)] if results else []
    PAGE.write_text(page(lines, others, __version__), encoding="utf-8")


if __name__ == "__main__":
    main()
