# SPDX-License-Identifier: Apache-2.0
"""Write docs/models.md: `python tools/models_page.py` (seconds)."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "formats"), str(ROOT / "cli")]

from tests.support.exported_types import page

if __name__ == "__main__":
    (ROOT / "docs" / "models.md").write_text(page(), encoding="utf-8")
