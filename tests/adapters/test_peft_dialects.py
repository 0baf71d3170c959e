# SPDX-License-Identifier: Apache-2.0
"""Experts in folders like PEFT's: Unsloth's two packings of B, and Tinker's stacks with shared factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery_formats.errors import FitError, MalformedError
from tests.oracles import disk, models, peft_oracle

UNSLOTH = {"base_model_class": "Qwen2MoeForCausalLM", "unsloth_fixed": True}
EXPERTS = 3
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def rewritten(folder: Path, to: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A folder with other tensors, and other fields in its configuration."""
    to.mkdir()
    save_file(tensors, to / "adapter_model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "adapter_config.json").read_text()) | config
    (to / "adapter_config.json").write_text(json.dumps(raw))
    return to


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, a LoRA of its stacked experts as PEFT packs them, and the same with each expert's columns side by side."""
    folder = tmp_path_factory.mktemp("unsloth")
    base = models.build_base("qwen2_moe", folder / "base")
    config = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": STACKS}
    peft_oracle.train("qwen2_moe", base, "LoraConfig", config, folder / "peft", seed=1)
    tensors = load_file(folder / "peft" / "adapter_model.safetensors")
    for name, value in tensors.items():
        if ".experts." in name and "lora_B" in name:
            rows = value.shape[0]
            tensors[name] = value.reshape(rows, 2, -1).transpose(1, 2).reshape(rows, -1).contiguous()
    return base, folder / "peft", rewritten(folder / "peft", folder / "unsloth", tensors, auto_mapping=UNSLOTH)


def merged(base: Path, adapter: Path, output: Path) -> dict[str, torch.Tensor]:
    surgery.merge(base, adapter, output=output)
    return disk.read_tensors(output)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], error: float = 1e-6) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(value, other[name], rtol=0, atol=error) for name, value in one.items()
    )


@pytest.mark.parametrize(("layout", "packed"), [("rank_major", 1), ("grouped_by_expert", 2), ("expert_major", 2)])
def test_the_marker_of_unsloth_decides(
    stacked: tuple[Path, Path, Path], layout: str, packed: int, tmp_path: Path
) -> None:
    base, ours, _ = stacked
    tensors = load_file(stacked[packed] / "adapter_model.safetensors")
    marked = rewritten(ours, tmp_path / "marked", tensors, lora_B_layout=layout, auto_mapping=UNSLOTH)
    wanted = merged(base, ours, tmp_path / "wanted")
    assert same(merged(base, marked, tmp_path / "found"), wanted)
    surgery.convert(marked, to="peft", output=tmp_path / "again", base=base)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["lora_B_layout"] == "rank_major"
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert same(again, load_file(ours / "adapter_model.safetensors"))
    surgery.combine([(marked, 0.5)], output=tmp_path / "half", base=base)
    surgery.combine([(ours, 0.5)], output=tmp_path / "half-of-ours")
    assert same(
        merged(base, tmp_path / "half", tmp_path / "one"), merged(base, tmp_path / "half-of-ours", tmp_path / "other")
    )


def test_without_a_marker_unsloths_experts_are_refused_with_both_readings(
    stacked: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(FitError, match=r"rank_major.*grouped_by_expert") as caught:
        surgery.merge(stacked[0], stacked[2], output=tmp_path / "out")
    assert "remove" not in str(caught.value)
    assert '"lora_B_layout"' in str(caught.value.hint)


def test_an_unknown_packing_or_switch_is_refused_and_nobody_is_told_to_delete_it(
    stacked: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    tensors = load_file(stacked[1] / "adapter_model.safetensors")
    other = rewritten(stacked[1], tmp_path / "other", tensors, lora_B_layout="sideways")
    with pytest.raises(MalformedError, match="'sideways'"):
        surgery.inspect(other)
    switch = rewritten(stacked[1], tmp_path / "switch", tensors, use_magic=True)
    with pytest.raises(FitError, match="use_magic") as caught:
        surgery.inspect(switch)
    assert "remove" not in str(caught.value.hint)


NAMES = {  # of the experts' parts on the disk, and of what holds the experts there
    "qwen2_moe": ("mlp", {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}),
    "mixtral": ("block_sparse_moe", {"w1": "w1", "w3": "w3", "w2": "w2"}),
}


def of_tinker(arch: str, folder: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base, a folder of Tinker's with a shared factor on either side, and what it adds to every weight."""
    base = models.build_base(arch, folder / "base")
    weights, generator = disk.read_tensors(base), torch.Generator().manual_seed(3)
    block, parts = NAMES[arch]

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    tensors, deltas = {}, {}
    first = f".{block}.experts.0.{parts['w1']}.weight"
    for layer in (name.removesuffix(first) for name in weights if name.endswith(first)):
        for tinkers, part in parts.items():
            out, inputs = weights[f"{layer}.{block}.experts.0.{part}.weight"].shape
            shared = tinkers != "w2"
            a, b = drawn(1 if shared else EXPERTS, 4, inputs), drawn(EXPERTS if shared else 1, out, 4)
            tensors[f"base_model.model.{layer}.mlp.experts.{tinkers}.lora_A.weight"] = a
            tensors[f"base_model.model.{layer}.mlp.experts.{tinkers}.lora_B.weight"] = b
            for e in range(EXPERTS):
                delta = 2 * b[min(e, len(b) - 1)] @ a[min(e, len(a) - 1)]
                deltas[f"{layer}.{block}.experts.{e}.{part}.weight"] = delta
    rows, width = weights["lm_head.weight"].shape
    a, b = drawn(4, width), drawn(rows, 4)
    deltas["lm_head.weight"] = 2 * b @ a
    tensors["base_model.model.model.unembed_tokens.lora_A.weight"] = a
    tensors["base_model.model.model.unembed_tokens.lora_B.weight"] = b
    (folder / "tinker").mkdir()
    save_file(tensors, folder / "tinker" / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    (folder / "tinker" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "tinker" / "checkpoint_complete").write_bytes(b"")  # as an archive of Tinker's unpacks
    return base, folder / "tinker", deltas


@pytest.fixture
def tinker(tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    return of_tinker("qwen2_moe", tmp_path)


@pytest.mark.parametrize("arch", NAMES)
def test_tinkers_experts_and_head_are_merged(arch: str, tmp_path: Path) -> None:
    base, folder, deltas = of_tinker(arch, tmp_path)
    before, after = disk.read_tensors(base), merged(base, folder, tmp_path / "out")
    assert len(deltas) > 3 * EXPERTS
    wanted = {name: value + deltas[name] if name in deltas else value for name, value in before.items()}
    assert same(after, wanted, 2e-6)


def test_a_rank_and_an_alpha_are_a_whole_configuration(
    tinker: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """tinker-cookbook's ``build_lora_adapter`` and its merges look at nothing else."""
    base, folder, deltas = tinker
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 4}))
    before, after = disk.read_tensors(base), merged(base, folder, tmp_path / "out")
    assert same(
        after, {name: value + deltas[name] if name in deltas else value for name, value in before.items()}, 2e-6
    )


@pytest.mark.parametrize("arch", NAMES)
def test_experts_one_by_one_under_the_names_of_the_disk(arch: str, tmp_path: Path) -> None:
    """What Automodel and axolotl write: a LoRA per expert and projection, under the names before transformers 5."""
    base, folder, deltas = of_tinker(arch, tmp_path)
    block, parts = NAMES[arch]
    single = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        for e in range(EXPERTS if value.ndim == 3 else 0):
            stem, _, rest = name.partition(".mlp.experts.")
            part, _, factor = rest.partition(".")
            single[f"{stem}.{block}.experts.{e}.{parts[part]}.{factor}"] = value[min(e, len(value) - 1)].clone()
    legacy = rewritten(folder, tmp_path / "single", single, target_modules=list(parts.values()), peft_version="0.17.1")
    before, after = disk.read_tensors(base), merged(base, legacy, tmp_path / "out")
    del deltas["lm_head.weight"]
    wanted = {name: value + deltas[name] if name in deltas else value for name, value in before.items()}
    assert same(after, wanted, 2e-6)


def test_tinkers_folder_becomes_one_that_peft_attaches(tmp_path: Path) -> None:
    base, folder, _ = of_tinker("mixtral", tmp_path)
    surgery.convert(folder, to="peft", output=tmp_path / "peft", base=base)
    merged(base, folder, tmp_path / "wanted")
    wanted = models.run("mixtral", models.load("mixtral", tmp_path / "wanted", "float32"))
    with peft_oracle.quiet():
        plain = models.load("mixtral", base, "float32")
        attached = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    torch.testing.assert_close(models.run("mixtral", attached), wanted, rtol=0, atol=1e-5)
    surgery.combine([(folder, 0.5)], output=tmp_path / "half", base=base)
    surgery.combine([(tmp_path / "half", 2.0)], output=tmp_path / "whole", base=base)
    assert same(merged(base, tmp_path / "whole", tmp_path / "again"), disk.read_tensors(tmp_path / "wanted"), 2e-6)


@pytest.mark.parametrize(("experts", "said"), [(2, "shape|experts|rows")])
def test_another_number_of_experts_is_refused(
    tinker: tuple[Path, Path, dict[str, torch.Tensor]], experts: int, said: str, tmp_path: Path
) -> None:
    base, folder, _ = tinker
    tensors = load_file(folder / "adapter_model.safetensors")
    cut = {
        name: value[:experts].contiguous() if value.ndim == 3 and len(value) > 1 else value
        for name, value in tensors.items()
    }
    with pytest.raises(FitError, match=said):
        surgery.merge(base, rewritten(folder, tmp_path / "cut", cut), output=tmp_path / "out")


def test_factors_of_other_ranks_or_counts_are_refused(
    tinker: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    tensors = load_file(tinker[1] / "adapter_model.safetensors")
    with pytest.raises(MalformedError, match="rank 4, but r says 3"):
        surgery.inspect(rewritten(tinker[1], tmp_path / "rank", tensors, r=3))
    for name, value in tensors.items():
        if name.endswith("w2.lora_B.weight"):
            tensors[name] = torch.cat([value] * 2)
    with pytest.raises(FitError, match="its lora_B"):
        surgery.inspect(rewritten(tinker[1], tmp_path / "count", tensors))


def test_unsloths_linears_of_gpt_oss_meet_its_stacks(tmp_path: Path) -> None:
    """The stacks are (E, in, out); one is square, so that no shape gives the order away."""
    generator = torch.Generator().manual_seed(5)
    sizes = {"gate_up_proj": (8, 12), "down_proj": (8, 8)}
    stem = "model.layers.0.mlp.experts."
    base = {f"{stem}{name}": torch.randn(3, *size, generator=generator) for name, size in sizes.items()}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    tensors, wanted = {}, {name: value.clone() for name, value in base.items()}
    for name, (inputs, out) in sizes.items():
        for e in range(3):
            a, b = torch.randn(2, inputs, generator=generator), torch.randn(out, 2, generator=generator)
            tensors[f"base_model.model.{stem}{name}s.{e}.lora_A.weight"] = a
            tensors[f"base_model.model.{stem}{name}s.{e}.lora_B.weight"] = b
            wanted[f"{stem}{name}"][e] += 2 * (b @ a).T
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    targets = [f"{name}s.{e}" for name in sizes for e in range(3)]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert same(merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out"), wanted, 1e-5)
