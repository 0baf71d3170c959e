# SPDX-License-Identifier: Apache-2.0
"""Merging every kind of PEFT adapter into 0.24 B of Llama's shapes, beside PEFT: `python benchmarks/merge.py --kind all`."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from measure import ROOT, forked, median, run, versions
from safetensors.torch import load_file, save_file
from shapes import Shape, write_base

sys.path.insert(0, str(ROOT))
from kinds_right import Errors, check, load

from tests.oracles.peft_oracle import randomise

LARGE = Shape(2048, 6, 32, 8, 4096, 1024)  # a hidden size of Llama 3.2 1B
SMALL = replace(LARGE, layers=2)
_NOISE = 1.0
"""MB by which peaks of one and the same work of one thread differ; the smallest module has 2 in bf16, 4 in float32."""

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NARROW = ("k_proj", "v_proj")  # where PEFT factorises each weight, which takes it seconds for a larger one
FEW = ("q_proj", "v_proj")  # where PEFT takes minutes for all, to make the adapter or to merge it


@dataclass(frozen=True)
class Kind:
    """A kind of adapter, by PEFT's configuration of it."""

    name: str
    config: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    targets: Sequence[str] = LINEAR


def _lora(name: str, targets: Sequence[str] = LINEAR, **fields: Any) -> Kind:
    return Kind(name, "Lora", {"r": 16, "lora_alpha": 32, **fields}, targets)


KINDS = (
    _lora("LoRA"),
    _lora("rsLoRA", use_rslora=True),
    _lora("DoRA", use_dora=True),
    _lora("PiSSA", NARROW, init_lora_weights="pissa"),
    _lora("OLoRA", NARROW, init_lora_weights="olora"),
    _lora("KaSA", NARROW, kasa_config=peft.KasaConfig()),
    _lora("MiCA", NARROW, init_lora_weights="mica"),
    _lora("EVA", init_lora_weights="eva", eva_config=peft.EvaConfig()),
    _lora("VeLoRA", velora_config={"num_groups": 4, "scale": 1.0}),
    _lora("MonteCLoRA", FEW, monteclora_config=peft.MontecloraConfig(num_samples=2)),
    _lora("BD-LoRA", use_bdlora=peft.BdLoraConfig(
        target_modules_bd_a=["o_proj", "down_proj"], target_modules_bd_b=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
        nblocks=2,
    )),
    Kind("AdaLoRA", "AdaLora", {"init_r": 16, "total_step": 10}),
    Kind("BOFT", "BOFT", {"boft_block_size": 8}, NARROW),
    Kind("C3A", "C3A", {"block_size": 128}, FEW),
    Kind("DEFT", "Deft", {"r": 16}),
    Kind("PaRa", "Deft", {"r": 16, "decomposition_method": "qr", "para": True}),
    Kind("DeLoRA", "Delora", {"r": 16}),
    Kind("FourierFT", "FourierFT", {"n_frequency": 1000}, FEW),
    Kind("FRoD", "Frod", {}, ("v_proj",)),
    Kind("GLoRA", "Glora", {"r": 16}),
    Kind("GraLoRA", "Gralora", {"r": 32, "gralora_k": 2}),
    Kind("HiRA", "Hira", {"r": 16}),
    Kind("HRA", "HRA", {"r": 8}, FEW),
    Kind("(IA)^3", "IA3", {"feedforward_modules": ["down_proj"]}, ("k_proj", "v_proj", "down_proj")),
    Kind("LN tuning", "LNTuning", {}, ("input_layernorm", "post_attention_layernorm")),
    Kind("LoHa", "LoHa", {"r": 16, "alpha": 16}),
    Kind("LoKr", "LoKr", {"r": 16, "alpha": 16}),
    Kind("MiSS", "Miss", {"r": 64}),
    Kind("BAT", "Miss", {"r": 64, "init_weights": "bat"}, FEW),
    Kind("OFT", "OFT", {"oft_block_size": 32}, FEW),
    Kind("OSF", "OSF", {"effective_rank": 256}, NARROW),
    Kind("PEANuT", "Peanut", {"r": 16}),
    Kind("PVeRA", "Pvera", {"r": 256}),
    Kind("RandLoRA", "RandLora", {"r": 32}, FEW),
    Kind("RoAd", "Road", {"group_size": 64}, FEW),
    Kind("SHiRA", "Shira", {"r": 16}, FEW),
    Kind("SuperTuning", "Supertuning", {"r": 16, "sparsity": 0.99}, FEW),
    Kind("TinyLoRA", "TinyLora", {"r": 2, "u": 64, "weight_tying": 1.0}, NARROW),
    Kind("trainable tokens", "TrainableTokens", {"token_indices": list(range(3, 1000, 60))}, ("embed_tokens",)),
    Kind("Uni-LoRA", "UniLora", {"r": 16, "theta_d_length": 4096, "save_indices": True}),
    Kind("VB-LoRA", "VBLoRA", {"r": 4, "num_vectors": 256, "vector_length": 256}),
    Kind("VeRA", "Vera", {"r": 256}),
    Kind("WaveFT", "WaveFT", {"n_frequency": 1000}, FEW),
)  # fmt: skip


LIBRARIES = """
import numpy, ml_dtypes, threadpoolctl, xxhash
import surgery, surgery.verbs.merge, surgery.engine.arithmetic, surgery_formats.adapters.peft.read, surgery_formats.halves
"""
OURS = f"""
import sys, time
{LIBRARIES}
started, processor = time.perf_counter(), time.process_time()
surgery.merge(sys.argv[1], sys.argv[2], output=sys.argv[3], workers=int(sys.argv[4]) or None)
wall, processor = time.perf_counter() - started, time.process_time() - processor
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(wall, processor, peak)
"""
IMPORTS = "import torch, transformers, peft; transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM"


STARTED = f"""
{LIBRARIES}
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
COLUMNS = (
    "kind", "modules", "merge, s", "PEFT, s", "ratio", "without imports", "merge, processor, s", "PEFT, processor, s", "ratio",
    "without imports", "peak, MB", "one module, MB", "4 layers more, MB", "PEFT, peak, MB", "rounding, %", "PEFT's, %",
)  # fmt: skip


class Run(NamedTuple):
    """Seconds of one merge, with and without what its process imported, and its peak in MB."""

    wall: float
    processor: float
    bare_wall: float
    bare_processor: float
    peak: float


@dataclass(frozen=True)
class Measured:
    """The merges of one kind, and how far they are from float64."""

    ours: list[Run]
    peft: list[Run]
    alone: float
    alone_small: float
    errors: Errors


def write_adapter(kind: Kind, base: Path, folder: Path) -> None:
    """By PEFT, every trained number random."""
    config = getattr(peft, f"{kind.config}Config")(target_modules=list(kind.targets), **kind.fields)
    model = peft.get_peft_model(load(base), config)
    randomise(model, torch.Generator().manual_seed(1))
    model.save_pretrained(folder)


def write_small(adapter: Path, folder: Path) -> None:
    """The part of an adapter that is of the first layers."""
    folder.mkdir()
    shutil.copy(adapter / "adapter_config.json", folder)
    tensors = load_file(adapter / "adapter_model.safetensors")
    left_out = tuple(f".layers.{number}." for number in range(SMALL.layers, LARGE.layers))
    kept = {name: value for name, value in tensors.items() if not any(part in name for part in left_out)}
    save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})


def merge_by_peft(base: Path, adapter: Path, out: Path) -> None:
    """Load, merge, save."""
    model = peft.PeftModel.from_pretrained(load(base), adapter)
    model.merge_and_unload().save_pretrained(out, max_shard_size="1GB")


def chosen(options: argparse.Namespace) -> list[Kind]:
    """The kinds asked for."""
    found = [kind for kind in KINDS if options.kind in ("all", kind.name)]
    if not found:
        raise SystemExit(f"kinds are: {', '.join(kind.name for kind in KINDS)}")
    part, parts = map(int, options.part.split("/"))
    return found[part - 1 :: parts]


def bench(work: Path, options: argparse.Namespace) -> None:
    """Measure and print the table."""
    kinds = chosen(options)
    for name, shape in (("large", LARGE), ("small", SMALL)):
        write_base(shape, work / name, shards=1)
    imports = run([sys.executable, "-c", IMPORTS], work / "log")
    run([sys.executable, "-P", "-c", STARTED], work / "log")
    started = int((work / "log").read_text()) / 1e3
    print(f"{LARGE.parameters / 1e9:.2f} B parameters, bf16, {LARGE.layers} layers; the small one has {SMALL.layers}\n")
    print(
        f"PEFT's imports, measured once and added to its seconds: {imports.wall:.2f} s, {imports.cpu:.2f} of processor"
    )
    print(f"The process before a merge: {started:.0f} MB\n")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|", flush=True)
    slow, grown = [], []
    for kind in kinds:
        found = measured(kind, work, options.rounds)
        ours, theirs = (Run(*map(median, zip(*runs, strict=True))) for runs in (found.ours, found.peft))
        wall, processor = theirs.bare_wall + imports.wall, theirs.bare_processor + imports.cpu
        count = len(kind.targets) * (1 if kind.config == "TrainableTokens" else LARGE.layers)
        growth = found.alone - found.alone_small
        cells = [
            kind.name, f"{count}",
            f"{ours.wall:.2f}", f"{wall:.2f}", f"{wall / ours.wall:.1f}", f"{theirs.bare_wall / ours.bare_wall:.1f}",
            f"{ours.processor:.2f}", f"{processor:.2f}", f"{processor / ours.processor:.1f}",
            f"{theirs.bare_processor / ours.bare_processor:.1f}",
            f"{ours.peak:.0f}", f"{found.alone_small - started:.0f}", f"{growth:.1f}", f"{theirs.peak:.0f}",
            f"{100 * found.errors.ours:.2f}", f"{100 * found.errors.peft:.2f}",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)
        slow += [kind.name] if wall < ours.wall or processor < ours.processor else []
        grown += [kind.name] if growth > _NOISE else []
    print(f"\n{versions('peft', 'torch', 'transformers', 'numpy')}")
    assert not slow, f"slower than PEFT: {slow}"
    assert not grown, f"memory grows with the layers: {grown}"


def measured(kind: Kind, work: Path, rounds: int) -> Measured:
    """Ours and PEFT's, in turn; ours with one thread, of both models, for the memory; and what float64 says of both."""
    log, adapter, small = work / "log", work / "adapter", work / "small-adapter"
    forked(lambda: write_adapter(kind, work / "large", adapter), log)
    write_small(adapter, small)
    ours, theirs = [], []
    for _ in range(rounds):
        for name in ("out", "peft-out"):
            shutil.rmtree(work / name, ignore_errors=True)
        ours.append(merge(work / "large", adapter, work / "out", log))
        sample = forked(lambda: merge_by_peft(work / "large", adapter, work / "peft-out"), log)
        theirs.append(Run(sample.wall, sample.cpu, sample.wall, sample.cpu, sample.peak / 1e6))
    alone = merge(work / "large", adapter, work / "alone", log, workers=1).peak
    alone_small = merge(work / "small", small, work / "small-out", log, workers=1).peak
    same = [(work / folder / "model-00001-of-00001.safetensors").read_bytes() for folder in ("out", "alone")]
    assert same[0] == same[1], "the number of threads changes the result"
    found = forked_errors(kind, work, small, log)
    for name in ("out", "peft-out", "alone", "small-out", "adapter", "small-adapter"):
        shutil.rmtree(work / name)
    return Measured(ours, theirs, alone, alone_small, found)


def merge(base: Path, adapter: Path, out: Path, log: Path, workers: int = 0) -> Run:
    """One process; with as many threads as the command takes, or with `workers`."""
    sample = run([sys.executable, "-P", "-c", OURS, str(base), str(adapter), str(out), str(workers)], log)
    wall, processor, peak = map(float, log.read_text().split()[-3:])
    return Run(sample.wall, sample.cpu, wall, processor, peak / 1e3)


def forked_errors(kind: Kind, work: Path, adapter: Path, log: Path) -> Errors:
    """What `check` finds of the small model's merge and of its layers in PEFT's of the large one, in a process of its own."""

    def job() -> None:
        print(*check(kind.name, work / "small", adapter, work / "small-out", work / "peft-out"))

    forked(job, log)
    return Errors(*map(float, log.read_text().split()[-2:]))
