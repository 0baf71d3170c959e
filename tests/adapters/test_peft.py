# SPDX-License-Identifier: Apache-2.0
"""PEFT folders written here: read back by PEFT itself, and its own folders written again unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from surgery import convert
from surgery_formats.adapters.format import NewTensor
from surgery_formats.errors import FitError, ProofError
from surgery_formats.tensors.tensor import StoredTensor
from tests.support.adapter_files import (
    GOLDEN,
    assert_close,
    config_of,
    draw,
    kohya_deltas,
    peft_deltas,
    unet,
    write_peft,
)

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def _model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).float()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {
            "target_modules": ["q_proj", "k_proj"],
            "use_rslora": True,
            "rank_pattern": {"k_proj": 3},
            "alpha_pattern": {"layers.0.*q_proj": 5},
        },
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5]}},
    ],
    ids=["plain", "patterns", "dora", "embedding", "saved", "tokens"],
)
def test_peft_writes_it_we_write_it_again(options: dict[str, object], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    tuned = get_peft_model(_model(), LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **options))  # type: ignore[arg-type]
    tuned.save_pretrained(tmp_path / "a")
    result = convert(tmp_path / "a", "peft", output=tmp_path / "b")
    assert result.max_error == 0.0
    assert {entry.outcome for entry in result.entries} == {"exact"}
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) and one[name].shape == other[name].shape for name in one)
    assert config_of(tmp_path / "a") == config_of(tmp_path / "b")


@pytest.mark.parametrize("source", ["llama/lora-keys", "llama/dora", "qwen3_moe/lora-switch", "mixtral/lora"])
def test_peft_itself_reads_what_came_from_mlx(source: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = GOLDEN / "mlx" / source
    base = folder.parent / "base"
    convert(folder, "peft", output=tmp_path / "peft", base=base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, tmp_path / "peft").merge_and_unload().save_pretrained(tmp_path / "merged")
    got, want, before = (
        load_file(p)
        for p in (tmp_path / "merged/model.safetensors", folder / "expected.safetensors", base / "model.safetensors")
    )
    assert want.keys() <= got.keys()
    for name, value in got.items():
        step = np.abs(want[name] - before[name]).max() if name in want else 0.0
        assert np.abs(value - want.get(name, before[name])).max() <= 1e-6 * step, name


def test_patterns_match_one_path_only(tmp_path: Path) -> None:
    base = unet(tmp_path / "base")
    from safetensors.numpy import save_file

    tensors = {}
    for key, out, inputs, rank, alpha in (
        ("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 6, 4, 2, 2.0),
        ("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0", 4, 6, 3, 1.0),
    ):
        tensors |= {
            f"lora_unet_{key}.lora_down.weight": draw(1, rank, inputs),
            f"lora_unet_{key}.lora_up.weight": draw(2, out, rank),
            f"lora_unet_{key}.alpha": np.array(alpha, dtype=np.float32),
        }
    save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", "peft", output=tmp_path / "b", base=base)
    config = config_of(tmp_path / "b")
    patterns = {**config["rank_pattern"], **config["alpha_pattern"]}  # type: ignore[dict-item]
    assert len(patterns) == 2
    assert all(pattern.startswith("^down_blocks\\.0\\.attentions\\.0") for pattern in patterns)
    got = {"lora_unet_" + name.replace(".", "_"): value for name, value in peft_deltas(tmp_path / "b").items()}
    assert_close(got, kohya_deltas(tmp_path / "a.safetensors"))


def test_convolutions_get_their_shape_back(tmp_path: Path) -> None:
    source = GOLDEN / "kohya/sd1/conv/adapter.safetensors"
    convert(source, "peft", output=tmp_path / "b", base=GOLDEN / "kohya/sd1/base")
    tensors = load_file(tmp_path / "b/adapter_model.safetensors")
    stem = "base_model.model.down_blocks.0.resnets.0.conv1"
    assert tensors[f"{stem}.lora_A.weight"].shape == (2, 4, 3, 3)
    assert tensors[f"{stem}.lora_B.weight"].shape[1:] == (2, 1, 1)


def test_flat_names_need_the_base(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="--base"):
        convert(GOLDEN / "kohya/sd1/conv/adapter.safetensors", "peft", output=tmp_path / "b")


def test_several_parts_need_a_choice(tmp_path: Path) -> None:
    source, base = GOLDEN / "kohya/sd1/lora/adapter.safetensors", GOLDEN / "kohya/sd1/base"
    with pytest.raises(FitError, match="--component"):
        convert(source, "peft", output=tmp_path / "b", base=base)
    result = convert(source, "peft", output=tmp_path / "b", base=base, component="text_encoder")
    assert sum(entry.outcome == "exact" for entry in result.entries) == 12
    assert all("chosen part" in entry.detail for entry in result.entries if entry.outcome == "dropped")
    with pytest.raises(FitError, match="no part 'vae'"):
        convert(source, "peft", output=tmp_path / "c", base=base, component="vae")


def test_a_bias_is_scaled_with_its_lora(tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": draw(1, 2, 6), f"{Q}.lora_B.weight": draw(2, 6, 2), f"{Q}.lora_B.bias": draw(3, 6)}
    source = write_peft(tmp_path / "a", tensors, r=2, lora_alpha=5, lora_bias=True)
    convert(source, "peft", output=tmp_path / "b")
    written = load_file(tmp_path / "b/adapter_model.safetensors")
    assert np.array_equal(written[f"{Q}.lora_B.bias"], tensors[f"{Q}.lora_B.bias"])


@pytest.mark.parametrize("version", ["0.18.1", "0.21.2"])
def test_stacked_parameters_in_both_orders(version: str, tmp_path: Path) -> None:
    stem, experts, rank = "base_model.model.model.layers.0.mlp.experts", 3, 2
    up, down = (8, 6), (6, 4)  # gate_up_proj (E, 2I, H), down_proj (E, H, I)
    tensors = {}
    for prefix, (rows, cols) in ((f"{stem}.base_layer", up), (stem, down)):
        a, b = (cols, rows) if version == "0.21.2" else (rows, cols)
        tensors |= {
            f"{prefix}.lora_A.weight": draw(1, experts * rank, a),
            f"{prefix}.lora_B.weight": draw(2, b, rank * experts),
        }
    source = write_peft(
        tmp_path / "a",
        tensors,
        r=rank,
        lora_alpha=3,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        peft_version=version,
    )
    result = convert(source, "peft", output=tmp_path / "b")
    assert result.max_error <= 1e-6
    written = load_file(tmp_path / "b/adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert written[f"{stem}.lora_A.weight"].shape == (experts * rank, down[1])
    if version == "0.21.2":
        assert all(np.array_equal(written[name], tensors[name]) for name in tensors)
    assert not str(config_of(tmp_path / "b")["peft_version"]).startswith("0.18")


def test_an_adapters_name_in_its_keys_goes(tmp_path: Path) -> None:
    source = write_peft(
        tmp_path / "a", {f"{Q}.lora_A.default.weight": draw(1, 2, 6), f"{Q}.lora_B.default.weight": draw(2, 6, 2)}, r=2
    )
    convert(source, "peft", output=tmp_path / "b")
    assert set(load_file(tmp_path / "b/adapter_model.safetensors")) == {f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"}


def test_a_soft_prompt_stays_one(tmp_path: Path) -> None:
    source = write_peft(
        tmp_path / "a", {"prompt_embeddings": draw(1, 4, 8)}, peft_type="PROMPT_TUNING", num_virtual_tokens=4
    )
    result = convert(source, "peft", output=tmp_path / "b")
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"
    one, other = (load_file(tmp_path / side / "adapter_model.safetensors") for side in "ab")
    assert one.keys() == other.keys()
    assert np.array_equal(one["prompt_embeddings"], other["prompt_embeddings"])
    assert result.errors == {"prompt_embeddings": 0.0}
    half = convert(source, "peft", output=tmp_path / "half", dtype="fp16")
    assert 0 < half.max_error < 2**-10
    with pytest.raises(FitError, match="virtual tokens"):
        convert(source, "mlx", output=tmp_path / "c")


def test_virtual_tokens_that_change_on_the_way_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_peft(
        tmp_path / "a", {"prompt_embeddings": draw(1, 4, 8)}, peft_type="PROMPT_TUNING", num_virtual_tokens=4
    )
    honest = StoredTensor.read
    monkeypatch.setattr(
        "surgery_formats.adapters.peft.write.copied",
        lambda name, tensor: NewTensor(name, tensor.dtype, tensor.shape, lambda: honest(tensor) * 1.01),
    )
    with pytest.raises(ProofError, match="prompt_embeddings"):
        convert(source, "peft", output=tmp_path / "b")
    assert not (tmp_path / "b").exists()
