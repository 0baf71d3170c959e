# SPDX-License-Identifier: Apache-2.0
"""Several adapters on one weight mean what PEFT's attached model means: merged, combined, in a graph, and taken back.

A DoRA measures the base's rows, whatever comes before it; the order of adapters matters. What looks at the weight sees it
before all of its kind; RoAd, HRA, BOFT and BAT see what the one before them left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peft
import pytest
import torch

import surgery
from surgery.verbs.export_onnx import export_onnx
from surgery_formats.errors import FitError
from tests.oracles import disk, models, peft_oracle, recipes
from tests.support import trained
from tests.support.sessions import Plain

CONFIG = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj", "embed_tokens"]}
CHAINS: dict[str, list[tuple[str, float]]] = {
    "two doras": [("dora", 1.0), ("other", 1.0)],
    "the other way round": [("other", 1.0), ("dora", 1.0)],
    "lora, dora": [("lora", 1.0), ("dora", 1.0)],
    "dora, lora": [("dora", 1.0), ("lora", 1.0)],
    "weights of loras": [("lora", -0.4), ("dora", 1.0), ("rest", 0.7), ("other", 1.0)],
}
IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])

Made = tuple[Path, dict[str, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("several")
    base = models.build_base("llama", folder / "base")
    for seed, name in enumerate(("dora", "other", "lora", "rest")):
        config = {**CONFIG, "use_dora": name in ("dora", "other")}
        peft_oracle.train("llama", base, "LoraConfig", config, folder / name, seed=seed)
    return base, {name: folder / name for name in ("dora", "other", "lora", "rest")}


def chain_of(made: Made, name: str) -> list[tuple[Path, float]]:
    return [(made[1][adapter], weight) for adapter, weight in CHAINS[name]]


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


@pytest.mark.parametrize("name", CHAINS)
def test_a_merge_is_the_attached_model_and_pefts_own_merge(made: Made, name: str, tmp_path: Path) -> None:
    base, chain = made[0], chain_of(made, name)
    surgery.merge(base, chain, output=tmp_path / "merged")
    expected = peft_oracle.merge("llama", base, chain)
    merged = disk.read_tensors(tmp_path / "merged")
    assert far(models.run("llama", models.load("llama", tmp_path / "merged", "float32")), expected.attached) < 1e-5
    assert max(far(merged[tensor], value) for tensor, value in expected.tensors.items() if tensor in merged) < 1e-6


def test_the_order_matters(made: Made) -> None:
    one, other = (peft_oracle.merge("llama", made[0], chain_of(made, n)) for n in ("two doras", "the other way round"))
    assert far(one.attached, other.attached) > 0.01


@pytest.mark.parametrize("name", CHAINS)
def test_a_combination_does_what_the_merge_does(made: Made, name: str, tmp_path: Path) -> None:
    base, chain = made[0], chain_of(made, name)
    surgery.merge(base, chain, output=tmp_path / "merged")
    surgery.combine(chain, output=tmp_path / "one", base=base, rank=models.HIDDEN)
    surgery.merge(base, tmp_path / "one", output=tmp_path / "again")
    merged, again = disk.read_tensors(tmp_path / "merged"), disk.read_tensors(tmp_path / "again")
    assert max(far(again[tensor], value) for tensor, value in merged.items()) < 2e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("name", CHAINS)
def test_a_merge_is_taken_back_bit_for_bit(made: Made, name: str, share: float, dtype: str, tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base", dtype=dtype)
    chain = chain_of(made, name)
    chain = [*chain[:-1], (chain[-1][0], share)]
    surgery.merge(base, chain, output=tmp_path / "merged", reversible=True)
    surgery.unmerge(tmp_path / "merged", chain, output=tmp_path / "back")
    assert (base / "model.safetensors").read_bytes() == (tmp_path / "back" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("order", [("lora", "pissa"), ("pissa", "lora")])
def test_a_raw_pissa_takes_its_part_from_the_base(made: Made, order: tuple[str, str], tmp_path: Path) -> None:
    base, folders = made
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"}
    peft_oracle.train("llama", base, "LoraConfig", config, tmp_path / "pissa", seed=7)
    chain = [(folders.get(name, tmp_path / name), 1.0) for name in order]
    surgery.merge(base, chain, output=tmp_path / "merged")
    surgery.combine(chain, output=tmp_path / "one", base=base, rank=models.HIDDEN)
    surgery.merge(base, tmp_path / "one", output=tmp_path / "again")
    attached = peft_oracle.merge("llama", base, chain, "float32").attached
    for folder in ("merged", "again"):
        assert far(models.run("llama", models.load("llama", tmp_path / folder, "float32")), attached) < 2e-5


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build_base("qwen2", tmp_path_factory.mktemp("biased") / "base")


SEEING: dict[str, tuple[str, dict[str, Any]]] = {
    "HiRA": ("HiraConfig", {"r": 3}),
    "DEFT": ("DeftConfig", {"r": 4}),
    "DEFT by QR": ("DeftConfig", {"r": 4, "decomposition_method": "qr"}),
    "PaRa": ("DeftConfig", {"r": 4, "para": True}),
    "PEANuT": ("PeanutConfig", {"r": 4}),
    "GLoRA": ("GloraConfig", {"r": 4}),
    "FRoD": ("FrodConfig", {"progressbar": False}),
    "RoAd": ("RoadConfig", {"group_size": 8}),
    "HRA": ("HRAConfig", {"r": 4}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 8}),
    "BAT": ("MissConfig", {"r": 8, "init_weights": "bat"}),
}


BASED = SEEING | {
    "OSF": ("OSFConfig", {}),
    "DoRA": ("LoraConfig", {"r": 3, "use_dora": True}),
    "raw PiSSA": ("LoraConfig", {"r": 3, "init_lora_weights": "pissa"}),
}


def of_one_kind(base: Path, name: str, folder: Path, count: int) -> list[Path]:
    kind, fields = BASED[name]
    config = {"target_modules": ["q_proj", "up_proj", "down_proj"], **fields}
    for seed in range(count):
        peft_oracle.train("qwen2", base, kind, config, folder / f"{name}{seed}", seed=seed)
    return [folder / f"{name}{seed}" for seed in range(count)]


@pytest.mark.parametrize("name", SEEING)
def test_adapters_of_one_kind_see_what_pefts_attached_ones_see(name: str, biased: Path, tmp_path: Path) -> None:
    chain = [(folder, 1.0) for folder in of_one_kind(biased, name, tmp_path, 3)]
    surgery.merge(biased, chain, output=tmp_path / "merged")
    attached = peft_oracle.merge("qwen2", biased, chain).attached
    assert far(models.run("qwen2", models.load("qwen2", tmp_path / "merged", "float32")), attached) < 1e-5


@pytest.mark.parametrize("name", SEEING)
def test_a_combination_sees_what_the_merge_sees(name: str, biased: Path, tmp_path: Path) -> None:
    chain = [(folder, 1.0) for folder in of_one_kind(biased, name, tmp_path, 2)]
    _same_combined(biased, chain, tmp_path)


BEHIND = [
    ("DoRA", "HiRA"),
    ("HiRA", "DoRA"),
    ("OSF", "HiRA"),
    ("HiRA", "OSF"),
    ("RoAd", "DoRA"),
    ("PEANuT", "raw PiSSA"),
]
"""Kinds that see the base, one behind another: PEFT cannot attach them together, and merges one after the other."""


@pytest.mark.parametrize("names", BEHIND, ids=" ".join)
def test_kinds_that_see_the_base_combine_as_they_merge(names: tuple[str, str], biased: Path, tmp_path: Path) -> None:
    chain = [(of_one_kind(biased, name, tmp_path, 1)[0], 1.0) for name in names]
    _same_combined(biased, chain, tmp_path)


def _same_combined(biased: Path, chain: list[tuple[Path, float]], tmp_path: Path) -> None:
    surgery.merge(biased, chain, output=tmp_path / "merged")
    surgery.combine(chain, output=tmp_path / "one", base=biased, rank=models.HIDDEN)
    surgery.merge(biased, tmp_path / "one", output=tmp_path / "again")
    merged, again = disk.read_tensors(tmp_path / "merged"), disk.read_tensors(tmp_path / "again")
    assert max(far(again[tensor], value) for tensor, value in merged.items()) < 5e-6


MIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 3}),
    "DoRA": ("LoraConfig", {"r": 3, "use_dora": True}),
    "LoHa": ("LoHaConfig", {"r": 3}),
    "LoKr": ("LoKrConfig", {"r": 3}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 3, "total_step": 10}),
    "SHiRA": ("ShiraConfig", {"r": 2}),
    "OFT": ("OFTConfig", {"oft_block_size": 8}),
}
PAIRS = [
    *((name, "DoRA") for name in MIXED if name != "OFT"),
    *(("DoRA", name) for name in MIXED if name not in ("DoRA", "SHiRA")),
    *((name, "OFT") for name in ("LoRA", "LoHa", "SHiRA")),
]
"""PEFT has no OFT before another kind, and no SHiRA behind one."""


@pytest.mark.parametrize("names", PAIRS, ids=" ".join)
def test_adapters_of_several_kinds_mean_what_pefts_mixed_model_does(
    names: tuple[str, str], biased: Path, tmp_path: Path
) -> None:
    """Attached: its merge of a DoRA behind another kind measures the rows that the other has changed."""
    chain = []
    for seed, name in enumerate(names):
        kind, fields = MIXED[name]
        config = {"target_modules": ["q_proj", "up_proj", "down_proj"], **fields}
        peft_oracle.train("qwen2", biased, kind, config, tmp_path / f"{name}{seed}", seed=seed)
        chain.append(tmp_path / f"{name}{seed}")
    with peft_oracle.quiet():
        model = peft.PeftMixedModel.from_pretrained(models.load("qwen2", biased, "float64"), str(chain[0]), "first")
        model.load_adapter(str(chain[1]), "second")
        model.set_adapter(["first", "second"])
        attached = models.run("qwen2", model.eval())
    surgery.merge(biased, [(folder, 1.0) for folder in chain], output=tmp_path / "merged")
    assert far(models.run("qwen2", models.load("qwen2", tmp_path / "merged", "float32")), attached) < 2e-5


def test_what_was_summed_is_taken_back_with_what_the_merge_kept(biased: Path, tmp_path: Path) -> None:
    chain = [
        (folder, share) for folder, share in zip(of_one_kind(biased, "HiRA", tmp_path, 2), (1.0, 0.5), strict=True)
    ]
    surgery.merge(biased, chain, output=tmp_path / "merged", reversible=True)
    surgery.unmerge(tmp_path / "merged", chain, output=tmp_path / "back")
    assert (biased / "model.safetensors").read_bytes() == (tmp_path / "back" / "model.safetensors").read_bytes()
    surgery.merge(biased, chain, output=tmp_path / "plain")
    with pytest.raises(FitError, match="cannot be computed back: several HiRA act side by side"):
        surgery.unmerge(tmp_path / "plain", chain, output=tmp_path / "no")


def test_only_one_osf_can_be_on_a_weight(biased: Path, tmp_path: Path) -> None:
    """Attached, PEFT applies the first of its active adapters and no other."""
    config = {"target_modules": ["q_proj"]}
    for seed, name in enumerate(("one", "two")):
        peft_oracle.train("qwen2", biased, "OSFConfig", config, tmp_path / name, seed=seed)
    chain = [(tmp_path / name, 1.0) for name in ("one", "two")]
    attached = peft_oracle.merge("qwen2", biased, chain).attached
    assert far(attached, peft_oracle.merge("qwen2", biased, chain[:1]).attached) == 0
    refused = r"two.*a second OSF for one weight, beside '.*one.*'"
    with pytest.raises(FitError, match=refused):
        surgery.merge(biased, chain, output=tmp_path / "merged")
    with pytest.raises(FitError, match=refused):
        surgery.combine(chain, output=tmp_path / "combined", base=biased, rank=models.HIDDEN)
    surgery.merge(biased, chain[:1], output=tmp_path / "first")


def test_graphs_mean_the_same(tmp_path: Path) -> None:
    """What is merged comes first, what is in slots last."""
    base = recipes.build("llama", tmp_path / "base", hidden_size=64)
    dora = trained.train("llama", base, trained._lora(use_dora=True), tmp_path / "dora", seed=3)
    lora = trained.train("llama", base, trained._lora(), tmp_path / "lora", seed=4)
    expected = trained.logits(trained.attached("llama", base, (lora, 0.5), (dora, 1.0)), IDS)
    export_onnx(base, merge=[(lora, 0.5), dora], output=tmp_path / "out", dtype="fp32")
    found = Plain(tmp_path / "out" / "model.onnx").step(IDS, np.ones_like(IDS))
    assert np.abs(found - expected).max() <= 1e-4
    export_onnx(base, merge=[dora], swap=[lora], output=tmp_path / "slots", dtype="fp32")
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    (file,) = (tmp_path / "slots" / "adapters").iterdir()
    adapter.Load(str(file))
    options.add_active_adapter(adapter)
    plain = Plain(tmp_path / "slots" / "model.onnx")
    feed = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **plain.past}
    expected = trained.logits(trained.attached("llama", base, (dora, 1.0), (lora, 1.0)), IDS)
    assert np.abs(plain.session.run(["logits"], feed, options)[0] - expected).max() <= 1e-4
