# SPDX-License-Identifier: Apache-2.0
"""Looks at every page of the built documentation as a phone and a desktop show it.

``python tools/site_check.py SITE --axe node_modules/axe-core/axe.min.js`` needs Chromium and a folder that ``mkdocs build``
made. It ends with exit code 1 where axe-core finds a serious or critical fault, where a page is wider than its window, or
where something cannot be loaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.browser import Browser, Look, browser  # noqa: E402

LOOKS = (Look(390), Look(390, dark=True), Look(1280))


def main() -> int:
    """Look at them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path, help="what mkdocs build made")
    parser.add_argument("--axe", type=Path, required=True, help="axe.min.js of the npm package axe-core")
    asked = parser.parse_args()
    rules = asked.axe.read_text(encoding="utf-8")
    pages = sorted(asked.site.rglob("index.html"))  # 404.html has the links of a server
    faults = 0
    with browser() as tab:
        for page in pages:
            for look in LOOKS:
                for fault in faults_of(tab, page, look, rules):
                    print(f"{page.relative_to(asked.site)} at {look.width}{', dark' * look.dark}: {fault}")
                    faults += 1
    print(f"{len(pages)} pages, {faults} faults")
    return int(faults > 0)


def faults_of(tab: Browser, page: Path, look: Look, rules: str) -> Iterator[str]:
    """What is wrong with one page."""
    tab.show(page, look)
    if (wide := tab.value("document.documentElement.scrollWidth")) > look.width:
        yield f"{wide} pixels wide"
    for fault in tab.faults(rules):
        if fault["impact"] in ("serious", "critical"):
            places = ", ".join(node["target"][0] for node in fault["nodes"][:2])
            yield f"axe: {fault['impact']} {fault['id']}: {len(fault['nodes'])} times: {places}"


if __name__ == "__main__":
    raise SystemExit(main())
