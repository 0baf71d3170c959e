# SPDX-License-Identifier: Apache-2.0
"""PEFT folders written here: read back by PEFT itself, and its own folders written again unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file

from surgery import convert
from surgery_formats.adapters.format import NewTensor
from surgery_formats.errors import FitError, ProofError
from surgery_formats.tensors.tensor import StoredTensor
from tests.oracles import cases, rewrites  # noqa: F401  (cases first: they use rewrites)
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
    with pytest.raises(FitError, match="`base=`"):
        convert(GOLDEN / "kohya/sd1/conv/adapter.safetensors", "peft", output=tmp_path / "b")


def test_several_parts_need_a_choice(tmp_path: Path) -> None:
    source, base = GOLDEN / "kohya/sd1/lora/adapter.safetensors", GOLDEN / "kohya/sd1/base"
    with pytest.raises(FitError, match="`component=`"):
        convert(source, "peft", output=tmp_path / "b", base=base)
    result = convert(source, "peft", output=tmp_path / "b", base=base, component="text_encoder")
    assert sum(entry.outcome == "exact" for entry in result.entries) == 12
    assert all("chosen part" in entry.detail for entry in result.entries if entry.outcome == "dropped")
    with pytest.raises(FitError, match="no part 'vae'"):
        convert(source, "peft", output=tmp_path / "c", base=base, component="vae")


@pytest.mark.parametrize(
    "settings", [{"lora_bias": True}, {}], ids=["PEFT", "mergekit 0.1.5, which states no lora_bias"]
)
def test_a_bias_is_scaled_with_its_lora(settings: dict[str, bool], tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": draw(1, 2, 6), f"{Q}.lora_B.weight": draw(2, 6, 2), f"{Q}.lora_B.bias": draw(3, 6)}
    source = write_peft(tmp_path / "a", tensors, r=2, lora_alpha=5, **settings)
    convert(source, "peft", output=tmp_path / "b")
    written = load_file(tmp_path / "b/adapter_model.safetensors")
    assert np.array_equal(written[f"{Q}.lora_B.bias"], tensors[f"{Q}.lora_B.bias"])
    assert config_of(tmp_path / "b")["lora_bias"] is True


def _stacked_parameters(folder: Path, version: str) -> tuple[Path, dict[str, np.ndarray]]:
    stem, experts, rank = "base_model.model.model.layers.0.mlp.experts", 3, 2
    tensors = {}
    for prefix, (rows, cols) in ((f"{stem}.base_layer", (8, 6)), (stem, (6, 4))):  # (E, 2I, H) inside (E, H, I)
        tensors |= {
            f"{prefix}.lora_A.weight": draw(1, experts * rank, cols),
            f"{prefix}.lora_B.weight": draw(2, rows, rank * experts),
        }
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = {"r": rank, "lora_alpha": 3, "target_modules": [], "target_parameters": parameters}
    return write_peft(folder, tensors, **config, peft_version=version), tensors


def test_stacked_parameters_are_written_as_they_were(tmp_path: Path) -> None:
    source, tensors = _stacked_parameters(tmp_path / "a", "0.21.2")
    assert convert(source, "peft", output=tmp_path / "b").max_error <= 1e-6
    written = load_file(tmp_path / "b/adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[name], tensors[name]) for name in tensors)


def test_the_axes_of_an_older_peft_need_the_base(tmp_path: Path) -> None:
    """Which order is today's depends on how the base holds its experts; through compact folders too."""
    source, _ = _stacked_parameters(tmp_path / "a", "0.18.1")
    convert(source, "compact", output=tmp_path / "compact")
    for old in (source, tmp_path / "compact"):
        with pytest.raises(FitError, match=r"order of the axes of stacked experts in 0\.19.*`base=`"):
            convert(old, "peft", output=tmp_path / "b")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_peft_reads_todays_axes_where_an_older_one_wrote_them(name: str, square: bool, tmp_path: Path) -> None:
    """gpt-oss holds its experts as ``(E, in, out)``: there PEFT 0.19 changed nothing, elsewhere it exchanged A and B."""
    import peft
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 8 if square else 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 3}
    config, cls = (getattr(transformers, f"{name}{kind}") for kind in ("Config", "ForCausalLM"))
    cls(config(**sizes, tie_word_embeddings=False)).float().save_pretrained(tmp_path / "base")

    def changes(folder: Path) -> dict[str, torch.Tensor]:
        """What the folder adds to every weight, by PEFT."""
        base, other = (cls.from_pretrained(tmp_path / "base", dtype=torch.float32) for _ in range(2))
        merged = peft.PeftModel.from_pretrained(other, folder).merge_and_unload()
        before = base.state_dict()
        return {key: value - before[key] for key, value in merged.state_dict().items()}

    base = cls.from_pretrained(tmp_path / "base", dtype=torch.float32)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = peft.LoraConfig(r=2, target_modules=[], target_parameters=parameters, init_lora_weights=False)
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "new")
    fields, tensors = (
        config_of(tmp_path / "new"),
        safetensors.torch.load_file(tmp_path / "new/adapter_model.safetensors"),
    )
    fields, tensors = rewrites.peft_018(fields, tensors) if name == "Mixtral" else (fields, tensors)
    old = write_peft(
        tmp_path / "old", {k: v.numpy() for k, v in tensors.items()}, **fields | {"peft_version": "0.18.1"}
    )

    convert(old, "peft", base=tmp_path / "base", output=tmp_path / "written")
    meant, written = changes(tmp_path / "new"), changes(tmp_path / "written")
    assert sum(bool(change.any()) for change in meant.values()) == len(parameters)
    for key, change in meant.items():
        assert torch.allclose(written[key], change, atol=1e-6), key


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
