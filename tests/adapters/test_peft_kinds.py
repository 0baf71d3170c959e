# SPDX-License-Identifier: Apache-2.0
"""Every PEFT kind written from memory: PEFT itself loads the folder, and its merge is that of the adapter the values came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery_formats import open_checkpoint
from surgery_formats.adapters.peft import PEFT
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.binding.sizes import sized
from surgery_formats.testing.format import save
from surgery_formats.testing.memory import in_memory
from tests.oracles import measure, models, peft_oracle

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "Lora", {"target_modules": ["q_proj", "up_proj"], "r": 3, "rank_pattern": {"up_proj": 2}}),
    "rslora": ("llama", "Lora", {"target_modules": ["q_proj"], "r": 4, "use_rslora": True}),
    "dora": ("llama", "Lora", {"target_modules": ["q_proj", "up_proj"], "r": 3, "use_dora": True}),
    "embedding": ("llama", "Lora", {"target_modules": ["embed_tokens", "q_proj"], "r": 3}),
    "convolution": ("torch_module", "Lora", {"target_modules": ["conv1", "conv2"], "r": 3}),
    "other convolutions": ("torch_module", "Lora", {"target_modules": ["conv2_point", "conv3"], "r": 3}),
    "wrapped attention": ("torch_module", "Lora", {"target_modules": ["attention", "head"], "r": 3, "lora_alpha": 5}),
    "biased attention": ("torch_module", "Lora", {"target_modules": ["attention", "head"], "r": 3, "lora_bias": True}),
    "conv1d": ("gpt2", "Lora", {"target_modules": ["c_attn", "c_proj"], "r": 3}),
    "lora_bias": ("gpt2", "Lora", {"target_modules": ["c_attn"], "r": 3, "lora_bias": True}),
    "token rows": (
        "llama",
        "Lora",
        {"target_modules": ["q_proj"], "r": 3, "trainable_token_indices": {"embed_tokens": [1, 5]}},
    ),
    "saved modules": ("llama", "Lora", {"target_modules": ["q_proj"], "r": 3, "modules_to_save": ["lm_head"]}),
    "ia3": ("gpt2", "IA3", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
    "ia3 on convolutions": (
        "torch_module",
        "IA3",
        {"target_modules": ["conv2", "conv3"], "feedforward_modules": ["conv3"]},
    ),
    "loha": ("llama", "LoHa", {"target_modules": ["q_proj", "up_proj"], "r": 3, "alpha": 5}),
    "loha with ranks": (
        "llama",
        "LoHa",
        {"target_modules": ["q_proj", "up_proj"], "r": 3, "rank_pattern": {"up_proj": 2}},
    ),
    "loha of kernels": ("torch_module", "LoHa", {"target_modules": ["conv2"], "r": 3, "use_effective_conv2d": True}),
    "lokr of kernels": ("torch_module", "LoKr", {"target_modules": ["conv2"], "r": 1, "use_effective_conv2d": True}),
    "lokr": ("llama", "LoKr", {"target_modules": ["q_proj", "up_proj"], "r": 3, "alpha": 5}),
    "lokr in both": ("llama", "LoKr", {"target_modules": ["q_proj", "up_proj"], "r": 1, "decompose_both": True}),
    "lokr by a factor": ("llama", "LoKr", {"target_modules": ["q_proj", "up_proj"], "r": 30, "decompose_factor": 2}),
    "lokr on convolutions": ("torch_module", "LoKr", {"target_modules": ["conv1", "conv2"], "r": 12}),
    "oft": ("llama", "OFT", {"target_modules": ["q_proj", "down_proj"], "oft_block_size": 8}),
    "oft by a series": (
        "llama",
        "OFT",
        {"target_modules": ["q_proj"], "oft_block_size": 8, "use_cayley_neumann": True},
    ),
    "oft shared and constrained": (
        "llama",
        "OFT",
        {"target_modules": ["q_proj"], "oft_block_size": 8, "block_share": True, "coft": True, "eps": 1e-2},
    ),
    "vera": ("gpt2", "Vera", {"target_modules": ["c_attn", "c_proj"], "r": 5}),
    "vera, drawn": (
        "gpt2",
        "Vera",
        {"target_modules": ["c_attn"], "r": 5, "save_projection": False, "projection_prng_key": 3},
    ),
    "adalora": ("llama", "AdaLora", {"target_modules": ["q_proj", "up_proj"], "init_r": 4, "total_step": 10}),
    "adalora and token rows": (
        "llama",
        "AdaLora",
        {
            "target_modules": ["q_proj"],
            "init_r": 4,
            "total_step": 10,
            "trainable_token_indices": {"embed_tokens": [1, 5]},
        },
    ),
    "adalora on convolutions": (
        "torch_module",
        "AdaLora",
        {"target_modules": ["conv2"], "init_r": 3, "total_step": 10},
    ),
    "miss": ("llama", "Miss", {"target_modules": ["q_proj", "down_proj"], "r": 5}),
    "miss, mini": (
        "llama",
        "Miss",
        {"target_modules": ["q_proj", "down_proj"], "r": 4, "mini_r": 8, "init_weights": "mini"},
    ),
    "miss, bat": ("llama", "Miss", {"target_modules": ["q_proj", "down_proj"], "r": 8, "init_weights": "bat"}),
    "hira": ("gpt2", "Hira", {"target_modules": ["c_attn", "c_fc"], "r": 3, "rank_pattern": {"c_fc": 2}}),
    "hira of kernels": ("torch_module", "Hira", {"target_modules": ["conv1", "conv2", "embed"], "r": 3}),
    "hra": ("llama", "HRA", {"target_modules": ["q_proj", "down_proj"], "r": 4}),
    "hra by gram-schmidt": ("llama", "HRA", {"target_modules": ["q_proj"], "r": 3, "apply_GS": True}),
    "boft": ("llama", "BOFT", {"target_modules": ["q_proj", "down_proj"], "boft_block_size": 4}),
    "boft of kernels": ("torch_module", "BOFT", {"target_modules": ["conv2_point"], "boft_block_size": 3}),
    "c3a": ("llama", "C3A", {"target_modules": ["q_proj", "up_proj"], "block_size": 8}),
    "c3a of sizes": (
        "llama",
        "C3A",
        {"target_modules": ["q_proj", "up_proj"], "block_size": 8, "block_size_pattern": {"up_proj": 4}},
    ),
    "shira": ("llama", "Shira", {"target_modules": ["q_proj", "up_proj"], "r": 2}),
    "road": ("bert", "Road", {"target_modules": ["query", "dense"], "group_size": 8, "variant": "road_2"}),
    "delora": ("llama", "Delora", {"target_modules": ["q_proj", "up_proj"], "r": 3, "rank_pattern": {"up_proj": 2}}),
    "gralora": ("gpt2", "Gralora", {"target_modules": ["c_attn"], "r": 4, "gralora_k": 2, "hybrid_r": 3}),
    "fourierft": (
        "gpt2",
        "FourierFT",
        {"target_modules": ["c_attn", "c_fc"], "n_frequency": 60, "n_frequency_pattern": {"c_fc": 9}},
    ),
    "randlora": ("llama", "RandLora", {"target_modules": ["q_proj", "up_proj"], "r": 5}),
    "randlora, drawn": (
        "llama",
        "RandLora",
        {"target_modules": ["q_proj", "up_proj"], "r": 5, "save_projection": False, "very_sparse": True},
    ),
    "pvera": ("gpt2", "Pvera", {"target_modules": ["c_attn", "c_proj"], "r": 4}),
    "pvera, drawn": (
        "gpt2",
        "Pvera",
        {"target_modules": ["c_attn"], "r": 4, "save_projection": False, "projection_prng_key": 3},
    ),
    "vblora": ("llama", "VBLoRA", {"target_modules": ["q_proj"], "r": 2, "num_vectors": 9, "vector_length": 8}),
    "vblora of the greatest": (
        "llama",
        "VBLoRA",
        {
            "target_modules": ["q_proj", "up_proj"],
            "r": 2,
            "num_vectors": 9,
            "vector_length": 8,
            "topk": 3,
            "save_only_topk_weights": True,
        },
    ),
    "beft": ("bert", "Beft", {"target_modules": ["query", "dense"]}),
}
"""Adapters, and configurations that PEFT accepts for them."""
_NEEDS_BASE = ("shira",)  # whose r depends on the sizes of modules


PRODUCTS = [name for name, (_, kind, _) in KINDS.items() if kind in ("LoHa", "LoKr")]
"""Kinds whose factors may be products, which are written as they are given: as one matrix, or as a pair."""


@pytest.mark.parametrize(
    ("name", "keep_terms"), [*((name, False) for name in KINDS), *((name, True) for name in PRODUCTS)]
)
def test_peft_merges_what_was_written_from_memory(name: str, keep_terms: bool, tmp_path: Path) -> None:
    arch, kind, fields = KINDS[name]
    base = models.build_base(arch, tmp_path / "base")
    peft_oracle.train(arch, base, f"{kind}Config", fields, tmp_path / "trained", seed=4)
    made = in_memory(read_adapter(tmp_path / "trained"), keep_terms=keep_terms)
    known = open_checkpoint(base) if name in _NEEDS_BASE else None
    rendering = PEFT.render(made if known is None else sized(made, known), known)
    assert not [entry for entry in rendering.entries if entry.outcome == "dropped"]
    written = save(rendering, PEFT, tmp_path)
    trained, merged = (
        peft_oracle.merge(arch, base, [(path, 1.0)], "float64") for path in (tmp_path / "trained", written)
    )
    assert trained.tensors.keys() == merged.tensors.keys()
    for key, value in trained.tensors.items():
        assert measure.relative_error(merged.tensors[key], value) < 1e-5, key
    torch.testing.assert_close(merged.attached, trained.attached, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["loha", "lokr", "oft", "vera", "ia3"])
def test_the_configuration_is_of_the_kind_and_names_nothing_else(name: str, tmp_path: Path) -> None:
    arch, kind, fields = KINDS[name]
    base = models.build_base(arch, tmp_path / "base")
    peft_oracle.train(arch, base, f"{kind}Config", fields, tmp_path / "trained", seed=4)
    adapter = read_adapter(tmp_path / "trained")
    config = json.loads(PEFT.render(in_memory(adapter), None).small_files["adapter_config.json"])
    assert config["peft_type"] == kind.upper()
    assert set(config["target_modules"]) == {site.path.rpartition(".")[0] for site in adapter.updates}
