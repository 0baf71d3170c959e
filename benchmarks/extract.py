# SPDX-License-Identifier: Apache-2.0
"""Extracting a rank-16 LoRA from a full fine-tune, beside mergekit-extract-lora, on a CPU or a GPU.

    python benchmarks/extract.py [--mergekit VENV/bin/mergekit-extract-lora] [--rounds 3] [--threads N] [--folder DIR]
    python benchmarks/extract.py --device cuda [--mergekit ...] [--sizes 1b,8b] [--folder DIR] [--cold-sizes 1b,8b] [--against TREE]

Whole processes, in turn, on files that are in memory; as many threads for either. Then (`--cold-rounds`) ours again on files that were
dropped from the page cache, beside a plain read of both files that were dropped likewise. On a CPU the pair is one layer of Llama 7B, on a
GPU the 1.24 B and 8 B shapes of Llama 3. Correctness is asserted inside: the error of what was written is computed here from the files, in
float64, and one matrix is compared with the least error that its rank allows. `first read to synced` is measured in the process: from
the moment the first byte of a tensor is asked for until the adapter is complete and on the disk.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import mmap
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import ROOT, Sample, add_against, median, run, trees, versions
from pair import write_pair
from safetensors import safe_open
from shapes import EIGHT, LARGE, LAYER, LINEAR, Shape

RANK = 16
SHAPES = {"layer": (LAYER, 1), "1b": (LARGE, 1), "8b": (EIGHT, 8)}
_LOWEST_BIT = bytes(value & 1 for value in range(256))
TITLES = {"layer": "one layer of Llama 7B", "1b": "Llama 3.2 1B", "8b": "Llama 3 8B"}


def tensor(folder: Path, name: str) -> torch.Tensor:
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    with safe_open(folder / file, "pt") as opened:
        return opened.get_tensor(name)


def factors(adapter: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``(s B, A)`` of a module, float64, from the files alone."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert not config.get("rank_pattern"), "ranks differ: the contenders would not do the same"
    with safe_open(adapter / "adapter_model.safetensors", "pt") as opened:
        a, b = (opened.get_tensor(f"base_model.model.{name}.lora_{k}.weight").double() for k in "AB")
    assert a.shape[0] == RANK
    return b * (config["lora_alpha"] / config["r"]), a


def error(base: Path, tuned: Path, adapter: Path, names: list[str], device: str) -> float:
    """``||D - s B A|| / ||D||`` over all of `names`, float64."""
    left = energy = 0.0
    for name in names:
        delta = tensor(tuned, f"{name}.weight").to(device).double() - tensor(base, f"{name}.weight").to(device).double()
        b, a = (part.to(device) for part in factors(adapter, name))
        energy += float(delta.square().sum())
        left += float(delta.addmm_(b, a, alpha=-1).square_().sum())
    return math.sqrt(left / energy)


def least(base: Path, tuned: Path, name: str, device: str) -> float:
    """The same of one matrix, the least that rank 16 allows (Eckart and Young)."""
    delta = tensor(tuned, f"{name}.weight").to(device).double() - tensor(base, f"{name}.weight").to(device).double()
    squares = torch.linalg.eigvalsh(delta @ delta.T).flip(0).clamp_min(0)
    return math.sqrt(float(squares[RANK:].sum() / squares.sum()))


def names_of(shape: Shape) -> list[str]:
    layers = sorted({0, shape.layers // 2, shape.layers - 1})
    return [f"model.layers.{layer}.{module}" for layer in layers for module in LINEAR]


def read_all(folders: list[Path], threads: int) -> float:
    """Seconds to read every weight file once, each thread into a buffer that it uses again."""
    pieces = [
        (file, at, min(64 << 20, file.stat().st_size - at))
        for folder in folders
        for file in sorted(folder.glob("*.safetensors"))
        for at in range(0, file.stat().st_size, 64 << 20)
    ]
    opened = {file: os.open(file, os.O_RDONLY) for file, _, _ in pieces}

    def read(part: list[tuple[Path, int, int]]) -> None:
        buffer = memoryview(bytearray(8 << 20))
        for file, at, size in part:
            end = at + size
            while at < end:
                got = os.preadv(opened[file], [buffer[: end - at]], at)
                assert got > 0
                at += got

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, [pieces[number::threads] for number in range(threads)]))
    seconds = time.perf_counter() - started
    for descriptor in opened.values():
        os.close(descriptor)
    return seconds


def drop(folders: list[Path]) -> float:
    """Take every weight file out of the page cache; the share of its pages that is left, which should be 0."""
    left = pages = 0
    for file in sorted(file for folder in folders for file in folder.glob("*.safetensors")):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is dirty stays
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(descriptor).st_size
            one, all_of_them = resident(descriptor, size)
            left, pages = left + one, pages + all_of_them
        finally:
            os.close(descriptor)
    return left / pages


def resident(descriptor: int, size: int) -> tuple[int, int]:
    """``(pages in memory, pages)`` of a file."""
    page = mmap.PAGESIZE
    count = -(-size // page)
    state = (ctypes.c_ubyte * count)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    at = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    assert at != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
    try:
        assert libc.mincore(at, size, state) == 0, os.strerror(ctypes.get_errno())
    finally:
        libc.munmap(at, size)
    return sum(bytes(state).translate(_LOWEST_BIT)), count


def bench(size: str, work: Path, options: argparse.Namespace) -> None:
    shape, shards = SHAPES[size]
    gpu = options.device != "cpu"
    base, tuned, log = work / "base", work / "tuned", work / "log"
    made_on = options.device.partition(",")[0] if gpu else "cpu"
    started = time.perf_counter()
    write_pair(shape, base, tuned, made_on, shards)
    made = time.perf_counter() - started
    if gpu:
        torch.cuda.empty_cache()
    reads = [read_all([base, tuned], options.threads) for _ in range(4)][1:]  # the first one warms
    size_read = sum(file.stat().st_size for folder in (base, tuned) for file in folder.glob("*.safetensors"))
    print(
        f"## {TITLES[size]}: {shape.parameters / 1e9:.2f} B parameters, {size_read / 1e9:.2f} GB in both files (made in {made:.0f} s)\n"
    )
    ours, theirs = work / "ours", work / "theirs"
    checkouts = {f"surgery{added}": tree for added, tree in trees(options).items()}
    command = [
        sys.executable, "-P", "-m", "surgery_cli", "-q", "--json", "extract-lora", str(base), str(tuned), "-o", str(ours),
        "--rank", str(RANK), "--device", options.device, "--kind", options.kind,
    ]  # fmt: skip
    if options.workers or not gpu:
        command += ["--workers", str(options.workers or options.threads)]
    commands = dict.fromkeys(checkouts, tuple(command))
    if options.mergekit:
        commands["mergekit"] = [
            str(options.mergekit), "--model", str(tuned), "--base-model", str(base), "--out-path", str(theirs),
            "--max-rank", str(RANK), "--no-copy-tokenizer", "--num-threads", str(options.threads), "--quiet",
            *(["--cuda"] if gpu else []),
        ]  # fmt: skip
    threads = {} if gpu else {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    samples: dict[str, list[Sample]] = {name: [] for name in commands}
    inside: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    errors: dict[str, float] = {}
    names = names_of(shape)
    for number in range(options.rounds):
        for name in sorted(commands, reverse=bool(number % 2)):
            command = commands[name]
            if name == "mergekit" and number >= options.mergekit_rounds:
                continue
            tree = checkouts.get(name, ROOT)
            samples[name].append(run(command, log, {"HF_HUB_OFFLINE": "1", **threads}, tree))
            out = ours if name in checkouts else theirs
            if name in checkouts:
                told = json.loads(log.read_text())["result"]
                inside[name].append(told["timings"])
            if name not in errors:
                errors[name] = error(base, tuned, out, names, made_on)
                if name == "surgery":
                    check(told, base, tuned, out, names, made_on)
            shutil.rmtree(out)
    report(samples, errors, inside, reads)
    cold: list[Cold] = []
    for _ in range(options.cold_rounds if size in options.cold_sizes.split(",") else 0):
        left = [drop([base, tuned])]
        plain = read_all([base, tuned], options.threads)
        left.append(drop([base, tuned]))
        wall = run(commands["surgery"], log, {"HF_HUB_OFFLINE": "1", **threads}).wall
        timings = json.loads(log.read_text())["result"]["timings"]
        cold.append(Cold(plain, wall, timings, max(left)))
        shutil.rmtree(ours)
    if cold:
        report_cold(cold)


class Cold(NamedTuple):
    """One round on files that were dropped: seconds of a plain read, of our process, and of its parts; share of pages that stayed."""

    read: float
    wall: float
    timings: dict[str, float]
    left: float


def report_cold(rounds: list[Cold]) -> None:
    read, synced = (
        median(values)
        for values in ([one.read for one in rounds], [one.timings["first_read_to_synced"] for one in rounds])
    )
    reads = [one.read for one in rounds]
    parts = ", ".join(f"{key} {median([one.timings[key] for one in rounds]):.2f}" for key in rounds[0].timings)
    print(
        f"Cold ({len(rounds)} rounds, at most {max(one.left for one in rounds):.1%} of the pages were still in memory):"
    )
    print(
        f"process {median([one.wall for one in rounds]):.2f} s; {parts}.\n"
        f"Reading both files alone, cold: {read:.2f} s ({min(reads):.2f}-{max(reads):.2f}); extraction takes {synced / read:.2f}x that.\n"
    )


def check(told: dict[str, Any], base: Path, tuned: Path, out: Path, names: list[str], device: str) -> None:
    """What was reported is true, and no rank-16 matrix is nearer by more than a thousandth (and what rounding factors to bf16 costs)."""
    for name in names[: len(LINEAR)]:
        true, said = error(base, tuned, out, [name], device), told["tensors"][f"{name}.weight"]["residual"]
        assert abs(true - said) <= 0.01 * true, (name, true, said)
    best, true = least(base, tuned, names[0], device), error(base, tuned, out, names[:1], device)
    assert true <= math.hypot(1.001 * best, 2.0**-8), (true, best)
    print(f"`{names[0]}`: {true:.6f} of the change missing, {best:.6f} is the least possible at rank {RANK}\n")


def report(
    samples: dict[str, list[Sample]],
    errors: dict[str, float],
    inside: dict[str, list[dict[str, float]]],
    reads: list[float],
) -> None:
    print(
        "| | wall, s (median, min-max) | first read to synced, s | processor, s | peak memory, MB | missing of the change |"
    )
    print("|---|---|---|---|---|---|")
    for name, found in samples.items():
        walls = [sample.wall for sample in found]
        if not walls:
            continue
        span = f"{median(walls):.2f} ({min(walls):.2f}-{max(walls):.2f})"
        own = inside.get(name)
        synced = f"{median([one['first_read_to_synced'] for one in own]):.2f}" if own else ""
        peak, cpu = max(sample.peak for sample in found) / 1e6, median([sample.cpu for sample in found])
        print(f"| {name} | {span} | {synced} | {cpu:.1f} | {peak:.0f} | {errors[name]:.6f} |")
    read = median(reads)
    for name, own in inside.items():
        parts = ", ".join(f"{key} {median([one[key] for one in own]):.2f}" for key in own[0])
        print(f"\nIn the process ({name}), s: {parts}.")
    synced_at = median([one["first_read_to_synced"] for one in inside["surgery"]])
    print(
        f"Reading both files alone: {read:.2f} s ({min(reads):.2f}-{max(reads):.2f}); extraction takes {synced_at / read:.2f}x that."
    )
    if samples.get("mergekit"):
        ratio = median([s.wall for s in samples["mergekit"]]) / median([s.wall for s in samples["surgery"]])
        less = max(s.peak for s in samples["mergekit"]) / max(s.peak for s in samples["surgery"])
        print(f"mergekit takes {ratio:.1f} times as long, and {less:.1f} times the memory.")
        assert errors["surgery"] <= errors["mergekit"] * (1 + 1e-4), errors
    if "surgery, before" in samples:
        ratio = median([s.wall for s in samples["surgery"]]) / median([s.wall for s in samples["surgery, before"]])
        print(f"The process takes {ratio:.2f} of the time it took before.")
        assert abs(errors["surgery"] - errors["surgery, before"]) <= 1e-5, errors
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", type=Path, help="mergekit-extract-lora of a virtual environment of its own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit-rounds", type=int, default=1)
    parser.add_argument("--cold-rounds", type=int, default=1, help="on files dropped from the page cache; 0 for none")
    parser.add_argument("--cold-sizes", default="layer,1b", help="of which; 8b first waits for 32 GB to reach the disk")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kind", default="auto", help="of surgery: lora does not look whether a DoRA would be better")
    parser.add_argument("--sizes", help="of layer, 1b, 8b; by default layer on a CPU, 1b,8b on a GPU")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--workers", type=int, help="of surgery; by default as many as threads, its own default on a GPU"
    )
    parser.add_argument("--folder", type=Path, help="where to work, made if missing; 8b needs 33 GB")
    add_against(parser)
    options = parser.parse_args()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    for size in (options.sizes or ("layer" if options.device == "cpu" else "1b,8b")).split(","):
        work = Path(tempfile.mkdtemp(prefix="surgery-bench-", dir=options.folder))
        try:
            bench(size, work, options)
        finally:
            shutil.rmtree(work)
    print(versions("torch", "safetensors", "numpy"))
    if options.device != "cpu":
        print(torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
