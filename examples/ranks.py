# SPDX-License-Identifier: Apache-2.0
"""How much of the example's full fine-tune a LoRA extracted from it keeps, at each rank, in what counts: the losses.

    python examples/ranks.py                # ranks 4 to 64, about two minutes on two cores
    python examples/ranks.py 8 24 --chars 8000

Extracts with the real command, lets PEFT attach each adapter to the base, and scores it on text that no model has seen, as
``examples/evaluate.py`` does. *Recovered* is the part of the fine-tune's gain on its own (target) text that the adapter has; what it
forgets of the old (source) text it should forget as the fine-tune does, no more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["RANKS", "Row", "extracted", "losses", "rows", "table"]

HERE = Path(__file__).resolve().parent
RANKS = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        model: ``base``, ``tuned`` or ``base + rank N``.
        source: Bits per byte on the text the base was trained for.
        target: And on the text of the fine-tune.
        recovered: Share of the fine-tune's gain on `target`.
        missing: Frobenius norm of what the adapter lacks of the change, relative to the change.
        nbytes: Of the weights that are to be stored beside the base.
        parameters: Their numbers; 0 where that is not counted.
    """

    model: str
    source: float
    target: float
    recovered: float
    missing: float
    nbytes: int
    parameters: int = 0


def extracted(out: Path, ranks: Sequence[int]) -> dict[int, dict[str, float]]:
    """``out/rank-N`` for each rank, by the command; what it says about itself."""
    found = {}
    for rank in ranks:
        words = ["extract-lora", HERE / "base", HERE / "tuned", "-o", out / f"rank-{rank}", "--rank", rank]
        command = [sys.executable, "-m", "surgery_cli", "--json", *map(str, words), "--overwrite"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[rank] = json.loads(done.stdout)["result"]
    return found


def losses(folders: Mapping[str, Path], chars: int | None) -> dict[str, dict[str, float]]:
    """Bits per byte of every model on both held-out texts."""
    from evaluate import load, nats
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(HERE / "base")
    texts = {k: (HERE / "heldout" / f"{k}.txt").read_text(encoding="utf-8")[:chars] for k in ("source", "target")}
    ids = {k: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for k, text in texts.items()}
    found = {}
    for name, folder in folders.items():
        model = load(folder, HERE / "base")
        found[name] = {
            kind: nats(model, ids[kind], tokenizer.bos_token_id) / math.log(2) / len(text.encode())
            for kind, text in texts.items()
        }
    return found


def rows(out: Path, ranks: Sequence[int], chars: int | None) -> list[Row]:
    """Extract and score."""
    facts = extracted(out, ranks)
    names = {f"base + rank {rank}": rank for rank in ranks}
    folders = {"base": HERE / "base", "tuned": HERE / "tuned", **{n: out / f"rank-{r}" for n, r in names.items()}}
    scores = losses(folders, chars)
    before, after = scores["base"]["target"], scores["tuned"]["target"]
    whole = (HERE / "tuned" / "model.safetensors").stat().st_size
    made = []
    for name, score in scores.items():
        fact = facts.get(
            names.get(name, 0), {"residual": float(name == "base"), "adapter_nbytes": whole * (name == "tuned")}
        )
        recovered = (before - score["target"]) / (before - after)
        size, count = int(fact["adapter_nbytes"]), int(fact.get("parameters", 0))
        made.append(Row(name, score["source"], score["target"], recovered, fact["residual"], size, count))
    return made


def table(found: Sequence[Row]) -> str:
    """As in docs/extraction.md."""
    lines = [
        "| model | source, bits/byte | target, bits/byte | gain recovered | change missing | bytes |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r.model} | {r.source:.4f} | {r.target:.4f} | {r.recovered:.1%} | {r.missing:.1%} | {r.nbytes:,} |"
        for r in found
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses of the example's extracted LoRAs, by rank.")
    parser.add_argument("ranks", nargs="*", type=int, default=list(RANKS), help="ranks to extract at")
    parser.add_argument("--chars", type=int, help="of each held-out text; all of it by default")
    parser.add_argument("--json", action="store_true", help="print a JSON array instead of the table")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="surgery-ranks-") as name:
        found = rows(Path(name), options.ranks, options.chars)
    print(json.dumps([asdict(row) for row in found], indent=2) if options.json else table(found))


if __name__ == "__main__":
    main()
