# SPDX-License-Identifier: Apache-2.0
"""What well-known programs make of good and faulty inputs, beside this one, as observed; writes docs/comparison.md's tables.

    python benchmarks/peers.py      # PEFT, which is in the development environment; three minutes
    python benchmarks/peers.py --mergekit VENV/bin/mergekit-extract-lora
    python benchmarks/peers.py --kohya VENV/bin/python SD-SCRIPTS
    python benchmarks/peers.py --kohya VENV/bin/python SD-SCRIPTS --networks
    python benchmarks/peers.py --optimum VENV/bin/optimum-cli

With an option only that program is run, with ``--networks`` on Flux, Stable Diffusion 3 and XL. Each VENV is an environment of its own;
what to install is in docs/comparison.md. Every program is a process of its own, called as its documentation says. What it wrote is read
here and compared with the base, or with a merge in float64; each outcome is worded from that, and must be the one in
`peers_expected.json` (``--learn`` writes it).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import peers_kohya
import peers_kohya_conversions
import peers_kohya_networks
import peers_optimum
import torch
from measure import ROOT, environment, versions
from peers_inputs import FAULTS, GOOD, faulty, fine_tune, good, merged_in_float64, other_base
from safetensors.torch import load_file

EXAMPLES = ROOT / "examples"
BASE = EXAMPLES / "base"
_PLACE = re.compile(r"layers\.\d+\.|lora_alpha")  # where the fault is
_KINDS = {"biases": "bias", "norms": "norm.weight", "embedding": "embed_tokens.weight", "head": "lm_head.weight"}
EXPECTED = Path(__file__).with_name("peers_expected.json")


@dataclass(frozen=True)
class Ran:
    """One process: its exit code, all it said, seconds."""

    code: int
    text: str
    seconds: float


def call(command: Sequence[str | Path]) -> Ran:
    """Run a program to its end, whatever that is."""
    began = time.perf_counter()
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "400", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [str(word) for word in command],
        env=environment() | quiet,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return Ran(done.returncode, done.stdout, time.perf_counter() - began)


def merge_with_peft(base: Path, adapter: Path, out: Path) -> Ran:
    """As PEFT's documentation has it, in a fork that need not import again what this process has."""
    import traceback

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    log, began = out.with_name(f"{out.name}.log"), time.perf_counter()
    if not (child := os.fork()):
        code = 1
        try:
            with open(log, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
            PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return Ran(os.waitstatus_to_exitcode(status), log.read_text(), time.perf_counter() - began)


def merge_here(base: Path, adapter: Path, out: Path) -> Ran:
    """The command of this project."""
    return call([sys.executable, "-m", "surgery_cli", "merge", base, adapter, "-o", out])


MERGERS: Mapping[str, Callable[[Path, Path, Path], Ran]] = {"surgery": merge_here, "PEFT": merge_with_peft}


def outcome(ran: Ran, base: Path, out: Path, usual: Ran) -> str:
    """What a person finds: refused and by what name, or how much was merged and whether more was said of it than usual."""
    weights = out / "model.safetensors"
    if ran.code:
        words = [f"refused, exit {ran.code}", "names the place" if _PLACE.search(ran.text) else ""]
        words.append("left files behind" if weights.exists() else "")
        return ", ".join(word for word in words if word)
    before, after = load_file(base / "model.safetensors"), load_file(weights)
    linear = [key for key in before if key.endswith("_proj.weight")]
    changed = sum(not torch.equal(before[key], after[key]) for key in linear)
    broken = sum(not bool(after[key].isfinite().all()) for key in linear)
    new = set(ran.text.splitlines()) - set(usual.text.splitlines())
    told = "a warning" if any("warn" in line.lower() for line in new) else "no word of it"
    return ", ".join(
        ["exit 0", f"{changed} of {len(linear)} weights changed", *([f"{broken} of them NaN"] if broken else []), told]
    )


def faults(work: Path) -> Mapping[str, Mapping[str, str]]:
    """By fault and program, what came of it."""
    lora, rows = EXAMPLES / "lora", dict[str, dict[str, str]]()
    cases = {fault.title: (BASE, faulty(name, lora, work / f"faulty-{name}")) for name, fault in FAULTS.items()}
    cases["another base of the same shapes"] = (other_base(BASE, work / "other-base"), lora)
    usual = {program: merge(BASE, lora, work / f"usual-{program}") for program, merge in MERGERS.items()}
    for number, (title, (base, adapter)) in enumerate(cases.items()):
        print(title, file=sys.stderr, flush=True)
        rows[title] = {}
        for program, merge in MERGERS.items():
            out = work / f"{number}-{program}"
            ran = merge(base, adapter, out)
            rows[title][program] = outcome(ran, base, out, usual[program])
            print(ran.text[-1500:], file=sys.stderr, flush=True)
    return rows


def units(before: torch.Tensor, after: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest distance from `exact`, in units in the last place of bfloat16 at that number, or at the base's if that is larger."""
    size = torch.maximum(before.double().abs(), exact.abs()).clamp_min(1e-30)
    spacing = torch.ldexp(torch.ones_like(size), torch.frexp(size)[1] - 8)
    return float(((after.double() - exact).abs() / spacing).max())


def exactness(work: Path) -> Mapping[str, Mapping[str, str]]:
    """By kind of adapter and program, how far the merge is from float64; half a unit is what one rounding costs."""
    rows, before = dict[str, dict[str, str]](), load_file(BASE / "model.safetensors")
    for name, (title, _) in GOOD.items():
        adapter = good(name, BASE, work / f"good-{name}")
        exact = merged_in_float64(BASE, adapter)
        rows[title] = {}
        print(title, file=sys.stderr, flush=True)
        for program, merge in MERGERS.items():
            out = work / f"good-{name}-{program}"
            ran = merge(BASE, adapter, out)
            assert ran.code == 0, ran.text
            after = load_file(out / "model.safetensors")
            rows[title][program] = f"{max(units(before[key], after[key], exact[key]) for key in after):.2f}"
    return rows


def missing(base: Path, tuned: Path, adapter: Path) -> Mapping[str, str]:
    """By kind of parameter, the part of a fine-tune's change that an extracted adapter lacks, as PEFT merges it in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    left, whole = dict[str, float](), dict[str, float]()
    for key in before:
        kind = next((kind for kind, end in _KINDS.items() if key.endswith(end)), "linear weights")
        left[kind] = left.get(kind, 0) + float((after[key].double() - merged[key].double()).square().sum())
        whole[kind] = whole.get(kind, 0) + float((after[key].double() - before[key].double()).square().sum())
    return {kind: f"{(left[kind] / whole[kind]) ** 0.5:.1%}" for kind in sorted(left)}


def extraction(work: Path, mergekit: Path) -> Mapping[str, Mapping[str, str]]:
    """By kind of parameter and program, what a LoRA of rank 16 lacks of a fine-tune's change."""
    base, tuned = fine_tune(work)
    here, there = work / "extracted-here", work / "extracted-there"
    ran = call([sys.executable, "-m", "surgery_cli", "extract-lora", base, tuned, "-o", here, "--rank", "16"])
    assert ran.code == 0, ran.text
    asked = ["--model", tuned, "--base-model", base, "--out-path", there, "--max-rank", "16"]
    ran = call([mergekit, *asked])
    assert (there / "adapter_model.safetensors").exists(), ran.text  # without the hub it ends with an error of its card
    ours, theirs = (missing(base, tuned, adapter) for adapter in (here, there))
    return {kind: {"surgery": ours[kind], "mergekit": theirs[kind]} for kind in ours}


def networks(kohya: peers_kohya.Kohya, work: Path) -> dict[str, Mapping[str, Mapping[str, str]]]:
    """Its scripts for Flux, Stable Diffusion 3 and XL."""
    kohya.inputs.mkdir()
    for network in ("flux", "sd3", "sdxl"):
        ran = kohya.run(network, kohya.inputs)
        assert not ran.code, ran.text
    tables = {table: getattr(peers_kohya_networks, table) for table in ("merges", "precisions", "sums", "resizes")}
    tables["conversions"] = peers_kohya_conversions.conversions
    return {f"kohya's networks: {title}": table(kohya, work) for title, table in tables.items()}


def observe(work: Path, options: argparse.Namespace) -> dict[str, Mapping[str, Mapping[str, str]]]:
    """What the programs that were asked for made of their inputs, by table."""
    if options.mergekit:
        return {"extraction": extraction(work, options.mergekit.absolute())}
    if options.optimum:
        cli = options.optimum.absolute()
        for program, sample in peers_optimum.costs(cli, work).items():
            print(f"{program}: {sample.cpu:.1f} s of processor time, {sample.peak / 1e6:.0f} MB")
        return {"optimum: exports": peers_optimum.exports(cli, call, work)}
    if options.kohya:
        python, checkout = (path.absolute() for path in options.kohya)
        kohya = peers_kohya.Kohya(python, checkout, call, work / "kohya-inputs")
        if options.networks:
            return networks(kohya, work)
        assert not kohya.run("make", kohya.inputs).code
        tables = ("merges", "precisions", "sums", "resizes", "extractions")
        return {f"kohya: {table}": getattr(peers_kohya, table)(kohya, work) for table in tables}
    return {"faults": faults(work), "exactness": exactness(work)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learn", action="store_true", help="write what is observed as what is expected")
    parser.add_argument("--mergekit", type=Path, help="mergekit-extract-lora of a virtual environment of its own")
    parser.add_argument(
        "--kohya", type=Path, nargs=2, help="Python of an environment of its own, a checkout of sd-scripts"
    )
    parser.add_argument("--networks", action="store_true", help="with --kohya: its scripts for Flux, SD 3 and XL")
    parser.add_argument("--optimum", type=Path, help="optimum-cli of a virtual environment of its own")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="surgery-peers-") as folder:
        observed = observe(Path(folder), options)
    print(versions("peft", "transformers", "torch"))
    for title, rows in observed.items():
        columns = list(next(iter(rows.values())))
        print(f"\n## {title}\n\n| | {' | '.join(columns)} |\n| --- {'| --- ' * len(columns)}|")
        for row, cells in rows.items():
            print(f"| {row} | {' | '.join(cells.values())} |")
    if options.learn:
        EXPECTED.write_text(json.dumps(json.loads(EXPECTED.read_text()) | observed, indent=1) + "\n")
    expected = {title: rows for title, rows in json.loads(EXPECTED.read_text()).items() if title in observed}
    assert observed == expected, "not what docs/comparison.md says"


if __name__ == "__main__":
    main()
