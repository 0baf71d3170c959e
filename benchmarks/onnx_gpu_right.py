# SPDX-License-Identifier: Apache-2.0
"""Whether fast graphs are right: logits and greedy tokens beside torch in float32, and beside torch's own 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch  # isort: skip
import numpy as np
from onnx_gpu_run import Run

from surgery.onnx.run.timed_graph import TimedGraph

__all__ = ["right"]

GREEDY = 32
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
LIMIT = 1e-2
BESIDE_TORCH = 1.25  # bf16 misses the limit in whatever runtime; ours may not lose more than torch
NEAR = 2  # errors that two logits may be apart and still be a tie

Logits = list[np.ndarray[Any, Any]]


def right(run: Run, dtype: str, name: str, folder: Path, side: TimedGraph, ahead: Sequence[int]) -> None:
    """Follow the reference's own greedy tokens; `ahead` is what the side's soft prompt stands for."""
    ids = [*ahead, *run.tokens]
    wanted, tokens = _torch(run, folder, torch.float32, ids, None)
    half, _ = _torch(run, folder, TORCH[dtype], ids, tokens)
    assert side.decoder is not None
    found = [side.decoder.prefill([run.tokens])[0].astype(np.float32)]
    found += [side.decoder.step([token])[0].astype(np.float32) for token in tokens[:-1]]
    worst, spread = _errors(found, wanted)
    torch_worst, torch_spread = _errors(half, wanted)
    line = {"dtype": dtype, "graph": name, "worst": worst, "torch_worst": torch_worst}
    run.precision.append(line | {"spread": spread, "torch_spread": torch_spread})
    differing = 0
    for one, reference in zip(found, wanted, strict=True):
        best, second = np.sort(reference)[-2:][::-1]
        if one.argmax() != reference.argmax() and best - second > NEAR * np.abs(one - reference).max():
            differing += 1
    title = f"{dtype} {name}: largest logit error / largest logit, {GREEDY} steps"
    run.check(title, worst, LIMIT)
    if dtype == "bf16":  # misses the limit, as torch does: how far from torch's own is the second question
        run.check(f"{title}, to torch's own in bf16", worst / torch_worst, BESIDE_TORCH)
    run.check(f"{dtype} {name}: greedy tokens that differ and are no near ties", differing, 0)


def _errors(found: Logits, wanted: Logits) -> tuple[float, float]:
    """Of the worst step: largest error to largest logit, and norm of the error to norm of the logits."""
    pairs = list(zip(found, wanted, strict=True))
    worst = max(float(np.abs(one - other).max() / np.abs(other).max()) for one, other in pairs)
    spread = max(float(np.linalg.norm(one - other) / np.linalg.norm(other)) for one, other in pairs)
    return worst, spread


def _torch(
    run: Run, folder: Path, kind: torch.dtype, prompt: Sequence[int], follow: Sequence[int] | None
) -> tuple[Logits, list[int]]:
    """Logits of transformers' eager model in `kind`, along the tokens `follow` or its own greedy ones, and those tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).to(run.device).eval()
    ids, cache, logits, tokens = torch.tensor([list(prompt)], device=run.device), None, [], []
    with torch.inference_mode():
        for step in range(GREEDY):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            logits.append(out.logits[0, -1].float().cpu().numpy())
            tokens.append(int(logits[-1].argmax()) if follow is None else follow[step])
            ids = torch.tensor([tokens[-1:]], device=run.device)
    return logits, tokens
