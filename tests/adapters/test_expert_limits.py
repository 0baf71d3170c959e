# SPDX-License-Identifier: Apache-2.0
"""What a dialect of experts cannot hold is padded, repeated, stacked or refused; what has two readings is refused."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import surgery
from surgery_formats.errors import FitError
from tests.oracles import disk, peft_oracle
from tests.support import attached, expert_models, type_sweep
from tests.support.expert_models import EXPERTS, rewritten

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
SHAPES = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
BLOCK = "model.layers.0.mlp.experts"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return expert_models.build("qwen3_moe", tmp_path_factory.mktemp("base") / "base")


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def written(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    """A folder of these factors, whose names lack PEFT's prefix."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    named = {f"base_model.model.{name}.weight": value for name, value in tensors.items()}
    return rewritten(folder, folder / "adapter", named)


def one_by_one(folder: Path, experts: dict[str, dict[int, int]]) -> Path:
    """An adapter of single experts: by projection the rank of each."""
    tensors, ranks = {}, {}
    for role, numbers in experts.items():
        out, inputs = SHAPES[role]
        for number, rank in numbers.items():
            path = f"{BLOCK}.{number}.{role}"
            tensors[f"{path}.lora_A"] = drawn(number, rank, inputs)
            tensors[f"{path}.lora_B"] = drawn(number + 9, out, rank)
            ranks[f"^{path}".replace(".", r"\.")] = rank
    return written(folder, tensors, rank_pattern=ranks)


def changed(base: Path, adapter: Path, output: Path) -> dict[str, Tensor]:
    surgery.merge(base, adapter, output=output)
    before = disk.read_tensors(base)
    return {name: value - before[name] for name, value in disk.read_tensors(output).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.allclose(value, other[name], rtol=0, atol=1e-6) for name, value in one.items())


@pytest.mark.parametrize("dialect", ["peft", "peft-0.18", "unsloth-grouped", "tinker", "sglang", "vllm", "per-expert"])
def test_ranks_that_differ_and_experts_that_were_not_trained(base: Path, dialect: str, tmp_path: Path) -> None:
    adapter = one_by_one(tmp_path / "a", {"gate_proj": {0: 1, 2: 3}, "up_proj": {2: 2}, "down_proj": {1: 2}})
    wanted = changed(base, adapter, tmp_path / "wanted")
    result = surgery.convert(adapter, to="peft", dialect=dialect, output=tmp_path / "out", base=base)
    assert same(changed(base, tmp_path / "out", tmp_path / "found"), wanted)
    details = {entry.detail for entry in result.entries}
    if dialect != "per-expert":
        assert any("zeros for" in detail for detail in details)
        assert any("padded to" in detail for detail in details)
    again = surgery.convert(tmp_path / "out", to="peft", dialect="per-expert", output=tmp_path / "again", base=base)
    assert max(again.errors.values()) < 1e-6


def test_vllm_gets_every_projection_of_every_expert(base: Path, tmp_path: Path) -> None:
    """Its `pack_moe` asserts that they are there, and that a projection's experts have one rank."""
    adapter = one_by_one(tmp_path / "a", {"down_proj": {1: 2, 3: 1}})
    surgery.convert(adapter, to="peft", dialect="vllm", output=tmp_path / "out", base=base)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    for role in SHAPES:
        ranks = {tensors[f"base_model.model.{BLOCK}.{e}.{role}.lora_A.weight"].shape[0] for e in range(EXPERTS)}
        assert len(ranks) == 1


def tinker(folder: Path) -> Path:
    tensors = {}
    for seed, (role, name) in enumerate({"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.items()):
        out, inputs = SHAPES[role]
        shared = role != "down_proj"
        tensors[f"{BLOCK}.{name}.lora_A"] = drawn(seed, 1 if shared else EXPERTS, 2, inputs)
        tensors[f"{BLOCK}.{name}.lora_B"] = drawn(seed + 5, EXPERTS if shared else 1, out, 2)
    return written(folder, tensors)


def test_shared_factors_are_repeated_and_found_again(base: Path, tmp_path: Path) -> None:
    adapter = tinker(tmp_path / "t")
    surgery.convert(adapter, to="peft", dialect="sglang", output=tmp_path / "sglang", base=base)
    repeated = load_file(tmp_path / "sglang" / WEIGHTS)
    assert {value.shape[0] for value in repeated.values()} == {EXPERTS}
    surgery.convert(tmp_path / "sglang", to="peft", dialect="tinker", output=tmp_path / "tinker", base=base)
    first, last = load_file(adapter / WEIGHTS), load_file(tmp_path / "tinker" / WEIGHTS)
    assert first.keys() == last.keys()
    assert all(torch.equal(value, last[name]) for name, value in first.items())


def test_two_a_of_gate_and_up_are_stacked_and_one_a_stays_one(base: Path, tmp_path: Path) -> None:
    adapter = tinker(tmp_path / "t")
    surgery.convert(adapter, to="peft", dialect="peft", output=tmp_path / "peft", base=base)
    inner = f"base_model.model.{BLOCK}.base_layer.lora_A.weight"
    assert load_file(tmp_path / "peft" / WEIGHTS)[inner].shape == (EXPERTS * 4, 32)
    trained = expert_models.train("qwen3_moe", base, tmp_path / "trained")
    surgery.convert(trained, to="peft", dialect="per-expert", output=tmp_path / "single", base=base)
    surgery.convert(tmp_path / "single", to="peft", dialect="peft", output=tmp_path / "back", base=base)
    first, last = load_file(trained / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert first.keys() == last.keys()
    assert all(torch.equal(value, last[name]) for name, value in first.items())


def test_experts_without_a_gate_have_peft_s_stacks_alone(tmp_path: Path) -> None:
    made = attached.attach("nemotron_h", tmp_path, type_sweep.lora)
    adapter = tmp_path / "adapter"
    for layout in made.layouts:
        output = tmp_path / f"peft-{layout}"
        surgery.convert(adapter, to="peft", dialect="peft", output=output, base=tmp_path / layout)
        first, last = load_file(adapter / WEIGHTS), load_file(output / WEIGHTS)
        assert first.keys() == last.keys()
        assert all(torch.equal(value, last[name]) for name, value in first.items())
        for dialect in ("peft-0.18", "unsloth", "tinker", "sglang", "vllm", "per-expert", "unsloth-linears"):
            with pytest.raises(FitError, match=r"experts\.up_proj' \(LoRA: how experts without a gate are held"):
                surgery.convert(adapter, to="peft", dialect=dialect, output=tmp_path / "out", base=tmp_path / layout)


def test_diff_says_that_experts_are_in_two_dialects(base: Path, tmp_path: Path) -> None:
    adapter = tinker(tmp_path / "t")
    for dialect in ("peft", "sglang"):
        surgery.convert(adapter, to="peft", dialect=dialect, output=tmp_path / dialect, base=base)
    apart, together = (surgery.diff(adapter, tmp_path / dialect) for dialect in ("peft", "sglang"))
    assert [note for note in apart.warnings if "different dialects" in note]
    assert not [note for note in together.warnings if "dialects" in note]
    assert together.equal


@pytest.mark.parametrize("dialect", ["tinker", "sglang"])
def test_readers_of_one_rank_get_one(base: Path, dialect: str, tmp_path: Path) -> None:
    """SGLang divides one alpha by one r, whatever patterns say."""
    patterns = {"rank_pattern": {"o_proj": 5}, "alpha_pattern": {"o_proj": 3}}
    trained = expert_models.train("qwen3_moe", base, tmp_path / "trained", **patterns)
    surgery.convert(trained, to="peft", dialect=dialect, output=tmp_path / "out", base=base)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 20)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert same(changed(base, tmp_path / "out", tmp_path / "a"), changed(base, trained, tmp_path / "b"))


def test_stacks_without_parameters_are_vllms(base: Path, tmp_path: Path) -> None:
    trained = expert_models.train("qwen3_moe", base, tmp_path / "trained")
    tensors = load_file(trained / WEIGHTS)
    fields = {"target_parameters": None, "target_modules": ["experts", "o_proj"]}
    made = rewritten(trained, tmp_path / "made", tensors, peft_version=None, **fields)
    assert same(changed(base, made, tmp_path / "a"), changed(base, trained, tmp_path / "b"))
    doubtful = rewritten(trained, tmp_path / "doubtful", tensors, peft_version="0.18.1", **fields)
    with pytest.raises(FitError, match=r"two readings: PEFT's before 0\.19.*or vLLM's") as caught:
        surgery.inspect(doubtful)
    assert "remove" not in str(caught.value.hint)


def test_fused_stacks_of_three_axes_are_read(base: Path, tmp_path: Path) -> None:
    """SGLang takes ``experts.gate_up_proj`` too."""
    a, b = drawn(1, EXPERTS, 2, 32), drawn(2, EXPERTS, 48, 2)
    found = changed(
        base,
        written(tmp_path / "f", {f"{BLOCK}.gate_up_proj.lora_A": a, f"{BLOCK}.gate_up_proj.lora_B": b}),
        tmp_path / "m",
    )
    for e in range(EXPERTS):
        gate, up = (2 * b[e] @ a[e]).chunk(2)
        assert torch.allclose(found[f"{BLOCK}.{e}.gate_proj.weight"], gate, atol=1e-6)
        assert torch.allclose(found[f"{BLOCK}.{e}.up_proj.weight"], up, atol=1e-6)


@pytest.mark.parametrize("source", ["tinker", "unsloth-linears", "unsloth-grouped", "mlx"])
def test_peft_attaches_what_other_programs_wrote_for_gpt_oss(source: str, tmp_path: Path) -> None:
    base = expert_models.build("gpt_oss", tmp_path / "base")
    trained = expert_models.train("gpt_oss", base, tmp_path / "trained")
    target = {"to": "mlx"} if source == "mlx" else {"to": "peft", "dialect": source}
    surgery.convert(trained, output=tmp_path / "other", base=base, **target)
    surgery.convert(tmp_path / "other", to="peft", dialect="peft", output=tmp_path / "peft", base=base)
    with peft_oracle.quiet():
        logits = [
            expert_models.logits(peft.PeftModel.from_pretrained(expert_models.load("gpt_oss", base), folder).eval())
            for folder in (trained, tmp_path / "peft")
        ]
    plain = expert_models.logits(expert_models.load("gpt_oss", base))
    assert (logits[0] - plain).abs().max() > 0.1
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=5e-6)
