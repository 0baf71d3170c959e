# SPDX-License-Identifier: Apache-2.0
"""An extraction and an export of codes in shares: peak memory of workers and driver, as the kernel saw it, and seconds of each.

    python benchmarks/shares.py [--sizes 0.2,1] [--count 4] [--folder DIR]

Workers run one after the other, each a process of its own with one thread. The model is that of `memory.py`, in another number of
layers; the fine-tune is a merge of a LoRA. Ends with an error unless the output has the bytes of a single process.
"""

from __future__ import annotations

import argparse
import filecmp
import pickle
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import Sample, run, versions
from memory import SHAPE, layers_of
from shapes import write_adapter, write_base

import surgery
from surgery.engine.execute import Run
from surgery.engine.shares.folders import Shares, assignments, write_share
from surgery.extraction.request import ExtractRequest
from surgery.onnx.export.request import ExportRequest, WeightsAsked
from surgery.onnx.export.weight_options import WeightOptions

Job = tuple[str, tuple[Any, ...], dict[str, Any]]
"""A verb, its arguments and its options."""


def do(message: Path) -> None:
    """What a process of its own does: a share, or a verb."""
    kind, *rest = pickle.loads(message.read_bytes())
    if kind == "share":
        write_share(rest[0], Run(workers=1))
    else:
        name, arguments, options = rest
        getattr(surgery, name)(*arguments, **options)


def measured(work: Path, name: str, *message: Any) -> Sample:
    """A process that does it."""
    path = work / "message"
    path.write_bytes(pickle.dumps(message))
    return run([sys.executable, str(Path(__file__).resolve()), "--do", str(path)], work / name)


def compared(work: Path, request: Any, job: Job, count: int) -> str:
    """One row of the table."""
    verb, arguments, options = job
    single = measured(work, "log", "verb", verb, arguments, {**options, "output": str(work / "one" / "out")})
    shares = assignments(request, request.work(), work / "shared" / "out", count)
    workers = [measured(work, "log", "share", share) for share in shares]
    options = {**options, "output": str(work / "shared" / "out"), "engine": Shares(count)}
    driver = measured(work, "log", "verb", verb, arguments, options)
    names = sorted(path.name for path in (work / "one" / "out").iterdir())
    _, other, missing = filecmp.cmpfiles(work / "one" / "out", work / "shared" / "out", names, shallow=False)
    if other or missing:
        raise SystemExit(f"not the same: {other + missing}")
    shutil.rmtree(work / "one" / "out")
    shutil.rmtree(work / "shared" / "out")
    peaks = single.peak, max(worker.peak for worker in workers), driver.peak
    seconds = single.wall, max(worker.wall for worker in workers), driver.wall
    return " | ".join([*(f"{peak / 1e6:.0f} MB" for peak in peaks), *(f"{each:.1f} s" for each in seconds)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="0.2,1", help="in GB")
    parser.add_argument("--count", type=int, default=4, help="of shares")
    parser.add_argument("--folder", type=Path, help="where to work")
    parser.add_argument("--do", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do is not None:
        do(options.do)
        return
    print("| | GB | alone | worker | driver | alone | longest share | driver |\n|---|---|---|---|---|---|---|---|")
    for size in map(float, options.sizes.split(",")):
        work = Path(tempfile.mkdtemp(prefix="surgery-shares-", dir=options.folder))
        try:
            for name in ("one", "shared"):
                (work / name).mkdir()
            shape = replace(SHAPE, layers=layers_of(size))
            write_base(shape, work / "base", shards=max(2, round(size)))
            write_adapter(shape, work / "lora")
            base, lora, tuned = (str(work / name) for name in ("base", "lora", "tuned"))
            surgery.merge(base, lora, output=tuned)
            job: Job = "extract_lora", (base, tuned), {"rank": 16, "kind": "lora", "workers": 1}
            print("| extract-lora |", size, "|", compared(work, ExtractRequest(base, tuned), job, options.count), "|")
            job = "export_onnx", (base, lora), {"weights_type": "int4"}
            codes = WeightsAsked(options=WeightOptions(weights_type="int4"))
            request = ExportRequest(base, ((lora, 1.0),), asked=codes)
            print("| export-onnx int4 |", size, "|", compared(work, request, job, options.count), "|")
        finally:
            shutil.rmtree(work, ignore_errors=True)
    print(versions())


if __name__ == "__main__":
    main()
