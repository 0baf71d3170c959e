# SPDX-License-Identifier: Apache-2.0
"""The main jobs from end to end, on the example shipped here: look, merge, extract, convert, prove, and see what came out.

    make demo                      or      python examples/demo.py

Every step is the real command line in a process of its own. What it made is then judged by tools that are not this project's:
transformers runs the merged model, PEFT attaches the adapter to the base, and both must say the same. Everything is written
below ``demo-out/``, and replaced by the next run. Exit code 0 only if every check held.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RANKS = (4, 8, 16, 32, 64)  # at which a LoRA is extracted from the full fine-tune
SHOWN_RANK = 16
TEXT_CHARS = 8_000  # of each held-out text: enough to tell the models apart, quick on two cores
LOGIT_TOKENS = 256
FLOAT32_LIMIT = (
    1e-3  # logits are of the order of 10; float32 sums in another order differ by less than a thousandth of this
)
STORED_LIMIT = 0.01  # bits per byte that rounding the merged weights to bfloat16 may cost


class DemoError(Exception):
    """A step failed, or two things that must agree do not."""


@dataclass(frozen=True)
class Judged:
    """One model as transformers and PEFT run it."""

    name: str
    losses: Mapping[str, float]  # bits per byte, by text; empty where only the logits matter
    logits: Any
    nbytes: int


def surgery(*words: str, show: bool = True, why: str = "") -> str:
    """Run the command, after what it is for; its output goes to the screen (``show``) or comes back."""
    began = time.monotonic()
    if show:
        print((f"\n# {why}" if why else "") + f"\n$ surgery {shlex.join(words)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "surgery_cli", *words], stdout=None if show else subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise DemoError(f"'surgery {shlex.join(words)}' ended with exit code {done.returncode}")
    if show:
        print(f"# {time.monotonic() - began:.1f} s", flush=True)
    return done.stdout or ""


def operate(out: Path) -> None:
    """Everything this project does here."""
    base, lora = _shown(HERE / "base"), _shown(HERE / "lora")
    surgery("inspect", lora, why="look at the adapter")
    surgery("report", lora, "--base", base, why="what it saves, beside full copies")
    surgery("merge", base, lora, "-o", _shown(out / "merged"), "--overwrite", why="fold it into its base")
    exact = ("-o", _shown(out / "merged-fp32"), "--dtype", "fp32", "--overwrite", "--quiet")
    surgery(
        "merge", base, lora, *exact, why="again without rounding to bfloat16, to be compared with the attached adapter"
    )
    to_mlx = ("-o", _shown(out / "lora-mlx"), "--base", base, "--overwrite")
    surgery("convert", lora, "--to", "mlx", *to_mlx, why="write it for another program")
    for rank in sorted(RANKS, key=lambda rank: rank != SHOWN_RANK):  # the one that is shown, then the others
        words = ("-o", _shown(out / f"rank-{rank}"), "--rank", str(rank), "--overwrite")
        loud = ("--table",) if rank == SHOWN_RANK else ("--quiet",)
        why = f"get a LoRA of rank {rank} out of the full fine-tune"
        surgery("extract-lora", base, _shown(HERE / "tuned"), *words, *loud, why=why)
    back = ("-o", _shown(out / "lora-back"), "--base", base, "--overwrite")
    surgery("convert", _shown(out / "lora-mlx"), "--to", "peft", *back, why="and the converted one back again")
    graph, prompt = _shown(out / "onnx"), _shown(HERE / "prompt")
    export = ("--prefix", prompt, "-o", graph, "--overwrite")
    surgery("export-onnx", base, lora, *export, why="graphs with the adapter merged and a soft prompt in front")
    surgery("run", graph, "-p", "The function returns", "--max-new", "32", why="run them, without torch")
    against = ("--against", base, "--adapter", lora, "--adapter", prompt)
    surgery("verify", graph, *against, why="compare what they compute with an independent reference")


def judge(out: Path) -> dict[str, Judged]:
    """Run base, base with the adapter attached, both merges and the full fine-tune on the same texts."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about itself
    import torch
    from evaluate import load, nats
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(HERE / "base")
    texts = {
        kind: (HERE / "heldout" / f"{kind}.txt").read_text(encoding="utf-8")[:TEXT_CHARS]
        for kind in ("source", "target")
    }
    ids = {kind: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for kind, text in texts.items()}
    sizes = {kind: len(text.encode()) for kind, text in texts.items()}
    probe = torch.tensor([ids["target"][:LOGIT_TOKENS]])
    found = {}
    for name, folder in {
        "base": HERE / "base",
        "base + adapter attached": HERE / "lora",
        "merged": out / "merged",
        "merged, stored as float32": out / "merged-fp32",
        "full fine-tune": HERE / "tuned",
        **{f"extracted at rank {rank}": out / f"rank-{rank}" for rank in RANKS},
    }.items():
        print(f"  {name}", flush=True)
        model = load(folder, HERE / "base")
        losses = {}
        if folder.name != "merged-fp32":
            losses = {kind: nats(model, ids[kind], tokenizer.bos_token_id) / math.log(2) / sizes[kind] for kind in ids}
        with torch.inference_mode():
            logits = model(input_ids=probe).logits.double()
        found[name] = Judged(name, losses, logits, _weights(folder))
    return found


def check(judged: Mapping[str, Judged], out: Path) -> list[tuple[str, str]]:
    """Facts worth showing; raises where two things that must agree do not."""
    base, attached, merged = judged["base"], judged["base + adapter attached"], judged["merged"]
    exact = _distance(judged["merged, stored as float32"], attached)
    rounded = _distance(merged, attached)
    if not exact <= FLOAT32_LIMIT:
        raise DemoError(f"merged and attached disagree: logits differ by {exact:.2e} (float32 allows {FLOAT32_LIMIT})")
    gap = max(abs(merged.losses[kind] - attached.losses[kind]) for kind in merged.losses)
    if not gap <= STORED_LIMIT:
        raise DemoError(f"merged and attached disagree: losses differ by {gap:.3f} bits/byte")
    if not merged.losses["target"] < base.losses["target"]:
        raise DemoError("the merged model is not better than its base on the text it was trained for")
    tuned, extracted = judged["full fine-tune"], [judged[f"extracted at rank {rank}"] for rank in RANKS]
    gains = [(base.losses["target"] - one.losses["target"]) for one in (*extracted, tuned)]
    if sorted(gains) != gains or gains[0] <= 0:
        raise DemoError("a LoRA of more rank should have more of the fine-tune's gain")
    same, total = _same_tensors(HERE / "lora", out / "lora-back")
    if same != total:
        raise DemoError(f"PEFT -> MLX -> PEFT: only {same} of {total} tensors came back as they were")
    ledger = json.loads((out / "merged" / "surgery_manifest.json").read_text())["ledger"]
    largest = float(attached.logits.abs().max())
    return [
        (
            "merged = attached",
            f"logits differ by at most {exact:.1e} in float32, {rounded:.1e} once stored in bfloat16",
        ),
        ("", f"(the largest logit is {largest:.0f})"),
        ("tensors", ", ".join(f"{number} {kind}" for kind, number in ledger["classes"].items()) + ", 0 lost"),
        ("survival", f"{ledger['survival']:.2%} of the update; rounding noise {ledger['rounding']:.2%} of its norm"),
        (
            "extracted LoRAs",
            "of the fine-tune's gain: "
            + ", ".join(f"{g / gains[-1]:.0%} at rank {r}" for g, r in zip(gains, RANKS, strict=False)),
        ),
        ("PEFT -> MLX -> PEFT", f"{same} of {total} tensors the same to the bit"),
    ]


def summary(judged: Mapping[str, Judged], facts: Sequence[tuple[str, str]], out: Path, seconds: float) -> None:
    """What a reader should take away."""
    cost = json.loads(surgery("--json", "report", str(HERE / "lora"), "--base", str(HERE / "base"), show=False))
    adapter, base = cost["result"]["adapters"][0], cost["result"]["base"]
    ten = next(task for task in adapter["tasks"] if task["tasks"] == 10)
    texts = f"the first {TEXT_CHARS:,} characters of texts none of them has seen"
    print(f"\n{'=' * 78}\nbits per byte on {texts} (lower is better)\n")
    print(f"{'':<26}  {'code (source)':>13}  {'prose (target)':>14}  {'weights':>12}")
    for one in (one for one in judged.values() if one.losses):
        print(f"{one.name:<26}  {one.losses['source']:>13.4f}  {one.losses['target']:>14.4f}  {one.nbytes:>10,} B")
    print()
    share = f"{adapter['nbytes'] / base['nbytes']:.1%} of a copy; trains {adapter['share']:.1%} of the parameters"
    many = f"{ten['shared_nbytes']:,} B, instead of {ten['copies_nbytes']:,} B for 10 full copies"
    rows = [*facts, ("the adapter", f"{adapter['nbytes']:,} B, {share}"), ("10 tasks on one base", many)]
    program = Path(sys.executable).with_name(
        "surgery"
    )  # of the environment that make made, which is on nobody's path yet
    rows.append(
        ("look at it", f"{_shown(program) if program.exists() else 'surgery'} inspect {_shown(out / 'merged')}")
    )
    for name, text in rows:
        print(f"{name:<21} {text}")
    print(f"\nall checks held, {seconds:.0f} s. The merged model: {_shown(out / 'merged')}")


def _distance(one: Judged, other: Judged) -> float:
    return float((one.logits - other.logits).abs().max())


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _same_tensors(one: Path, other: Path) -> tuple[int, int]:
    import torch
    from safetensors.torch import load_file

    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return sum(name in b and torch.equal(a[name], b[name]) for name in a), len(a | b)


def _shown(path: Path) -> str:
    """A path as a person in the current folder would write it."""
    return os.path.relpath(path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Inspect, merge, prove and convert the shipped example.")
    parser.add_argument("--out", type=Path, default=HERE.parent / "demo-out", help="folder for what it makes")
    out = parser.parse_args().out
    began = time.monotonic()
    try:
        out.mkdir(parents=True, exist_ok=True)
        operate(out)
        print("\n# run all of them with transformers and PEFT, on text that none of them has seen", flush=True)
        judged = judge(out)
        summary(judged, check(judged, out), out, time.monotonic() - began)
    except DemoError as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
