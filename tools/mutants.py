# SPDX-License-Identifier: Apache-2.0
"""Put one fault after the other into the product and see that its tests catch it: ``python tools/mutants.py [ROOM ...]``.

A mutant is a small change to the text of one file: a changed scale, a dropped tensor, a swapped axis, a wrong zero point, a
check left out. The tests beside it run on a copy of the tree, first as it is, then with the fault. A fault that they pass is a
hole in them. What came out stands in docs/guarantees.md, section 8.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".toml")
SECONDS = 500  # of one run of tests


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault.

    Attributes:
        room: What it is a fault of, as `mutants.toml` groups them.
        fault: In words.
        file: Changed.
        before: Text that stands in it once.
        after: What takes its place.
        tests: That have to notice.
    """

    room: str
    fault: str
    file: str
    before: str
    after: str
    tests: str


def read_mutants() -> tuple[Mutant, ...]:
    """Those of mutants.toml."""
    return tuple(Mutant(**fault) for fault in tomllib.loads(TABLE.read_text())["fault"])


def main() -> int:
    """Run them all, or those of the rooms named; the exit code is the number of faults that passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help="such as ledger or codecs; all by default")
    parser.add_argument("--fault", default="", metavar="WORDS", help="only those that are said with these words")
    asked = parser.parse_args()
    chosen = [
        mutant
        for mutant in read_mutants()
        if (not asked.rooms or mutant.room in asked.rooms) and asked.fault in mutant.fault
    ]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        _copy(tree)
        for tests in dict.fromkeys(mutant.tests for mutant in chosen):
            if (code := _run(tree, tests)) != 0:
                raise SystemExit(f"without any fault pytest ends with {code}: {tests}")
        print("| room | fault | file | noticed | s |\n| --- | --- | --- | --- | --- |")
        passed = [mutant for mutant in chosen if not _noticed(tree, mutant)]
    print(f"\n{len(chosen) - len(passed)} of {len(chosen)} faults were noticed")
    return len(passed)


def _copy(tree: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)


def _noticed(tree: Path, mutant: Mutant) -> bool:
    path, began = tree / mutant.file, time.monotonic()
    text = path.read_text()
    if text.count(mutant.before) != 1:
        raise SystemExit(f"{mutant.file}: '{mutant.before}' stands there {text.count(mutant.before)} times, not once")
    path.write_text(text.replace(mutant.before, mutant.after))
    try:
        code = _run(tree, mutant.tests)
    finally:
        path.write_text(text)
    if code not in (0, 1):
        raise SystemExit(f"with '{mutant.fault}' pytest ends with {code}, which is no failed test")
    seconds = time.monotonic() - began
    print(
        f"| {mutant.room} | {mutant.fault} | {mutant.file} | {'yes' if code else '**no**'} | {seconds:.0f} |",
        flush=True,
    )
    return code == 1


def _run(tree: Path, tests: str) -> int:
    paths = os.pathsep.join(str(tree / folder) for folder in ("", "formats", "cli"))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=SECONDS, check=False
    ).returncode  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
