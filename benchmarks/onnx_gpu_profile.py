# SPDX-License-Identifier: Apache-2.0
"""Where the time of a decoding step goes: kernels of the device as CUPTI sees them, and nodes that are not on it."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

from surgery.onnx.run.timed_graph import TimedGraph, open_timed

STEPS = 20


def kernels(side: TimedGraph, prompt: list[int], work: Path) -> list[dict[str, Any]]:
    """Kernels of a replayed step by their name without its parameters, the longest first; the last two lines are gaps and the whole."""
    decoder: Any = side.decoder
    decoder.prefill([prompt])
    for _ in range(5):
        decoder.advance([5])
    if not torch.cuda.is_available():
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(STEPS):
            decoder.advance([5])
    profile.export_chrome_trace(str(work / "trace.json"))
    events = json.loads((work / "trace.json").read_text())["traceEvents"]
    wanted = ("kernel", "gpu_memcpy", "gpu_memset")
    found = sorted((e["ts"], e["dur"], e["name"]) for e in events if e.get("cat") in wanted)
    spent, count = defaultdict(float), Counter[str]()
    for _, taken, name in found:
        short = shortened(name)
        spent[short] += taken / STEPS
        count[short] += 1
    gaps = [after[0] - (before[0] + before[1]) for before, after in itertools.pairwise(found)]
    inner = [gap for gap in gaps if 0 <= gap < 20]  # longer ones lie between two steps
    lines = [
        {"what": name, "per_step": count[name] / STEPS, "us": spent[name]}
        for name in sorted(spent, key=lambda name: -spent[name])
    ]
    lines.append({"what": "gaps between kernels", "per_step": len(inner) / STEPS, "us": sum(inner) / STEPS})
    lines.append(
        {"what": "all of it", "per_step": len(found) / STEPS, "us": (sum(inner) + sum(e[1] for e in found)) / STEPS}
    )
    return lines


def shortened(name: str) -> str:
    """``void ns::kernel<types>(arguments)`` -> ``kernel``; names of cuBLAS stay."""
    plain = re.sub(r"<.*|\(.*", "", name.removeprefix("void ").replace("(anonymous namespace)", ""))
    return plain.rpartition("::")[2][:60] or name[:60]


def elsewhere(graph: Path, prompt: list[int], work: Path, **options: Any) -> list[dict[str, Any]]:
    """Nodes of one step that run on the cpu, and copies between devices, by onnxruntime's own profile (without a CUDA graph)."""
    side = open_timed(graph, cuda_graph=False, profile=work / "nodes", **options)
    decoder: Any = side.decoder
    decoder.prefill([prompt])
    decoder.step([5])
    events = json.loads(Path(side.opened.session.end_profiling()).read_text())
    runs = [e for e in events if e.get("name") == "model_run"]
    begin = runs[-1]["ts"]
    nodes = [
        e for e in events
        if e.get("cat") == "Node" and e["name"].endswith("_kernel_time") and e["ts"] >= begin
    ]  # fmt: skip
    count = Counter(
        (e["args"]["op_name"], e["args"]["provider"].removesuffix("ExecutionProvider"))
        for e in nodes
        if e["args"]["provider"].startswith("CPU") or e["args"]["op_name"].startswith("Memcpy")
    )
    lines = [{"what": f"{op} ({provider})", "per_step": number} for (op, provider), number in count.most_common()]
    return [*lines, {"what": "nodes in all", "per_step": len(nodes)}]
