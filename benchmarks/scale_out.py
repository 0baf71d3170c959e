# SPDX-License-Identifier: Apache-2.0
"""Merging and extracting with 1, 2 and 4 workers, a model of it on paper, and what that says of 405 B on 16 nodes.

    python benchmarks/scale_out.py [--runner ray|processes] [--gb 3] [--threads 4] [--workers 1,2,4] [--rounds 2] [--folder DIR]
    python benchmarks/scale_out.py --device cuda --only extract --gb 16     # a GPU for each worker

A worker is a node of a local Ray cluster with as many cores as `--threads`, or, with ``processes`` (and where there is no Ray), a plain
process that is handed shares. Asserted: every output has the bytes of one process.

The model. B bytes are written in c shares, by n workers; f of them are computed, the others copied. A worker's thread reads, computes and
writes in turn, so that a byte takes ``t = 1/r + f/a + 1/w`` seconds; a worker plans once (p seconds). No more than W bytes a second are
written to the shared disk, by however many. The driver (D seconds) plans, takes the files over and commits, and reads none of them:

    T(n) = p + max( ceil(c / n) * B / c * t, B / W ) + D

t and D are of the run with one worker; T(2) and T(4) are predicted from it and compared with what was measured. On N nodes, each with a
network of its own and a file system in common, shares take the longest of

    cores:        B * t * threads / (N * cores of a node), or GPUs: B * t / (N * GPUs of a node)
    network:      max(bytes read, bytes written) / N / network of a node
    file system:  (bytes read + bytes written) / its rate

and the driver D times as many seconds as there are times as many tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from measure import environment, versions
from scale_model import GB, Rates, Site, Taken, on_paper, predicted
from shapes import Shape, write_adapter, write_base

import surgery
from surgery.engine.devices import device_of
from surgery.engine.execute import Run
from surgery.engine.merge.merge_request import MergeRequest
from surgery.engine.shares.folders import assignments, finished_shares, write_share
from surgery.engine.shares.ray import Ray, share_count
from surgery.engine.shares.work import Cluster, Work, WorkRequest
from surgery_formats.threads import one_thread

SHAPE = Shape(4096, 1, 32, 8, 14336, 32000, tied=False)
REST = 4 * SHAPE.vocabulary * SHAPE.hidden
LAYER = 2 * SHAPE.parameters - REST
LLAMA_405B = Shape(16384, 126, 128, 8, 53248, 128256, tied=False)


def gpu(number: int) -> dict[str, str]:
    """What shows a worker one GPU of this machine, each another."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    every = seen.split(",") if seen else [str(each) for each in range(64)]
    return {"CUDA_VISIBLE_DEVICES": every[number]} if number < len(every) else {}


class Processes:
    """A cluster of plain processes of this machine."""

    def __init__(self, count: int) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
        self._children = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment() | gpu(number))
            for number in range(count)
        ]
        for child in self._children:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"

    @contextlib.contextmanager
    def shares(self, request: WorkRequest, work: Work, output: Path, run: Run) -> Iterator[Sequence[Path]]:
        count = share_count(work)
        todo: SimpleQueue[Any] = SimpleQueue()
        for each in assignments(request, work, output, count, verify=run.verify_copies):
            todo.put(each)

        def feed(child: subprocess.Popen[bytes]) -> None:
            assert child.stdin is not None
            assert child.stdout is not None
            with contextlib.suppress(Empty):
                while True:
                    pickle.dump((todo.get_nowait(), run.workers, run.device), child.stdin)
                    child.stdin.flush()
                    if child.stdout.readline() != b"done\n":
                        raise RuntimeError("a worker has ended")

        with ThreadPoolExecutor(len(self._children)) as pool:
            for future in [pool.submit(feed, child) for child in self._children]:
                future.result()
        with finished_shares(work, output, count, verify=run.verify_copies) as folders:
            yield folders

    def close(self) -> None:
        for child in self._children:
            child.kill()
            child.wait()


def worker() -> None:
    """What a process of `Processes` does."""
    planned: dict[str, Work] = {}
    out, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=out, flush=True)
    while True:
        try:
            assignment, threads, device = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if assignment.job not in planned:
            planned = {assignment.job: assignment.request.work()}
        run = Run(workers=threads, device=device_of(device))
        write_share(assignment, run, lambda work=planned[assignment.job]: work)
        print("done", file=out, flush=True)


@dataclass
class Timed:
    """A cluster that notes how long shares took, and how many bytes and shares there were."""

    cluster: Cluster
    seconds: float = 0.0
    nbytes: int = 0
    count: int = 0

    @contextlib.contextmanager
    def shares(self, request: WorkRequest, work: Work, output: Path, run: Run) -> Iterator[Sequence[Path]]:
        began = time.perf_counter()
        with self.cluster.shares(request, work, output, run) as folders:
            self.seconds, self.nbytes, self.count = time.perf_counter() - began, work.nbytes, len(folders)
            yield folders


@contextlib.contextmanager
def started(runner: str, count: int, threads: int, *, gpus: bool = False) -> Iterator[Cluster]:
    """`count` workers, ready, with a GPU for each if asked for."""
    if runner == "processes":
        processes = Processes(count)
        try:
            yield processes
        finally:
            processes.close()
        return
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": environment()["PYTHONPATH"]}
    import ray
    from ray.cluster_utils import Cluster as Nodes

    def node(number: int) -> dict[str, Any]:
        on = {"num_gpus": 1, "env_vars": gpu(number)} if gpus else {}
        return {"num_cpus": threads, "object_store_memory": 80 << 20, "include_dashboard": False, **on}

    nodes = Nodes(initialize_head=True, head_node_args=node(0))
    try:
        for number in range(1, count):
            nodes.add_node(**node(number))
        ray.init(nodes.address, log_to_driver=False, logging_level="CRITICAL")
        yield Ray(nodes.address)
    finally:
        ray.shutdown()
        nodes.shutdown()


@dataclass(frozen=True)
class Bench:
    """How everything is measured.

    Attributes:
        runner: ``ray`` or ``processes``.
        counts: Of workers.
        threads: Of a worker.
        rounds: After one that is not counted; the best is taken.
        folder: Where.
        device: Of an extraction.
    """

    runner: str
    counts: Sequence[int]
    threads: int
    rounds: int
    folder: Path
    device: str


Command = Callable[[Path, Any], Any]


def measured(command: Command, bench: Bench, right: Path, *, gpus: bool = False) -> list[Taken]:
    """The best of some rounds of the command with each number of workers; each output is compared with that of one process."""
    found, folder = [], bench.folder
    for count in bench.counts:
        taken = []
        with started(bench.runner, count, bench.threads, gpus=gpus) as cluster:
            for number in range(bench.rounds + 1):
                timed, began = Timed(cluster), time.perf_counter()
                command(folder / "out", timed)
                seconds = time.perf_counter() - began
                assert contents(folder / "out") == contents(right), f"other bytes with {count} workers"
                remove(folder / "out")
                if number:  # in the first, processes import, and files come into memory
                    taken.append(Taken(count, timed.seconds, seconds - timed.seconds, timed.nbytes, timed.count))
        found.append(min(taken, key=lambda each: each.seconds))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """The manifest has the hash of every file, and is compared as it is."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name == "surgery_manifest.json"} | {
        path.name: path.stat().st_size.to_bytes(8) for path in folder.iterdir() if path.is_file()
    }


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()


def rates_of_merging(request: MergeRequest, threads: int, most: int, folder: Path) -> Rates:
    """Each step alone, by as many threads as a worker has; the disk by as many as all workers have."""
    from surgery.engine.arithmetic import compute

    plan = request.work().plan
    weights = plan.computed()
    nbytes = sum(tensor.nbytes for tensor in weights)

    def rate(work: Callable[[Any], object], items: Sequence[Any], total: int, count: int) -> float:
        with one_thread(), ThreadPoolExecutor(count) as pool:
            began = time.perf_counter()
            list(pool.map(work, items))
            return total / (time.perf_counter() - began)

    def read(tensor: Any) -> None:
        for source in tensor.step.sources:
            for _ in source.file.blocks(source.offset, source.nbytes):
                pass

    def computed(tensor: Any) -> None:
        compute(tensor.weight_label, tensor.step, lambda part, offset, raw: None, lambda: False, "cpu")

    def written(number: int) -> None:
        with open(folder / f"probe-{number}", "wb") as file:
            for _ in range(32):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        (folder / f"probe-{number}").unlink()

    rate(computed, weights[:threads], 1, threads)  # what is imported and read the first time
    block = os.urandom(8 << 20)
    reading, both = rate(read, weights, nbytes, threads), rate(computed, weights, nbytes, threads)
    writing = [rate(written, range(count), count * 32 * len(block), count) for count in (threads, threads * most)]
    arithmetic = 1 / max(1 / both - 1 / reading, 1e-15)
    return Rates(reading, arithmetic, writing[0], max(writing), nbytes / plan.nbytes)


def table(title: str, taken: Sequence[Taken], nbytes: int, plan: float, disk: float) -> None:
    print(f"\n### {title}: {nbytes / GB:.2f} GB, {taken[0].count} shares\n")
    print("| workers | shares | driver | all | rate | of the shares alone | predicted | off by |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for each in taken:
        said = predicted(taken[0], each.workers, plan, disk)
        off = "" if each is taken[0] else f"{said / each.seconds - 1:+.0%}"
        shown = "" if each is taken[0] else f"{said:.2f} s"
        print(
            f"| {each.workers} | {each.shares:.2f} s | {each.driver:.2f} s | {each.seconds:.2f} s | {nbytes / each.seconds / GB:.2f} GB/s "
            f"| {nbytes / each.shares / GB:.2f} GB/s | {shown} | {off} |"
        )


def merging(bench: Bench, base: Path, lora: Path, tuned: Path, shape: Shape) -> None:
    """Measure and predict merges, whose output is `tuned`."""

    def merge(output: Path, cluster: Any) -> None:
        surgery.merge(base, lora, output=output, engine=cluster, workers=bench.threads)

    request = MergeRequest(str(base), ((str(lora), 1.0),))
    began = time.perf_counter()
    request.work()
    plan = time.perf_counter() - began
    rates = rates_of_merging(request, bench.threads, max(bench.counts), bench.folder)
    taken = measured(merge, bench, tuned)
    table("Merging", taken, 2 * shape.parameters, plan, rates.disk)
    first = taken[0]
    print(
        f"\nA worker reads {rates.read / GB:.2f}, computes {rates.arithmetic / GB:.2f}, writes {rates.write / GB:.2f} GB/s; the disk "
        f"takes {rates.disk / GB:.2f} GB/s. For {first.nbytes / GB:.2f} GB, {rates.computed:.0%} of them computed, that is "
        f"{first.nbytes * rates.of_a_byte:.2f} s; measured with one worker {first.shares - plan:.2f} s. Planning: {plan:.2f} s."
    )
    large = 2.0 * LLAMA_405B.parameters
    core, tensors = bench.threads * first.shares / first.nbytes, len(LLAMA_405B.tensors()) / len(shape.tensors())
    print(f"\n{on_paper('405 B merge', Site(), large * core, large, large, first.driver * tensors)}")


def extracting(bench: Bench, base: Path, tuned: Path, rank: int, shape: Shape) -> None:
    """Measure and predict extractions."""
    right, gpus = bench.folder / "adapter", bench.device != "cpu"
    threads = None if gpus else bench.threads

    def extract(output: Path, cluster: Any) -> None:
        surgery.extract_lora(
            base, tuned, output=output, rank=rank, engine=cluster, workers=threads, device=bench.device
        )

    extract(right, None)
    taken = measured(extract, bench, right, gpus=gpus)
    table("Extracting", taken, 2 * shape.parameters, 0.0, math.inf)
    large, first = 2.0 * LLAMA_405B.parameters, taken[0]
    seconds = (1 if gpus else bench.threads) * first.shares / first.nbytes * large
    print(f"\n{on_paper('405 B extraction', Site(), seconds, 2 * large, 0.0, first.driver, gpus=gpus)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runner", choices=["ray", "processes"])
    parser.add_argument("--gb", type=float, default=3)
    parser.add_argument("--threads", type=int, default=4, help="of a worker")
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2, help="after one that is not counted; the best is taken")
    parser.add_argument("--only", choices=["merge", "extract"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of extractions; cuda: a GPU each")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; about four times --gb are written")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker()
        return
    runner = options.runner or ("ray" if importlib.util.find_spec("ray") else "processes")
    counts = [int(count) for count in options.workers.split(",")]
    assert counts[0] == 1, "the model is made of one worker"
    shape = replace(SHAPE, layers=max(1, round((options.gb * GB - REST) / LAYER)))
    print(
        f"{versions('numpy', *(['ray'] if runner == 'ray' else []))}; workers: {runner}, {options.threads} threads each"
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        bench = Bench(runner, counts, options.threads, options.rounds, folder, options.device)
        base, lora, tuned = (folder / part for part in ("base", "lora", "tuned"))
        write_base(shape, base, 4 * max(counts))
        write_adapter(shape, lora, options.rank)
        surgery.merge(base, lora, output=tuned)
        if options.only != "extract":
            merging(bench, base, lora, tuned, shape)
        if options.only != "merge":
            extracting(bench, base, tuned, options.rank, shape)


if __name__ == "__main__":
    main()
