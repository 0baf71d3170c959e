# SPDX-License-Identifier: Apache-2.0
"""Makes the pictures of docs/pages.md: runs the commands on the shipped examples and photographs their pages.

``python tools/page_pictures.py [--axe node_modules/axe-core/axe.min.js]`` needs Chromium. It ends with exit code 1 where a page
says something on the console, loads anything, is wider than a phone, or than paper with all its tables open, or is printed in
dark colours; with ``--axe`` also where axe-core finds a fault. Paths are relative, so that the pictures show nothing of a
machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.browser import Browser, Look, browser  # noqa: E402

IMAGES = ROOT / "docs" / "images"
LARGEST = 150_000  # bytes of a picture


_WIDE = Look(1280)
_PAPER = Look(700, dark=True, paper=True)  # A4 within margins


@dataclass(frozen=True)
class Picture:
    """One page.

    Attributes:
        name: Of the picture.
        command: That makes the page; ``--html`` is added.
        look: How it is photographed.
        height: Where the picture is cut, in pixels of the page.
    """

    name: str
    command: str
    look: Look = _WIDE
    height: int = 1500


PICTURES = (
    Picture("report", "report lora --base base"),
    Picture("report-phone", "report lora --base base", Look(390, dark=True)),
    Picture("merge", "merge base lora -o merged"),
    Picture("extract", "extract-lora base merged --dry-run", Look(1280, scale=0.5), 2700),
    Picture("extract-dark", "extract-lora base merged --dry-run", Look(1280, dark=True, scale=0.45), 2700),
    Picture("inspect", "inspect lora", Look(1280, scale=0.8), 1900),
    Picture("diff", "diff base merged --spectrum --intruders", Look(1280, scale=0.5), 2600),
    Picture("conflict", "combine lora extracted --dry-run", height=2000),
    Picture("check", "check base lora"),
    Picture("verify", "verify graph --against base", Look(1280, scale=0.7), 2300),
    Picture("bench", "bench graph --against int4-graph"),
)
BEFORE = (
    "export-onnx base -o graph -q",
    "export-onnx base -o int4-graph --weights-type int4 -q",
    "merge base lora -o merged --overwrite -q",
    "extract-lora base tuned -o extracted --rank 8 -q",
)


def main() -> int:
    """Make them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--axe", type=Path, help="axe.min.js of the npm package axe-core")
    axe = parser.parse_args().axe
    rules = None if axe is None else axe.resolve().read_text(encoding="utf-8")
    IMAGES.mkdir(exist_ok=True)
    faults = []
    with _elsewhere(), browser() as tab:
        for words in BEFORE:
            _run(words)
        for picture in PICTURES:
            page = Path(f"{picture.name}.html")
            _run(f"{picture.command} --html {page} --overwrite -q")
            faults += [f"{picture.name}: {fault}" for fault in _photographed(tab, page, picture, rules)]
    print(*faults, sep="\n")
    return int(bool(faults))


def _photographed(tab: Browser, page: Path, picture: Picture, rules: str | None) -> Iterator[str]:
    """Write the picture of a page, and say what is wrong with the page."""
    tab.show(page, picture.look)
    data = tab.picture(picture.look, picture.height)
    (IMAGES / f"{picture.name}.png").write_bytes(data)
    if len(data) > LARGEST:
        yield f"{len(data)} bytes"
    yield from (f"the console says {text}" for text in tab.said)
    yield from (f"asks for {url}" for url in tab.asked if url != page.resolve().as_uri())
    for look in (picture.look, Look(390), Look(390, dark=True), Look(1280, dark=True)):
        tab.show(page, look)
        if (wide := tab.value("document.documentElement.scrollWidth")) > look.width:
            yield f"{wide} pixels wide at {look.width}"
        for fault in tab.faults(rules) if rules else ():
            yield f"axe: {fault['impact']} {fault['id']}: {fault['help']}"
    yield from _printed(tab, page)


def _printed(tab: Browser, page: Path) -> Iterator[str]:
    """What is wrong with the page on paper, for a reader of dark colours who opened all of it."""
    tab.show(page, _PAPER)
    tab.value("document.querySelectorAll('details').forEach(each => { each.open = true })")
    if (wide := tab.value("document.documentElement.scrollWidth")) > _PAPER.width:
        yield f"{wide} pixels wide on paper of {_PAPER.width}"
    if (colour := tab.value("getComputedStyle(document.body).backgroundColor")) != "rgb(255, 255, 255)":
        yield f"printed on {colour}"
    pictures = "[...document.querySelectorAll('svg[role]')].filter(each => each.checkVisibility())"
    if (shown := tab.value(f"{pictures}.length")) != tab.value("document.querySelectorAll('svg[role]').length"):
        yield f"only {shown} pictures printed"


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """A folder with the examples under short names."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in ("base", "lora", "tuned"):
            Path(name).symlink_to(ROOT / "examples" / name)
        try:
            yield
        finally:
            os.chdir(before)


def _run(words: str) -> None:
    """In a process of its own, so that what `bench` says of memory is of it alone."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "formats", "cli"))
    subprocess.run(
        [sys.executable, "-m", "surgery_cli", *words.split()],
        env={**os.environ, "PYTHONPATH": paths}, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
