# SPDX-License-Identifier: Apache-2.0
"""Merging every kind of PEFT adapter into 0.24 B of Llama's shapes, beside PEFT: `python benchmarks/merge.py --kind all`."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from measure import ROOT, Sample, forked, median, run, versions
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shapes import Shape, write_base

sys.path.insert(0, str(ROOT))
from tests.oracles.peft_oracle import randomise

WHOLE = Shape(2048, 4, 32, 8, 8192, 1024)  # layers of Llama 3.2 1B
HALF = replace(WHOLE, layers=2)
_CHECKED = (".layers.1.", f".layers.{WHOLE.layers - 1}.")
_NOISE = 12.0
"""MB by which peaks of one and the same work differ; the largest of the modules that the second half adds has 34 in bf16."""

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NARROW = ("k_proj", "v_proj")  # where PEFT factorises each weight, which takes it seconds for a larger one


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
    _lora("MonteCLoRA", monteclora_config=peft.MontecloraConfig(num_samples=2)),
    _lora("BD-LoRA", use_bdlora=peft.BdLoraConfig(
        target_modules_bd_a=["o_proj", "down_proj"], target_modules_bd_b=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
        nblocks=2,
    )),
    Kind("AdaLoRA", "AdaLora", {"init_r": 16, "total_step": 10}),
    Kind("BOFT", "BOFT", {"boft_block_size": 8}, NARROW),
    Kind("C3A", "C3A", {"block_size": 128}),
    Kind("DEFT", "Deft", {"r": 16}),
    Kind("PaRa", "Deft", {"r": 16, "decomposition_method": "qr", "para": True}),
    Kind("DeLoRA", "Delora", {"r": 16}),
    Kind("FourierFT", "FourierFT", {"n_frequency": 1000}),
    Kind("FRoD", "Frod", {}, NARROW),
    Kind("GLoRA", "Glora", {"r": 16}),
    Kind("GraLoRA", "Gralora", {"r": 32, "gralora_k": 2}),
    Kind("HiRA", "Hira", {"r": 16}),
    Kind("HRA", "HRA", {"r": 8}),
    Kind("(IA)^3", "IA3", {"feedforward_modules": ["down_proj"]}, ("k_proj", "v_proj", "down_proj")),
    Kind("LN tuning", "LNTuning", {}, ("input_layernorm", "post_attention_layernorm")),
    Kind("LoHa", "LoHa", {"r": 16, "alpha": 16}),
    Kind("LoKr", "LoKr", {"r": 16, "alpha": 16}),
    Kind("MiSS", "Miss", {"r": 64}),
    Kind("BAT", "Miss", {"r": 64, "init_weights": "bat"}),
    Kind("OFT", "OFT", {"oft_block_size": 32}),
    Kind("OSF", "OSF", {"effective_rank": 256}, NARROW),
    Kind("PEANuT", "Peanut", {"r": 16}),
    Kind("PVeRA", "Pvera", {"r": 256}),
    Kind("RandLoRA", "RandLora", {"r": 32}, ("q_proj", "v_proj")),
    Kind("RoAd", "Road", {"group_size": 64}),
    Kind("SHiRA", "Shira", {"r": 16}),
    Kind("SuperTuning", "Supertuning", {"r": 16, "sparsity": 0.99}),
    Kind("TinyLoRA", "TinyLora", {"r": 2, "u": 64, "weight_tying": 1.0}, NARROW),
    Kind("trainable tokens", "TrainableTokens", {"token_indices": list(range(3, 1000, 60))}, ("embed_tokens",)),
    Kind("Uni-LoRA", "UniLora", {"r": 16, "theta_d_length": 4096, "save_indices": True}),
    Kind("VB-LoRA", "VBLoRA", {"r": 4, "num_vectors": 256, "vector_length": 256}),
    Kind("VeRA", "Vera", {"r": 256}),
    Kind("WaveFT", "WaveFT", {"n_frequency": 1000}),
)  # fmt: skip


OURS = """
import sys, time
import surgery, surgery.verbs.merge
started, processor = time.perf_counter(), time.process_time()
surgery.merge(sys.argv[1], sys.argv[2], output=sys.argv[3])
print(time.perf_counter() - started, time.process_time() - processor)
"""
IMPORTS = "import torch, transformers, peft; transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM"


def _load(base: Path) -> Any:
    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)


def write_adapter(kind: Kind, base: Path, folder: Path) -> None:
    """By PEFT, every trained number random."""
    config = getattr(peft, f"{kind.config}Config")(target_modules=list(kind.targets), **kind.fields)
    model = peft.get_peft_model(_load(base), config)
    randomise(model, torch.Generator().manual_seed(1))
    model.save_pretrained(folder)


def write_half(adapter: Path, folder: Path) -> None:
    """The part of an adapter that is of the first half of the layers."""
    folder.mkdir()
    shutil.copy(adapter / "adapter_config.json", folder)
    tensors = load_file(adapter / "adapter_model.safetensors")
    left_out = tuple(f".layers.{number}." for number in range(HALF.layers, WHOLE.layers))
    kept = {name: value for name, value in tensors.items() if not any(part in name for part in left_out)}
    save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})


def merge_by_peft(base: Path, adapter: Path, out: Path) -> None:
    """Load, merge, save."""
    model = peft.PeftModel.from_pretrained(_load(base), adapter)
    model.merge_and_unload().save_pretrained(out, max_shard_size="1GB")


def _some(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a middle layer, the last layer, and of no layer."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            stored = list(opened.keys())
            names = [name for name in stored if ".layers." not in name or any(part in name for part in _CHECKED)]
            found |= {name: opened.get_tensor(name) for name in names}
    return found


def check(base: Path, ours: Path, theirs: Path) -> None:
    """As PEFT's: its rounding on the way to bfloat16, which is not ours, is a twentieth of what changed, at the most."""
    before, actual, wanted = map(_some, (base, ours, theirs))
    change = error = 0.0
    for name, value in wanted.items():
        if torch.equal(value, before[name]):
            assert torch.equal(actual[name], value), name
        change += float((value.double() - before[name].double()).square().sum())
        error += float((value.double() - actual[name].double()).square().sum())
    assert change
    assert error <= 0.05**2 * change, (error / change) ** 0.5


def bench(work: Path, options: argparse.Namespace) -> None:
    """Measure and print the table."""
    chosen = [kind for kind in KINDS if options.kind in ("all", kind.name)]
    if not chosen:
        raise SystemExit(f"kinds are: {', '.join(kind.name for kind in KINDS)}")
    for name, shape in (("whole", WHOLE), ("half", HALF)):
        write_base(shape, work / name, shards=1)
    print(f"{WHOLE.parameters / 1e9:.2f} B parameters, bf16, and half of its layers\n")
    imports = run([sys.executable, "-c", IMPORTS], work / "log").wall
    print(f"PEFT's imports, measured once and added to its seconds: {imports:.2f} s\n")
    print(
        "| kind | modules | merge, s | PEFT, s | PEFT / merge | without imports | peak, MB | half the layers | PEFT, peak, MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    slow, grown = [], []
    for kind in chosen:
        found = measured(kind, work, options.rounds)
        ours, bare, theirs = (
            median([one.wall for one in found[name]]) for name in ("whole", "whole, imported", "PEFT")
        )
        peaks = {name: max(sample.peak for sample in samples) / 1e6 for name, samples in found.items()}
        ratio = (theirs + imports) / ours
        count = len(kind.targets) * (1 if kind.config == "TrainableTokens" else WHOLE.layers)
        print(
            f"| {kind.name} | {count} | {ours:.2f} | {theirs + imports:.2f} | {ratio:.1f} | {theirs / bare:.1f} | "
            f"{peaks['whole']:.0f} | {peaks['half']:.0f} | {peaks['PEFT']:.0f} |",
            flush=True,
        )
        slow += [kind.name] if ratio < 1 else []
        grown += [kind.name] if peaks["whole"] > peaks["half"] + _NOISE else []
    print(f"\n{versions('peft', 'torch', 'transformers', 'numpy')}")
    assert not slow, f"slower than PEFT: {slow}"
    assert not grown, f"memory grows with the model: {grown}"


def measured(kind: Kind, work: Path, rounds: int) -> dict[str, list[Sample]]:
    """Ours, ours of half the model, and PEFT's, in turn."""
    log, adapter = work / "log", work / "adapter"
    forked(lambda: write_adapter(kind, work / "whole", adapter), log)
    write_half(adapter, work / "half-adapter")
    adapters = {"whole": adapter, "half": work / "half-adapter"}
    found: dict[str, list[Sample]] = defaultdict(list)
    for number in range(rounds):
        for name, one in adapters.items():
            words = [str(work / name), str(one), str(work / f"{name}-out")]
            sample = run([sys.executable, "-P", "-c", OURS, *words], log)
            wall, processor = map(float, log.read_text().split()[-2:])
            found[name].append(replace(sample, cpu=processor))
            found[f"{name}, imported"].append(replace(sample, wall=wall, cpu=processor))
        found["PEFT"].append(forked(lambda: merge_by_peft(work / "whole", adapter, work / "peft-out"), log))
        if not number:
            forked(lambda: check(work / "whole", work / "whole-out", work / "peft-out"), log)
        for name in ("whole-out", "half-out", "peft-out"):
            shutil.rmtree(work / name)
    for one in adapters.values():
        shutil.rmtree(one)
    return found
