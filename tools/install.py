# SPDX-License-Identifier: Apache-2.0
"""Run `pip install` and say what it does: `python tools/install.py VENV/bin/python [pip's arguments]`.

One line for each file that is downloaded, with its size, and a line every ten seconds in which nothing else was said; no bars, so
that a log of continuous integration is as easy to read as a terminal. What pip says of an error is shown as it is.
"""

from __future__ import annotations

import queue
import re
import subprocess
import sys
import threading
import time
from typing import IO

__all__ = ["Told", "main"]

_EVERY = 10.0  # seconds without a line
_KNOWN = re.compile(r"^\s*(Downloading|Using cached|Processing) (\S+)(?: \((?:([\d.]+) ([kMG]?B)|from .*)\))?$")
_FILE = re.compile(r"([^/]+?)-(\d[^-]*)-\S*\.whl(?:\.metadata)?$|([^/]+?)-(\d\S*?)\.tar\.gz$")
_UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


class Told:
    """What pip said, as what a person wants to know; `line` gives what to print, or nothing."""

    def __init__(self) -> None:
        self.packages, self.fetched, self.doing, self.problem = set[str](), 0.0, "looking for packages", False

    def line(self, said: str) -> str:
        """One line of pip's, worded anew; empty where it has no news."""
        said = said.rstrip()
        if found := _KNOWN.match(said):
            return self._file(*found.groups())
        if said.startswith("Installing collected packages"):
            self.doing = f"unpacking {said.count(',') + 1} packages"
            return f"  {self.doing}"
        if self.problem or said.startswith(("ERROR", "error:")):
            self.problem = True
            return said
        return ""

    def _file(self, how: str, path: str, number: str | None, unit: str | None) -> str:
        name = _FILE.search(path)
        if name is None or path.endswith(".metadata"):
            return ""
        package = f"{name[1] or name[3]} {name[2] or name[4]}".replace("_", "-")
        if package in self.packages:
            return ""
        self.packages.add(package)
        size = float(number) * _UNITS[unit] if number and unit else 0.0
        if how == "Downloading":
            self.fetched += size
        self.doing = f"after {package}"
        shown = f"{number} {unit}" if number else ""
        return f"  {package:<40} {shown:>9}  {'' if how == 'Downloading' else 'from here'}".rstrip()


def main(words: list[str]) -> int:
    """Install, and give pip's exit code."""
    python, *arguments = words
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *arguments]
    began, told = time.monotonic(), Told()
    print(f"pip install {' '.join(arguments)}", flush=True)
    pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines: queue.Queue[str | None] = queue.Queue()
    assert pip.stdout is not None
    threading.Thread(target=_read, args=(pip.stdout, lines), daemon=True).start()
    last = began
    while True:
        try:
            said = lines.get(timeout=1)
        except queue.Empty:
            shown = ""
        else:
            if said is None:
                break
            shown = told.line(said)
        if not shown and time.monotonic() - last >= _EVERY:
            shown = f"  ... {told.doing}, {time.monotonic() - began:.0f} s so far"
        if shown:
            print(shown, flush=True)
            last = time.monotonic()
    code = pip.wait()
    seconds = time.monotonic() - began
    if not code:
        print(f"  {len(told.packages)} packages, {told.fetched / 1e6:.0f} MB downloaded, {seconds:.0f} s", flush=True)
    return code


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
