# SPDX-License-Identifier: Apache-2.0
"""Merging a rank-16 LoRA on all linear layers into a 1.24 B bf16 Llama shape, beside copying the folder and beside PEFT.

    python benchmarks/merge.py --kind KIND|all [--part 1/2] [--rounds 1]    # every kind of adapter: benchmarks/kinds.py
    python benchmarks/merge.py [--rounds 5] [--peft-rounds 2] [--pause 5] [--folder DIR] [--device cuda] [--against TREE]

Every round runs each contender once, in turn, on warm files, as whole processes. Correctness is asserted inside: sampled
tensors against float64, and bit equality with PEFT's. The copy is followed by ``sync -f``, because the merge syncs what it writes too;
PEFT syncs nothing. A pause before each run lets the memory that the last one's output held go back to where it came from: on a virtual
machine whoever writes first after a deletion is handed warm pages, and writes twice as fast.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import ROOT, Sample, add_against, median, run, trees, versions
from safetensors import safe_open
from shapes import LARGE, LINEAR, SMALL, Shape, write_adapter, write_base

QUARTER = "merge, a quarter the size"
PEFT = """
import sys, torch, transformers, peft
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model = peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3], max_shard_size="1GB")
"""


def tensor(folder: Path, name: str) -> torch.Tensor:
    index = folder / "model.safetensors.index.json"
    file = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
    with safe_open(folder / file, "pt") as opened:
        return opened.get_tensor(name)


def check(shape: Shape, base: Path, adapter: Path, out: Path, peft: Path | None) -> None:
    """Sampled tensors: within 0.51 ulp of float64; PEFT's bits except at ties; what was not trained, untouched."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as factors:
        for layer, module in ((0, LINEAR[0]), (shape.layers // 2, LINEAR[4]), (shape.layers - 1, LINEAR[6])):
            name = f"model.layers.{layer}.{module}"
            a, b = (factors.get_tensor(f"base_model.model.{name}.lora_{k}.weight").double() for k in "AB")
            before, after = tensor(base, f"{name}.weight"), tensor(out, f"{name}.weight")
            exact = before.double() + 2.0 * (b @ a)
            ulp = torch.exp2(torch.frexp(torch.maximum(exact.abs(), before.double().abs())).exponent.double() - 8)
            worst = float(((after.double() - exact).abs() / ulp).max())
            assert worst <= 0.51, (name, worst)
            assert not torch.equal(before, after)
            if peft is not None:
                differ = int((tensor(peft, f"{name}.weight") != after).sum())
                assert differ <= after.numel() * 1e-4, (name, differ)
    name = "model.embed_tokens.weight"
    assert torch.equal(tensor(base, name), tensor(out, name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", help="a kind of adapter, or all: each beside PEFT, on a smaller model")
    parser.add_argument("--part", default="1/1", help="with --kind all: 2/3 is the second of three parts of the kinds")
    parser.add_argument("--rounds", type=int, help="5, or 1 with --kind")
    parser.add_argument("--peft-rounds", type=int, default=2)
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before each run")
    parser.add_argument("--folder", type=Path, help="where to work; needs 12 GB")
    parser.add_argument("--device", default="cpu")
    add_against(parser)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="surgery-bench-", dir=options.folder))
    options.rounds = options.rounds or (1 if options.kind else 5)
    try:
        if options.kind:
            import kinds  # with PEFT, which the other table needs only in processes of its own

            kinds.bench(work, options)
        else:
            bench(work, options)
    finally:
        shutil.rmtree(work)


def bench(work: Path, options: argparse.Namespace) -> None:
    for name, shape in (("large", LARGE), ("small", SMALL)):
        write_base(shape, work / name / "base")
        write_adapter(shape, work / name / "adapter")
    merges = {f"merge{added}": tree for added, tree in trees(options).items()}
    samples: dict[str, list[Sample]] = {"copy": [], **{name: [] for name in merges}, QUARTER: [], "PEFT": []}

    def merge(size: str) -> list[str]:
        base, adapter, out = (str(work / size / part) for part in ("base", "adapter", "out"))
        command = [sys.executable, "-P", "-m", "surgery_cli", "-q", "merge", base, adapter, "-o", out]
        return command if options.device == "cpu" else [*command, "--device", options.device]

    def once(name: str, command: list[str], out: Path) -> None:
        time.sleep(options.pause)
        samples[name].append(run(command, work / "log", tree=merges.get(name, ROOT)))
        shutil.rmtree(out)

    copied, peft_out = work / "copy", work / "peft"
    copy = ["sh", "-c", f"cp -r {work}/large/base {copied} && sync -f {copied}"]
    peft = [sys.executable, "-c", PEFT, *(str(work / "large" / part) for part in ("base", "adapter")), str(peft_out)]
    once("copy", copy, copied)  # one round to warm files and memory, not counted
    for name in merges:
        once(name, merge("large"), work / "large" / "out")
    samples = {name: [] for name in samples}
    for number in range(options.rounds):
        once("copy", copy, copied)
        for name in sorted(merges, reverse=bool(number % 2)):
            once(name, merge("large"), work / "large" / "out")
        once(QUARTER, merge("small"), work / "small" / "out")
        if not number:
            run(merge("large"), work / "log")
            check(LARGE, *(work / "large" / part for part in ("base", "adapter", "out")), None)
            shutil.rmtree(work / "large" / "out")
        if number < options.peft_rounds:
            samples["PEFT"].append(run(peft, work / "log", {"HF_HUB_OFFLINE": "1"}))
            run(merge("large"), work / "log")
            check(LARGE, *(work / "large" / part for part in ("base", "adapter", "out")), peft_out)
            shutil.rmtree(work / "large" / "out")
            shutil.rmtree(peft_out)
    report(samples)


def report(samples: dict[str, list[Sample]]) -> None:
    base = median([sample.wall for sample in samples["copy"]])
    print(f"{LARGE.parameters / 1e9:.2f} B parameters, bf16, 3 shards, rank 16 on all linear layers\n")
    print("| | wall, s (median, min-max) | against copy | processor, s | peak memory, MB |")
    print("|---|---|---|---|---|")
    titles = {"copy": "`cp -r` + `sync -f`", "merge": "`surgery merge`", "PEFT": "PEFT load, merge, save (no sync)"}
    for name, found in samples.items():
        if not found:
            continue
        walls = [sample.wall for sample in found]
        span = f"{median(walls):.2f} ({min(walls):.2f}-{max(walls):.2f})"
        peak = max(sample.peak for sample in found) / 1e6
        cpu = median([sample.cpu for sample in found])
        print(
            f"| {titles.get(name, f'`surgery merge`{name[5:]}')} | {span} | {median(walls) / base:.2f}x | {cpu:.1f} | {peak:.0f} |"
        )
    if samples["PEFT"]:
        ratio = median([s.wall for s in samples["PEFT"]]) / median([s.wall for s in samples["merge"]])
        print(f"\nPEFT takes {ratio:.1f} times as long as the merge.")
    large, small = (max(s.peak for s in samples[name]) for name in ("merge", QUARTER))
    print(f"Peak memory of a model four times smaller: {small / large:.2f} of the larger one's.")
    if samples.get("merge, before"):
        ratio = median([s.wall for s in samples["merge"]]) / median([s.wall for s in samples["merge, before"]])
        print(f"The merge takes {ratio:.2f} of the time it took before.")
    print(f"\n{versions('torch', 'numpy', 'safetensors')}")


if __name__ == "__main__":
    main()
