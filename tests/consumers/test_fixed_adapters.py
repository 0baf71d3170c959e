# SPDX-License-Identifier: Apache-2.0
"""Adapters rewritten until a program honours them, and what of them goes into a base of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery
from tests.support.adapter_files import (
    GOLDEN,
    assert_close,
    config_of,
    draw,
    mlx_deltas,
    peft_deltas,
    write_peft,
)
from tests.support.decoder import DOWN, MODULES, ROOT, TARGETS, Q, lora_of


def test_a_rank_above_what_the_program_takes_is_cut_by_choice(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES, rank=6), target_modules=TARGETS)
    assert surgery.check(base, adapter, consumer="vllm").honoured
    assert not surgery.check(base, adapter, consumer="vllm", max_rank=4).honoured
    with pytest.raises(surgery.FitError, match="rank 6 is above 4"):
        surgery.check(base, adapter, consumer="vllm", max_rank=4, fix=tmp_path / "never")
    surgery.check(base, adapter, consumer="vllm", max_rank=4, fix=tmp_path / "fixed", rank=4)
    assert config_of(tmp_path / "fixed")["r"] == 4


@pytest.mark.parametrize("consumer", ["sglang", "edge-llm", "llama.cpp", "olive", "vllm@0.30", "tensorrt-llm", "peft"])
@pytest.mark.parametrize(
    ("ranks", "config"),
    [
        ({}, {"use_rslora": True}),
        ({"q_proj": 3}, {}),
        ({"q_proj": 3}, {"alpha_pattern": {"down_proj": 3}, "use_rslora": True}),
        ({"down_proj": 1}, {"target_modules": r".*\.(q_proj|down_proj)"}),
    ],
    ids=["rslora", "ranks", "all patterns", "regex"],
)
def test_what_is_fixed_is_honoured_and_adds_the_same(
    base: Path, tmp_path: Path, consumer: str, ranks: dict[str, int], config: dict[str, object]
) -> None:
    tensors = lora_of(1, MODULES, **ranks)
    adapter = write_peft(tmp_path / "a", tensors, **{"target_modules": TARGETS, **config})
    result = surgery.check(base, adapter, consumer=consumer, fix=tmp_path / "fixed")
    assert result.honoured
    assert surgery.check(base, tmp_path / "fixed", consumer=consumer).honoured
    got = peft_deltas(tmp_path / "fixed")
    assert_close({name: got[name] for name in peft_deltas(adapter)}, peft_deltas(adapter))
    assert all(not value.any() for name, value in got.items() if name not in peft_deltas(adapter))


def test_one_rank_and_one_scale_leave_no_pattern_behind(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(
        tmp_path / "a",
        lora_of(1, {DOWN: (6, 8), "0.mlp.down_proj": (6, 8)}, rank=2)
        | lora_of(9, {"0.self_attn.q_proj": (6, 6)}, rank=3),
        target_modules=TARGETS,
        alpha_pattern={"q_proj": 5},
        use_rslora=True,
    )
    surgery.check(base, adapter, consumer="edge-llm", fix=tmp_path / "fixed")
    config = config_of(tmp_path / "fixed")
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == (3, {}, {}, False)


def test_partners_are_zeros_of_the_right_sizes(base: Path, tmp_path: Path) -> None:
    """SGLang puts q, k and v together: a LoRA of k alone is refused there."""
    k = {"0.self_attn.k_proj": (4, 6)}
    adapter = write_peft(tmp_path / "a", lora_of(1, k), target_modules=["k_proj"])
    (check,) = surgery.check(base, adapter, consumer="sglang").consumers
    assert check.outcome == "refused"
    surgery.check(base, adapter, consumer="sglang", fix=tmp_path / "fixed")
    deltas = peft_deltas(tmp_path / "fixed")
    assert {name: value.shape for name, value in deltas.items()} == {
        "model.layers.0.self_attn.q_proj": (6, 6),
        "model.layers.0.self_attn.k_proj": (4, 6),
        "model.layers.0.self_attn.v_proj": (4, 6),
    }
    assert not deltas["model.layers.0.self_attn.v_proj"].any()


def _dora(folder: Path) -> Path:
    tensors = lora_of(1, MODULES)
    for module, (out, _) in MODULES.items():
        tensors[f"{ROOT}.{module}.lora_magnitude_vector"] = np.abs(draw(3, out))
    return write_peft(folder, tensors, target_modules=TARGETS, use_dora=True)


def test_dora_is_the_nearest_lora_with_its_error_by_choice(base: Path, tmp_path: Path) -> None:
    adapter = _dora(tmp_path / "a")
    with pytest.raises(surgery.FitError, match="has no low rank"):
        surgery.check(base, adapter, consumer="vllm", fix=tmp_path / "fixed")
    result = surgery.check(base, adapter, consumer="vllm", fix=tmp_path / "fixed", rank=4)
    assert result.fixed is not None
    assert {entry.outcome for entry in result.fixed.entries} == {"approximated"}
    assert all(0 < (entry.error or 0) < 1 for entry in result.fixed.entries)
    assert surgery.check(base, tmp_path / "fixed", consumer="vllm").honoured


def test_a_rank_is_chosen_for_what_becomes_a_lora_and_not_for_loras(base: Path, tmp_path: Path) -> None:
    tensors = lora_of(1, MODULES, rank=3) | {"base_model.model.lm_head.weight": draw(8, 11, 6)}
    adapter = write_peft(tmp_path / "a", tensors, target_modules=TARGETS, modules_to_save=["lm_head"])
    result = surgery.check(base, adapter, consumer="vllm", fix=tmp_path / "fixed", saved="lora", rank=2)
    assert result.fixed is not None
    outcomes = {entry.site: entry.outcome for entry in result.fixed.entries}
    assert outcomes.pop("lm_head.weight") == "approximated"
    assert set(outcomes.values()) == {"exact"}


def test_saved_modules_need_consent(base: Path, tmp_path: Path) -> None:
    saved = load_file(base / "model.safetensors")["lm_head.weight"] + draw(4, 11, 1) @ draw(5, 1, 6)
    tensors = lora_of(1, MODULES) | {"base_model.model.lm_head.weight": saved.astype(np.float32)}
    adapter = write_peft(tmp_path / "a", tensors, target_modules=TARGETS, modules_to_save=["lm_head"])
    with pytest.raises(surgery.FitError, match="1 module trained in full: lm_head") as caught:
        surgery.check(base, adapter, consumer="vllm", fix=tmp_path / "never")
    assert "saved=" in str(caught.value.hint)
    surgery.check(base, adapter, consumer="vllm", fix=tmp_path / "dropped", saved="drop")
    assert not [name for name in load_file(tmp_path / "dropped" / "adapter_model.safetensors") if "lm_head" in name]
    surgery.check(base, adapter, consumer="vllm", fix=tmp_path / "lora", saved="lora", rank=1)
    change = peft_deltas(tmp_path / "lora")["lm_head"]
    assert np.abs(change - (saved - load_file(base / "model.safetensors")["lm_head.weight"])).max() < 1e-5


def test_what_no_form_holds_is_left_out_only_by_consent(base: Path, tmp_path: Path) -> None:
    tensors = lora_of(1, MODULES) | {f"{ROOT}.{Q}.lora_B.bias": draw(7, 6)}
    adapter = write_peft(tmp_path / "a", tensors, target_modules=TARGETS, lora_bias=True)
    with pytest.raises(surgery.FitError, match=r"vLLM cannot honour 1 part: '.*q_proj.bias' \(bias of a LoRA"):
        surgery.check(base, adapter, consumer="vllm", fix=tmp_path / "never")
    result = surgery.check(base, adapter, consumer="vllm", fix=tmp_path / "fixed", allow_loss=True)
    assert result.fixed is not None
    assert [entry.site for entry in result.fixed.entries if entry.outcome == "dropped"] == [
        "model.layers.0.self_attn.q_proj.bias"
    ]


@pytest.mark.parametrize("consumer", ["vllm", "mlx-lm", "llama.cpp"])
def test_the_bases_own_values_beside_a_lora_are_no_fault_and_take_nothing_along(
    base: Path, tmp_path: Path, consumer: str
) -> None:
    """PEFT stores the vocabulary beside the LoRA of it: the values are the base's, and only its own format has them."""
    embedding = {
        "base_model.model.model.embed_tokens.base_layer.weight": load_file(base / "model.safetensors")[
            "model.embed_tokens.weight"
        ],
        "base_model.model.model.embed_tokens.lora_embedding_A": draw(1, 2, 11),
        "base_model.model.model.embed_tokens.lora_embedding_B": draw(2, 6, 2),
    }
    adapter = write_peft(tmp_path / "a", embedding | lora_of(1, MODULES), target_modules=[*TARGETS, "embed_tokens"])
    if consumer != "mlx-lm":
        assert surgery.check(base, adapter, consumer=consumer).honoured
    surgery.check(base, adapter, consumer=consumer, fix=tmp_path / "fixed")
    read = mlx_deltas if consumer == "mlx-lm" else peft_deltas
    assert_close(read(tmp_path / "fixed"), peft_deltas(adapter))


def test_the_rest_is_merged_into_a_copy_of_the_base(base: Path, tmp_path: Path) -> None:
    """Together the two do what the adapter does: a vocabulary that grew, as mlx-lm and servers refuse it."""
    grown = np.concatenate([load_file(base / "model.safetensors")["lm_head.weight"], draw(4, 2, 6)])
    whole = {f"base_model.model.{name}.weight": grown for name in ("lm_head", "model.embed_tokens")}
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES) | whole, target_modules=TARGETS)
    (check,) = surgery.check(base, adapter, consumer="mlx-lm@0.32.2").consumers
    assert check.outcome == "refused"
    for consumer in ("vllm", "mlx-lm"):
        rest, fixed = tmp_path / f"{consumer} base", tmp_path / f"{consumer} lora"
        result = surgery.check(base, adapter, consumer=consumer, fix=fixed, merge_rest=rest)
        assert result.fixed is not None
        assert {e.detail for e in result.fixed.entries if "merged" in e.detail} == {"added rows: merged into the base"}
        checked = surgery.check(rest, fixed, consumer=consumer)
        assert checked.honoured
        assert not [warning for warning in checked.warnings if "was trained on" in warning]
        surgery.merge(base, adapter, output=tmp_path / f"{consumer} at once")
        surgery.merge(rest, fixed, output=tmp_path / f"{consumer} in two")
        assert_close(
            *(load_file(tmp_path / f"{consumer} {how}" / "model.safetensors") for how in ("in two", "at once"))
        )


def test_an_extracted_adapter_without_its_rest_belongs_to_the_new_base(base: Path, tmp_path: Path) -> None:
    """An extraction records its base's content, which is another once the rest is merged into it."""
    shutil.copytree(base, tmp_path / "tuned")
    weights = load_file(base / "model.safetensors")
    rows = weights["model.embed_tokens.weight"].copy()
    rows[3] += 1
    q_proj = next(name for name in weights if name.endswith("q_proj.weight"))
    other = {"model.embed_tokens.weight": rows, q_proj: weights[q_proj] + np.ones_like(weights[q_proj])}
    save_file(weights | other, tmp_path / "tuned/model.safetensors")
    surgery.extract_lora(base, tmp_path / "tuned", output=tmp_path / "a")
    given = {"consumer": "vllm", "fix": tmp_path / "fixed", "merge_rest": tmp_path / "rest"}
    surgery.check(base, tmp_path / "a", **given)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "fixed/adapter_config.json").read_text())["base_model_name_or_path"] == "rest"
    surgery.merge(tmp_path / "rest", tmp_path / "fixed", output=tmp_path / "merged")
    assert_close(load_file(tmp_path / "merged/model.safetensors"), load_file(tmp_path / "tuned/model.safetensors"))


@pytest.mark.parametrize("kind", ["prompt", "biases"])
def test_what_is_honoured_is_written_as_it_is(base: Path, tmp_path: Path, kind: str) -> None:
    tensors, config = {
        "prompt": (
            {"prompt_embeddings": draw(1, 3, 6)},
            {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "token_dim": 6, "task_type": "CAUSAL_LM"},
        ),
        "biases": (lora_of(1, MODULES) | {f"{ROOT}.{Q}.lora_B.bias": draw(7, 6)}, {"lora_bias": True}),
    }[kind]
    adapter = write_peft(tmp_path / "a", tensors, target_modules=TARGETS, **config)
    surgery.check(base, adapter, consumer="peft", fix=tmp_path / "fixed")
    written = load_file(tmp_path / "fixed" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[name], value) for name, value in tensors.items())


def test_a_sum_of_adapters_is_honoured_by_servers_with_one_alpha(base: Path, tmp_path: Path) -> None:
    parts = [
        write_peft(
            tmp_path / name, lora_of(seed, {DOWN: (6, 8), "0.mlp.down_proj": (6, 8)}), target_modules=["down_proj"]
        )
        for seed, name in enumerate("abc")
    ]
    surgery.combine(
        {str(part): weight for part, weight in zip(parts, (0.5, 0.3, 0.2), strict=True)}, output=tmp_path / "sum"
    )
    found = {check.name: check.outcome for check in surgery.check(base, tmp_path / "sum").consumers}
    assert {found[name] for name in ("peft", "vllm", "sglang", "llama.cpp", "edge-llm", "olive")} == {"honoured"}


def test_saved_modules_go_to_mlx_as_loras_by_convert(base: Path, tmp_path: Path) -> None:
    """mlx-lm refuses a file with LoRAs and whole tensors."""
    stored = load_file(base / "model.safetensors")
    whole = {
        "base_model.model.lm_head.weight": stored["lm_head.weight"] + draw(4, 11, 1) @ draw(5, 1, 6),
        "base_model.model.model.embed_tokens.weight": stored["model.embed_tokens.weight"]
        + draw(6, 11, 1) @ draw(7, 1, 6),
    }
    saved = ["embed_tokens", "lm_head"]
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES) | whole, target_modules=TARGETS, modules_to_save=saved)
    with pytest.raises(surgery.FitError, match="2 modules trained in full"):
        surgery.convert(adapter, consumer="mlx-lm", base=base, output=tmp_path / "never")
    result = surgery.convert(adapter, consumer="mlx-lm", base=base, saved="lora", rank=1, output=tmp_path / "out")
    assert result.max_approximation < 1e-6
    deltas = mlx_deltas(tmp_path / "out")
    for name in ("lm_head", "model.embed_tokens"):
        change = whole[f"base_model.model.{name}.weight"] - stored[f"{name}.weight"]
        assert np.abs(deltas[name] - change).max() < 1e-5


def test_tensorrt_llms_python_api_gets_a_folder_of_peft_for_the_arrays_of_its_runtime(tmp_path: Path) -> None:
    base, arrays = GOLDEN / "litgpt/base", GOLDEN / "tensorrt_llm/all"
    (check,) = surgery.check(base, arrays, consumer="tensorrt-llm").consumers
    assert [(one.what, one.why) for one in check.verdicts] == [("format", "it loads peft; this is tensorrt-llm")]
    surgery.convert(arrays, consumer="tensorrt-llm", base=base, output=tmp_path / "out")
    assert surgery.check(base, tmp_path / "out", consumer="tensorrt-llm").honoured
    for name, adapter in {"before": arrays, "after": tmp_path / "out"}.items():
        surgery.merge(base, adapter, output=tmp_path / name)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    for name, tensor in before.items():
        np.testing.assert_allclose(after[name], tensor, atol=1e-6)
