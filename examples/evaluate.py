# SPDX-License-Identifier: Apache-2.0
"""Bits per byte of the example's models on its held-out texts.

    python examples/evaluate.py                                   # the models shipped here
    python examples/evaluate.py examples/base some/merged/folder  # any model or PEFT folder

Bits per byte = (sum of the negative log-likelihoods of all tokens, in nats) / ln 2 / (UTF-8 bytes of the text).
The text is read in windows of ``--context`` tokens, each behind a beginning-of-text token and, for a soft prompt,
behind the prompt. A window begins ``--stride`` tokens after the one before and only the tokens which that one
did not hold are scored, so that every token is scored once and, past the first window, with at least
``context - stride`` tokens before it. Weights are used as they are stored (bfloat16), arithmetic is float32.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

__all__ = ["CONTEXT", "STRIDE", "Score", "evaluate", "load", "nats"]

HERE = Path(__file__).resolve().parent
SHIPPED = ("base", "tuned", "lora", "dora", "prompt")
CONTEXT, STRIDE = 480, 240  # tokens; with the prompt (16) and one special token below the 512 of training
_BATCH = 16  # windows at a time


@dataclass(frozen=True)
class Score:
    """What one model reaches on both held-out texts, in bits per byte."""

    model: str
    source: float
    target: float
    target_gain: float | None = None  # 1 - target / base's target
    recovered: float | None = None  # this model's gain as a share of the full fine-tune's


def nats(model: Any, ids: Sequence[int], bos: int, context: int = CONTEXT, stride: int = STRIDE) -> float:
    """Negative log-likelihood of ``ids`` (no special tokens in it), summed, in nats."""
    device = next(model.parameters()).device
    starts = list(range(0, max(1, len(ids) - context + stride), stride))
    total = 0.0
    for first in range(0, len(starts), _BATCH):
        rows, scored = [], []
        for start in starts[first : first + _BATCH]:
            row = list(ids[start : start + context])
            new = 0 if start == 0 else context - stride  # index of the first token no earlier window scored
            rows.append([bos, *row, *[bos] * (context - len(row))])
            scored.append([new <= i < len(row) for i in range(context)])
        batch, mask = torch.tensor(rows, device=device), torch.tensor(scored, device=device)
        with torch.inference_mode():
            logits: Tensor = model(input_ids=batch).logits
        logits = logits[:, -(context + 1) : -1].float()  # a soft prompt puts its own positions in front
        loss = torch.nn.functional.cross_entropy(logits[mask], batch[:, 1:][mask], reduction="none")
        total += float(loss.double().sum())
    return total


def load(folder: Path, base: Path, device: str = "cpu") -> Any:
    """A model folder, or a PEFT folder put on ``base``."""
    is_adapter = (folder / "adapter_config.json").exists()
    model: Any = AutoModelForCausalLM.from_pretrained(base if is_adapter else folder, dtype=torch.float32)
    if is_adapter:
        from peft import PeftModel  # only adapters need it

        model = PeftModel.from_pretrained(model, str(folder))
    return model.to(device).eval()


def evaluate(folders: Sequence[Path], root: Path, context: int, stride: int, device: str) -> list[Score]:
    """Score every folder; gains are relative to ``root/base`` and ``root/tuned`` where these are among them."""
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    texts = {kind: (root / "heldout" / f"{kind}.txt").read_text(encoding="utf-8") for kind in ("source", "target")}
    ids = {kind: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for kind, text in texts.items()}
    scores: dict[Path, Score] = {}
    for folder in folders:
        model = load(folder, root / "base", device)
        bits = {
            kind: nats(model, ids[kind], tokenizer.bos_token_id, context, stride)
            / math.log(2)
            / len(text.encode("utf-8"))
            for kind, text in texts.items()
        }
        scores[folder.resolve()] = Score(folder.name, bits["source"], bits["target"])
    base, tuned = (scores.get((root / name).resolve()) for name in ("base", "tuned"))
    if base is None:
        return list(scores.values())
    return [
        Score(
            s.model,
            s.source,
            s.target,
            1 - s.target / base.target,
            (base.target - s.target) / (base.target - tuned.target) if tuned else None,
        )
        for s in scores.values()
    ]


def _table(scores: Sequence[Score]) -> str:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    lines = ["| model | source, bits/byte | target, bits/byte | better on target | of the fine-tune's gain |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    lines += [
        f"| {s.model} | {s.source:.4f} | {s.target:.4f} | {percent(s.target_gain)} | {percent(s.recovered)} |"
        for s in scores
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Bits per byte on the held-out texts of the example.")
    parser.add_argument("folders", nargs="*", type=Path, help="model or PEFT folders (default: the shipped ones)")
    parser.add_argument("--root", type=Path, default=HERE, help="folder with base/ and heldout/ (default: this one)")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens in a window")
    parser.add_argument("--stride", type=int, default=STRIDE, help="tokens between windows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print a JSON array instead of the table")
    args = parser.parse_args()
    logging.disable_progress_bar()
    folders = args.folders or [args.root / name for name in SHIPPED if (args.root / name).is_dir()]
    scores = evaluate(folders, args.root, args.context, args.stride, args.device)
    print(json.dumps([asdict(s) for s in scores], indent=2) if args.json else _table(scores))


if __name__ == "__main__":
    main()
