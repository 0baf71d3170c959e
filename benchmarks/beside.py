# SPDX-License-Identifier: Apache-2.0
"""This checkout beside another one: merge, extraction and export, as whole processes and in turn.

    python benchmarks/beside.py OTHER [--rounds 5] [--pause 3] [--jobs merge,extract,export,help] [--device cuda]
        [--folder DIR]

OTHER is a checkout of the same project, such as a git worktree of an earlier commit; both run with this interpreter. The merge is that of
benchmarks/merge.py (rank 16 on all linear layers of a 1.24 B bf16 Llama shape), the extraction that of benchmarks/extract.py (rank 16, one
layer of Llama 7B), the export that of benchmarks/export.py (1.24 B, ``--weights reference``), ``help`` is ``surgery --help``. Both
contenders' files must be equal to the byte. Which of the two runs first changes from round to round.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import ROOT, Sample, median, run, versions
from pair import write_pair
from shapes import LARGE, LAYER, write_adapter, write_base

ADDED = ("model.onnx", "prefill.onnx", "genai_config.json")  # what an export adds to the folder of its base


@dataclass(frozen=True)
class Job:
    """One command and what it writes.

    Attributes:
        name: For the table.
        words: Of the command, ``{out}`` being where it writes.
        out: The folder it makes, or adds to.
        files: Names of what it writes; all of the folder if there are none.
    """

    name: str
    words: Sequence[str]
    out: Path
    files: Sequence[str] = ()

    def written(self) -> list[Path]:
        """The files, sorted."""
        if self.files:
            return [self.out / name for name in self.files if (self.out / name).exists()]
        return sorted(path for path in self.out.rglob("*") if path.is_file())

    def move_to(self, place: Path) -> None:
        """Put what was written aside."""
        place.mkdir(parents=True)
        for path in self.written():
            target = place / path.relative_to(self.out)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, target)
        if not self.files and self.out.exists():
            shutil.rmtree(self.out)


def python_path(tree: Path) -> dict[str, str]:
    """The environment in which `tree` is the one that runs."""
    return {"PYTHONPATH": os.pathsep.join(str(tree / folder) for folder in ("", "formats", "cli"))}


def make_jobs(work: Path, names: Sequence[str], device: str) -> list[Job]:
    """Inputs on disk, and the commands over them."""
    jobs = []
    where = [] if device == "cpu" else ["--device", device]
    if "merge" in names:
        write_base(LARGE, work / "base")
        write_adapter(LARGE, work / "adapter")
        out = work / "merged"
        words = ["merge", str(work / "base"), str(work / "adapter"), "-o", str(out)]
        jobs.append(Job("merge", [*words, *where], out))
    if "extract" in names:
        write_pair(LAYER, work / "before", work / "tuned")
        out = work / "lora"
        words = ["extract-lora", str(work / "before"), str(work / "tuned"), "-o", str(out), "--rank", "16"]
        jobs.append(Job("extract-lora", [*words, "--kind", "lora", *where], out))
    if "export" in names:
        out = work / "one-shard"
        write_base(LARGE, out, shards=1)
        words = ["export-onnx", str(out), "-o", str(out), "--weights", "reference", "--target", "cpu"]
        jobs.append(Job("export-onnx", words, out, ADDED))
    if "help" in names:
        jobs.append(Job("--help", ["--help"], work / "nothing"))
    return jobs


def check_equal(one: Path, other: Path) -> None:
    """Both folders hold the same bytes."""
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file()), (one, other)
    different = [name for name in names if not filecmp.cmp(one / name, other / name, shallow=False)]
    assert not different, different


def compare(job: Job, trees: dict[str, Path], work: Path, rounds: int, pause: float) -> dict[str, list[Sample]]:
    """Run `job` on each tree in turn; the first round warms files and is checked, not counted."""
    samples: dict[str, list[Sample]] = {name: [] for name in trees}
    for number in range(rounds + 1):
        for name in sorted(trees, reverse=bool(number % 2)):
            time.sleep(pause)
            command = [sys.executable, "-P", "-m", "surgery_cli", *(["-q"] if job.name != "--help" else []), *job.words]
            sample = run(command, work / "log", python_path(trees[name]))
            job.move_to(work / "written" / name)
            if number:
                samples[name].append(sample)
                shutil.rmtree(work / "written" / name)
        if not number:
            check_equal(*(work / "written" / name for name in sorted(trees)))
            shutil.rmtree(work / "written")
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="a checkout to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pause", type=float, default=3.0, help="seconds before each run")
    parser.add_argument("--jobs", default="merge,extract,export,help")
    parser.add_argument("--device", default="cpu", help="of merge and extract-lora")
    parser.add_argument("--folder", type=Path, help="where to work; needs 12 GB")
    options = parser.parse_args()
    trees = {"other": options.other.resolve(), "this": ROOT}
    work = Path(tempfile.mkdtemp(prefix="surgery-bench-", dir=options.folder))
    print(versions("torch", "onnx", "safetensors"))
    print("\n| job | wall, s: other | this | ratio (min) | ratio (median) | processor ratio | peak MB: other | this |")
    print("|---|---|---|---|---|---|---|---|")
    try:
        for job in make_jobs(work, options.jobs.split(","), options.device):
            samples = compare(job, trees, work, options.rounds, options.pause)
            other, this = samples["other"], samples["this"]
            walls = [[sample.wall for sample in side] for side in (other, this)]
            processor = median([s.cpu for s in this]) / median([s.cpu for s in other])
            peaks = [max(sample.peak for sample in side) / 1e6 for side in (other, this)]
            print(
                f"| {job.name} | {median(walls[0]):.3f} | {median(walls[1]):.3f} | {min(walls[1]) / min(walls[0]):.3f} | "
                f"{median(walls[1]) / median(walls[0]):.3f} | {processor:.3f} | {peaks[0]:.0f} | {peaks[1]:.0f} |",
                flush=True,
            )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
