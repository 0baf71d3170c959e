# SPDX-License-Identifier: Apache-2.0
"""The state of one run of onnx_gpu.py: folders, time, findings, and their tables."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch  # isort: skip  # before onnxruntime, which then uses the CUDA libraries that torch brings
import numpy as np
from shapes import Shape

from surgery.onnx.graph.target import TARGETS, OperatorSet
from surgery.onnx.run.timed_graph import TimedGraph, floor_seconds, measure_all, open_timed, step_nbytes
from surgery.onnx.run.timing import Timing, compare

__all__ = ["CACHE", "PROMPT", "VIRTUAL", "Run", "tables"]

PROMPT, CACHE, VIRTUAL = 512, 1024, 20


class Run:
    """See the module."""

    def __init__(self, work: Path, budget: float, shape: Shape, steps: int, device: str) -> None:
        self.work, self.budget, self.shape, self.steps, self.device = work, budget, shape, steps, device
        self.began = time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.ratios: list[dict[str, Any]] = []
        self.precision: list[dict[str, Any]] = []
        self.profile: list[dict[str, Any]] = []
        self.checks: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.skipped: list[str] = []
        self.seconds: dict[str, float] = {}
        self.tokens: list[int] = np.random.default_rng(1).integers(3, shape.vocabulary, PROMPT).tolist()
        self.ahead: list[int] = np.random.default_rng(2).integers(3, shape.vocabulary, VIRTUAL).tolist()

    @property
    def target(self) -> OperatorSet:
        return TARGETS["cuda" if self.device == "cuda" else "cpu"]

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Do a part of it, if there is time left."""
        if (spent := time.perf_counter() - self.began) > self.budget:
            self.skipped.append(f"{name}: left out, {spent:.0f} s are spent")
            return
        began = time.perf_counter()
        try:
            work()
        except Exception as error:  # whatever it is, it is reported and fails the run; the other parts are worth having
            traceback.print_exc()
            self.failed.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        self.seconds[name] = time.perf_counter() - began
        print(f"# {name}: {self.seconds[name]:.1f} s", flush=True)
        gc.collect()  # sessions of this part
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def open_timed(self, path: Path, **options: Any) -> TimedGraph:
        return open_timed(path, **{"batch": 1, "max_length": CACHE, "device": self.device, **options})

    def measured(
        self,
        dtype: str,
        sides: Mapping[str, TimedGraph],
        rows: list[list[int]],
        steps: int | None = None,
        prefills: int = 5,
    ) -> tuple[list[dict[str, Any]], list[Timing]]:
        """Measure in turns, floors before and after; keep a line of each, and its ratios to the first."""
        floors = {name: [self.floor(side)] for name, side in sides.items()}
        times = measure_all(list(sides.values()), rows, steps or self.steps, prefills)
        found = []
        for (name, side), timing in zip(sides.items(), times, strict=True):
            floor = statistics.mean([*floors[name], self.floor(side)])
            line = {
                "dtype": dtype, "graph": name, "batch": len(rows), "decode_ms": (timing.token or 0) * 1e3,
                "floor_ms": floor * 1e3, "ratio": (timing.token or 0) / floor, "first_token_ms": timing.prefill * 1e3,
                "load_s": side.load_seconds, "memory_gb": side.memory_nbytes / 1e9, "weights_gb": step_nbytes(side.opened.path) / 1e9,
            }  # fmt: skip
            found.append(line)
            print(
                f"  {dtype} {name}: {line['decode_ms']:.3f} ms/token, {line['ratio']:.3f} x floor {line['floor_ms']:.3f} ms",
                flush=True,
            )
        self.rows += found
        for name, timing in list(zip(sides, times, strict=True))[1:]:
            prefill, step = compare(timing, times[0])
            for what, ratio in (("decode", step), ("first token", prefill)):
                if ratio is not None:
                    line = {"dtype": dtype, "graph": name, "of": what, "median": ratio.median}
                    self.ratios.append(line | {"low": ratio.low, "high": ratio.high, "pairs": ratio.pairs})
        return found, times

    def floor(self, side: TimedGraph) -> float:
        return floor_seconds(side) if self.device == "cuda" else float("nan")

    def ratio(self, dtype: str, graph: str, of: str, limit: float) -> None:
        """Check a ratio to the base."""
        found = next(r for r in self.ratios if (r["dtype"], r["graph"], r["of"]) == (dtype, graph, of))
        self.check(f"{dtype} {graph}: {of} / base, median of {found['pairs']} pairs", found["median"], limit)

    def check(self, what: str, value: float, limit: float) -> None:
        good = value <= limit
        self.checks.append({"what": what, "value": value, "limit": limit, "good": bool(good)})
        print(f"  {'ok  ' if good else 'MISS'} {what}: {value:.4f} (limit {limit})", flush=True)


def tables(run: Run) -> str:
    """All findings, for the docs."""
    lines = _table(
        run.rows,
        {
            "type": ("dtype", ""), "graph": ("graph", ""), "batch": ("batch", ""), "decode ms/token": ("decode_ms", ".3f"),
            "x floor": ("ratio", ".2f"), "floor ms": ("floor_ms", ".3f"), "first token ms": ("first_token_ms", ".2f"),
            "load s": ("load_s", ".2f"), "memory GB": ("memory_gb", ".2f"),
        },
    )  # fmt: skip
    lines += _table(
        run.ratios,
        {
            "type": ("dtype", ""), "graph": ("graph", ""), "of": ("of", ""), "/ first": ("median", ".4f"),
            "quarter below": ("low", ".4f"), "quarter above": ("high", ".4f"), "pairs": ("pairs", ""),
        },
    )  # fmt: skip
    lines += _table(
        run.precision,
        {
            "type": ("dtype", ""), "graph": ("graph", ""), "largest error / largest logit": ("worst", ".4f"),
            "torch's own": ("torch_worst", ".4f"), "norm of error / norm": ("spread", ".4f"), "torch's": ("torch_spread", ".4f"),
        },
    )  # fmt: skip
    lines += _table(run.profile, {"of a step": ("what", ""), "times": ("per_step", ".1f"), "us": ("us", ".1f")})
    lines += ["| check | value | limit | |", "|---|---|---|---|"]
    lines += [
        f"| {c['what']} | {c['value']:.4f} | {c['limit']} | {'ok' if c['good'] else '**missed**'} |" for c in run.checks
    ]
    return "\n".join([*lines, "", *(f"- {text}" for text in [*run.failed, *run.skipped])])


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = [format(row[key], form) if key in row else "-" for key, form in columns.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]
