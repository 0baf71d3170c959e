# SPDX-License-Identifier: Apache-2.0
"""Adding two LoRAs of one 4096 x 4096 weight: how far every way is from the sum of their deltas, and what it costs.

    python benchmarks/combine.py [--size 4096] [--rank 64] [--quick]

Rows: this project's ``combine``, exact and cut to the rank of one source, as a user calls it (files read, written, read back and
compared); PEFT's own ``add_weighted_adapter``; and kohya's scripts by their formulas (sd-scripts, ``networks/merge_lora.py`` and
``svd_merge_lora.py``, written again here from their description). Errors are against the dense sum in float64. That ours is within 1e-6
of the sum, and within 1.0001 of the best of its rank, is asserted. ``--quick`` leaves out what needs a full SVD.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from measure import ROOT, Sample, add_against, median, run, trees, versions
from safetensors.torch import load_file, save_file

Factors = tuple[torch.Tensor, torch.Tensor]
"""B ``(out, rank)`` and A ``(rank, in)``."""
KEY = "base_model.model.q_proj.lora_"
PAIRS = ((1.0, 1.0), (0.7, -0.3))
ALPHA = 2  # times the rank
EXACT, OPTIMAL = 1e-6, 1.0001
ROUNDS = 3
CLAMP = 0.99  # of kohya's scripts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="without the full SVDs")
    add_against(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="surgery-bench-") as name:
        bench(Path(name), options.size, options.rank, full=not options.quick)
        whole_processes(Path(name), options)


def bench(folder: Path, size: int, rank: int, *, full: bool) -> None:
    """Make two adapters, combine them in every way, print the table."""
    sys.path[:0] = [str(ROOT), str(ROOT / "formats")]  # as on a clone that was not installed
    import peft  # noqa: F401 - loaded before the clock runs

    import surgery

    sources = [made(folder / side, size, rank, seed) for seed, side in enumerate("ab")]
    surgery.combine([(folder / "a", 0.5)], output=folder / "out")  # warm
    print(f"two LoRAs of rank {rank}, alpha {ALPHA * rank}, on a {size} x {size} weight, float32\n")
    print("| | weights | rank | error | of the best at that rank | processor, s |")
    print("|---|---|---:|---:|---:|---:|")
    for weights in PAIRS:
        wanted = sum(w * ALPHA * (B.double() @ A.double()) for (B, A), w in zip(sources, weights, strict=True))
        assert isinstance(wanted, torch.Tensor)
        best = least_error(sources, weights, rank)
        whole = float(wanted.norm())

        def row(
            title: str,
            factors: Callable[[], tuple[Factors, float]],
            weights: tuple[float, float] = weights,
            wanted: torch.Tensor = wanted,
            best: float = best,
            whole: float = whole,
        ) -> tuple[float, float]:
            began = time.process_time()
            (B, A), scale = factors()
            seconds = time.process_time() - began
            error = float((scale * (B.double() @ A.double()) - wanted).norm()) / whole
            ratio = error * whole / best if B.shape[1] == rank else float("nan")
            shown = f"{ratio:.5f}" if ratio == ratio else "-"
            pair = ", ".join(f"{weight:g}" for weight in weights)
            print(f"| {title} | {pair} | {B.shape[1]} | {error:.2g} | {shown} | {seconds:.2f} |", flush=True)
            return error, ratio

        exact, _ = row("`surgery combine`", lambda w=weights: ours(folder, w, None))
        assert exact <= EXACT, exact
        _, ratio = row(f"`surgery combine --rank {rank}`", lambda w=weights: ours(folder, w, rank))
        assert ratio <= OPTIMAL, ratio
        for kind in ("cat", "linear", *(("svd",) if full else ())):
            row(f"PEFT `{kind}`", lambda k=kind, w=weights: by_peft(folder, size, w, k, rank))
        row("kohya `merge_lora`", lambda w=weights: kohya_merge(sources, w, rank))
        row("kohya `merge_lora --concat`", lambda w=weights: kohya_concat(sources, w, rank))
        if full:
            row("kohya `svd_merge_lora`", lambda w=weights: kohya_svd(sources, w, rank))
    print(f"\n{versions('torch', 'peft', 'safetensors')}")


def whole_processes(folder: Path, options: argparse.Namespace) -> None:
    """The command from its start to its end, on this checkout and the one given by ``--against``, in turn."""
    checkouts = trees(options)
    print("\n| whole process | wall, s (median, min-max) | processor, s | peak memory, MB |\n|---|---:|---:|---:|")
    for title, more in (("combine", []), (f"combine --rank {options.rank}", ["--rank", str(options.rank)])):
        words = ["combine", f"{folder / 'a'}=0.5", f"{folder / 'b'}=0.5", *more]
        samples: dict[str, list[Sample]] = {name: [] for name in checkouts}
        for number in range(ROUNDS + 1):
            for name in sorted(checkouts, reverse=bool(number % 2)):
                command = [sys.executable, "-P", "-m", "surgery_cli", "-q", *words, "-o", str(folder / "whole")]
                sample = run(command, folder / "log", tree=checkouts[name])
                shutil.rmtree(folder / "whole")
                if number:  # the first one warms files
                    samples[name].append(sample)
        for name, found in samples.items():
            walls = [sample.wall for sample in found]
            span = f"{median(walls):.2f} ({min(walls):.2f}-{max(walls):.2f})"
            cpu, peak = median([sample.cpu for sample in found]), max(sample.peak for sample in found) / 1e6
            print(f"| `{title}`{name} | {span} | {cpu:.2f} | {peak:.0f} |", flush=True)


def made(folder: Path, size: int, rank: int, seed: int) -> Factors:
    """A PEFT adapter whose directions' strengths fall by 5 % from one to the next, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, size, generator=generator) / size**0.5
    B = torch.randn(size, rank, generator=generator) * 0.95 ** torch.arange(rank) / rank
    folder.mkdir()
    save_file({f"{KEY}A.weight": A, f"{KEY}B.weight": B.contiguous()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA * rank, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return B, A


def least_error(sources: list[Factors], weights: tuple[float, float], rank: int) -> float:
    """Of any matrix of that rank (Eckart and Young): the singular values of the small core between two orthonormal bases."""
    B = torch.cat([w * ALPHA * B.double() for (B, _), w in zip(sources, weights, strict=True)], dim=1)
    A = torch.cat([A.double() for _, A in sources])
    core = torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T
    return float(torch.linalg.svdvals(core)[rank:].norm())


def ours(folder: Path, weights: tuple[float, float], rank: int | None) -> tuple[Factors, float]:
    """Files to file, proof included; then PEFT's reading of what was written."""
    from surgery import combine

    out = folder / "out"
    pairs = [(folder / side, weight) for side, weight in zip("ab", weights, strict=True)]
    combine(pairs, output=out, rank=rank, overwrite=True)
    tensors, config = (
        load_file(out / "adapter_model.safetensors"),
        json.loads((out / "adapter_config.json").read_text()),
    )
    return (tensors[f"{KEY}B.weight"], tensors[f"{KEY}A.weight"]), config["lora_alpha"] / config["r"]


def by_peft(folder: Path, size: int, weights: tuple[float, float], kind: str, rank: int) -> tuple[Factors, float]:
    """``add_weighted_adapter`` on a model that holds both; loading them is not timed apart, and is short."""
    import peft

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(size, size, bias=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(Model(), str(folder / "a"), adapter_name="a")
        model.load_adapter(str(folder / "b"), "b")
        model.add_weighted_adapter(["a", "b"], list(weights), "sum", combination_type=kind, svd_rank=rank)
    layer = model.base_model.model.q_proj
    return (layer.lora_B["sum"].weight.data, layer.lora_A["sum"].weight.data), layer.scaling["sum"]


def kohya_merge(sources: list[Factors], weights: tuple[float, float], rank: int) -> tuple[Factors, float]:
    """Both factors of every file times its ratio (up: its size), added up; alpha and dim of the first."""
    up = sum(abs(w) * B for (B, _), w in zip(sources, weights, strict=True))
    down = sum(w * A for (_, A), w in zip(sources, weights, strict=True))
    assert isinstance(up, torch.Tensor)
    assert isinstance(down, torch.Tensor)
    return (up, down), ALPHA * rank / rank


def kohya_concat(sources: list[Factors], weights: tuple[float, float], rank: int) -> tuple[Factors, float]:
    """As above, side by side; alpha stays the first's while the dim doubles."""
    up = torch.cat([abs(w) * B for (B, _), w in zip(sources, weights, strict=True)], dim=1)
    down = torch.cat([w * A for (_, A), w in zip(sources, weights, strict=True)])
    return (up, down), ALPHA * rank / up.shape[1]


def kohya_svd(sources: list[Factors], weights: tuple[float, float], rank: int) -> tuple[Factors, float]:
    """A full SVD of the dense sum, all strength in the up factor, then both clamped to the 99th percentile of their values."""
    dense = sum(w * ALPHA * (B @ A) for (B, A), w in zip(sources, weights, strict=True))
    left, values, right = torch.linalg.svd(dense)
    up, down = left[:, :rank] * values[:rank], right[:rank]
    every = torch.cat([up.flatten(), down.flatten()])
    high = float(every.kthvalue(max(1, round(CLAMP * every.numel()))).values)
    return (up.clamp(-high, high), down.clamp(-high, high)), 1.0


if __name__ == "__main__":
    main()
