# SPDX-License-Identifier: Apache-2.0
"""A merge from bucket to bucket, beside obstore that reads the base in ranges and writes the same bytes in parts.

    python benchmarks/object_storage.py [--gb 2] [--rounds 3] [--targets q_proj,v_proj | --targets all] [--shard-gb 5]

The server (`object_server.py`) is a process of this machine that makes the base up and throws away what is written after hashing it, so
that 20 GB need no disk; it takes cores from both contenders alike, and its own time is told. Both run in turn, as whole processes.
Before that, a small merge is compared, part by part, with the same merge to a folder. Asserted as well: the bytes that a merge of this
size wrote are as many as the base's, nothing was written to the disk, and memory stays below 1 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import xxhash
from measure import ROOT, Sample, environment, median, run, versions
from shapes import LINEAR, Shape

SHAPE = Shape(4096, 1, 32, 8, 14336, 32000, tied=False)
LAYER = 2 * (SHAPE.parameters - 2 * SHAPE.vocabulary * SHAPE.hidden)
REST = 4 * SHAPE.vocabulary * SHAPE.hidden
SMALL = Shape(1024, 4, 16, 4, 4096, 8000, tied=False)
AFTER = "; print(next(line.split()[1] for line in open('/proc/self/io') if line.startswith('write_bytes')))"
MERGE = (
    "import sys, surgery; surgery.merge('s3://bench/base', 's3://bench/lora', output=sys.argv[1], overwrite=True)"
    + AFTER
)
PLAIN = """
import sys, obstore
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from obstore.store import S3Store
STEP = 8 << 20
store = S3Store("bench", client_options={"allow_http": True, "timeout": timedelta(minutes=5)})
pool = ThreadPoolExecutor(8)
def read(path, start, stop, etag):
    return obstore.get(store, path, options={"range": (start, stop), "if_match": etag}).bytes()
def stream(meta):
    ahead = deque()
    for start in range(0, meta["size"], STEP):
        ahead.append(pool.submit(read, meta["path"], start, min(start + STEP, meta["size"]), meta["e_tag"]))
        if len(ahead) > 8:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()
for meta in obstore.list(store, "base").collect():
    obstore.put(store, "plain/" + meta["path"].rpartition("/")[2], stream(meta), use_multipart=True, chunk_size=16 << 20, max_concurrency=4)
"""


@contextmanager
def server(shape: Shape, shards: int, targets: str, compiled: Path) -> Iterator[tuple[dict[str, str], int]]:
    """A server with a base and a LoRA; what leads to it, and its process."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "object_server.py"),
        json.dumps(asdict(shape)),
        str(shards),
        targets,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), text=True)
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_REGION": "us-east-1", "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(compiled),  # as pip leaves what it installs
        }, process.pid  # fmt: skip
    finally:
        process.kill()
        process.wait()


def seconds(process: int) -> float:
    """The time of cores that a process has taken."""
    ticks = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def parts(where: dict[str, str], key: str) -> list[tuple[int, str]]:
    with urllib.request.urlopen(f"{where['AWS_ENDPOINT_URL']}/parts/bench/{key}") as answer:
        return [(size, digest) for size, digest in json.loads(answer.read())]


def check(targets: str, folder: Path) -> None:
    """A merge into the bucket has the bytes of one into a folder."""
    with server(SMALL, 3, targets, folder / "compiled") as (where, _):
        run([sys.executable, "-c", MERGE, "s3://bench/out"], folder / "log", where)
        run([sys.executable, "-c", MERGE, str(folder / "out")], folder / "log", where)
        files = sorted((folder / "out").glob("*.safetensors"))
        assert len(files) == 3
        for file in files:
            with file.open("rb") as opened:
                for size, digest in parts(where, f"out/{file.name}"):
                    assert xxhash.xxh3_128_hexdigest(opened.read(size)) == digest, file.name
                assert not opened.read(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--targets", default="q_proj,v_proj")
    parser.add_argument("--shard-gb", type=float, default=5)
    options = parser.parse_args()
    targets = options.targets
    if targets == "all":
        targets = ",".join(module.rpartition(".")[2] for module in LINEAR)
    shape = replace(SHAPE, layers=max(1, round((options.gb * 1e9 - REST) / LAYER)))
    shards = max(2, round(options.gb / options.shard_gb))
    size = 2 * shape.parameters
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check(targets, folder)
        taken: dict[str, list[Sample]] = {"plain": [], "merge": []}
        served: dict[str, list[float]] = {name: [] for name in taken}
        commands = {
            "plain": [sys.executable, "-c", PLAIN],
            "merge": [sys.executable, "-c", MERGE, "s3://bench/out"],
        }
        with server(shape, shards, targets, folder / "compiled") as (where, process):
            for _ in range(options.rounds):
                for name, command in commands.items():
                    before = seconds(process)
                    taken[name].append(run(command, folder / "log", where))
                    served[name].append(seconds(process) - before)
                written = int((folder / "log").read_text().split()[-1])
                assert written < 1 << 20, f"{written} bytes were written to the disk"
            for number in range(1, shards + 1):
                file = f"model-{number:05d}-of-{shards:05d}.safetensors"
                sizes = [sum(size for size, _ in parts(where, f"{at}/{file}")) for at in ("plain", "out")]
                assert sizes[0] == sizes[1], (file, sizes)
    print(
        f"{size / 1e9:.1f} GB in {shards} shards, LoRA of rank 16 on {options.targets}; {versions('obstore', 'numpy')}"
    )
    for label, samples in taken.items():
        wall, peak = median([sample.wall for sample in samples]), max(sample.peak for sample in samples)
        cpu = median([sample.cpu for sample in samples])
        print(
            f"{label:6} {wall:7.2f} s  {size / wall / 1e9:5.2f} GB/s  {cpu:7.2f} s of cores  "
            f"{median(served[label]):6.2f} s of the server's  {peak / 1e6:5.0f} MB at most"
        )
    ratios = [merge.wall / plain.wall for plain, merge in zip(taken["plain"], taken["merge"], strict=True)]
    print(f"ratio  {median(ratios):.3f} (pairs {min(ratios):.3f} to {max(ratios):.3f})")
    assert max(sample.peak for sample in taken["merge"]) < 1_000_000_000


if __name__ == "__main__":
    main()
