# SPDX-License-Identifier: Apache-2.0
"""Check: what consumers' rules say of adapters, and adapters that are rewritten until a consumer honours them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery
from surgery.consumers.consumer import RuledConsumer
from surgery.consumers.registry import BUILT_IN, ENTRY_POINTS, consumer_named, consumers
from surgery.consumers.rules import honoured, refused
from surgery.consumers.traits import TRAITS
from surgery_formats.errors import FitError
from surgery_formats.testing.plugins import installed
from tests.support.adapter_files import (
    assert_close,
    config_of,
    draw,
    kohya_deltas,
    mlx_deltas,
    peft_deltas,
    unet,
    write_base,
    write_peft,
)

ROOT = "base_model.model.model.layers"


def _lora(seed: int, modules: dict[str, tuple[int, int]], rank: int = 2, **ranks: int) -> dict[str, np.ndarray]:
    tensors = {}
    for number, (module, (out, inputs)) in enumerate(modules.items()):
        own = ranks.get(module.rpartition(".")[2], rank)
        tensors[f"{ROOT}.{module}.lora_A.weight"] = draw(seed + number, own, inputs)
        tensors[f"{ROOT}.{module}.lora_B.weight"] = draw(seed + 50 + number, out, own)
    return tensors


Q, DOWN = "0.self_attn.q_proj", "1.mlp.down_proj"
MODULES = {Q: (6, 6), DOWN: (6, 8)}
TARGETS = ["q_proj", "down_proj"]
PROJECTIONS = {"self_attn.q_proj": (6, 6), "self_attn.k_proj": (4, 6), "mlp.down_proj": (6, 8)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A decoder of two layers, with all projections that programs put together."""
    leaves = {"self_attn.v_proj": (4, 6), "mlp.gate_proj": (8, 6), "mlp.up_proj": (8, 6), **PROJECTIONS}
    layers = {f"model.layers.{i}.{leaf}.weight": shape for i in range(2) for leaf, shape in leaves.items()}
    shapes = {"model.embed_tokens.weight": (11, 6), **layers, "lm_head.weight": (11, 6)}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    return write_base(tmp_path / "base", shapes, config)


@pytest.mark.parametrize("consumer", BUILT_IN, ids=lambda one: one.name)
def test_every_consumer_has_a_rule_for_every_trait_and_names_its_sources(consumer: RuledConsumer) -> None:
    assert {"LoRA", *consumer.rules} == {*TRAITS}
    assert consumer.sources
    assert all(source.version and source.file for source in consumer.sources)
    for rules in (consumer.rules, *(changed for _, changed in consumer.since)):
        assert all(rule.why for rule in rules.values() if rule.outcome != "honoured")


def test_a_plain_lora_is_honoured_by_all_that_read_its_format(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", _lora(1, MODULES), target_modules=TARGETS)
    found = {check.name: check.outcome for check in surgery.check(base, adapter).consumers}
    assert {name for name, outcome in found.items() if outcome == "honoured"} == {
        "peft", "transformers", "vllm", "tensorrt-llm", "edge-llm", "llama.cpp", "onnxruntime-genai", "olive",
    }  # fmt: skip
    assert found["sglang"] == "refused"  # q has a LoRA and v has none


@pytest.mark.parametrize(
    ("consumer", "config", "factor"),
    [
        ("sglang", {"use_rslora": True}, 1 / 2**0.5),
        ("llama.cpp", {"use_rslora": True}, 1 / 2**0.5),
        ("llama.cpp", {"alpha_pattern": {"down_proj": 32}}, 1 / 4),
        ("olive", {"alpha_pattern": {"down_proj": 32}}, 1 / 4),
        ("vllm@0.30", {"alpha_pattern": {"down_proj": 32}}, 1 / 4),
        ("tensorrt-llm", {"alpha_pattern": {"down_proj": 32}, "use_rslora": True}, 1 / 4),
    ],
)
def test_a_wrong_scale_is_told_with_its_factor(
    base: Path, tmp_path: Path, consumer: str, config: dict[str, object], factor: float
) -> None:
    adapter = write_peft(tmp_path / "a", _lora(1, {DOWN: (6, 8)}), target_modules=["down_proj"], **config)
    (check,) = surgery.check(base, adapter, consumer=consumer).consumers
    (wrong,) = check.faults
    assert check.outcome == wrong.outcome == "scaled wrongly"
    assert wrong.factor == pytest.approx(factor)


def test_an_alpha_of_zero_is_a_scale_of_one_in_llama_cpp(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", _lora(1, {DOWN: (6, 8)}), target_modules=["down_proj"], lora_alpha=0)
    (check,) = surgery.check(base, adapter, consumer="llama.cpp").consumers
    assert check.outcome == "scaled wrongly"


def test_versions_have_their_own_rules(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", _lora(1, MODULES), target_modules=TARGETS, alpha_pattern={"down_proj": 1})
    assert surgery.check(base, adapter, consumer="vllm").honoured
    assert not surgery.check(base, adapter, consumer="vllm@0.31.0").honoured
    newer = surgery.check(base, adapter, consumer="vllm@99.0")
    assert any("which is older" in warning for warning in newer.warnings)
    with pytest.raises(surgery.FitError, match=r"the rules of vllm begin at 0\.25"):
        surgery.check(base, adapter, consumer="vllm@0.1")
    with pytest.raises(surgery.FitError, match="'soon' is no version"):
        surgery.check(base, adapter, consumer="vllm@soon")
    with pytest.raises(surgery.NotFoundError, match="no consumer 'vlm'") as caught:
        surgery.check(base, adapter, consumer="vlm")
    assert "vllm" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("names", "outcomes"),
    [
        (lambda name: name.removeprefix("base_model.model."), {"peft": "ignored", "vllm": "honoured"}),
        (lambda name: name.replace("model.layers", "_orig_mod.model.layers"), {"peft": "ignored", "llama.cpp": "refused"}),
        (lambda name: name.replace(".weight", ".default.weight"), {"peft": "honoured", "vllm": "refused"}),
    ],
    ids=["bare", "wrapped", "in memory"],
)  # fmt: skip
def test_names_of_tensors_that_are_not_pefts_are_told_and_put_right(
    base: Path, tmp_path: Path, names: Callable[[str], str], outcomes: dict[str, str]
) -> None:
    tensors = {names(name): value for name, value in _lora(1, MODULES).items()}
    adapter = write_peft(tmp_path / "a", tensors, target_modules=TARGETS, r=2, rank_pattern={})
    found = {check.name: check.outcome for check in surgery.check(base, adapter).consumers}
    assert found.items() >= outcomes.items()
    for consumer in outcomes:
        assert surgery.check(base, adapter, consumer=consumer, fix=tmp_path / f"for {consumer}").honoured


@pytest.mark.parametrize(
    ("consumer", "fields", "what"),
    [
        ("peft", {"target_modules": ["down_proj"]}, "beyond the targets"),
        ("peft", {"target_modules": TARGETS, "layers_to_transform": [0]}, "beyond the targets"),
        ("peft", {"target_modules": TARGETS, "r": None}, "missing fields"),
        ("peft", {"target_modules": TARGETS, "modules_to_save": ["lm_head"]}, "promised modules"),
        ("vllm", {"target_modules": TARGETS, "lora_alpha": None}, "missing fields"),
        ("vllm", {"target_modules": TARGETS, "bias": "lora_only"}, "bias setting"),
        ("vllm", {"target_modules": TARGETS, "lora_bias": True}, "bias setting"),
        ("sglang", {"target_modules": ["v_proj"]}, "beyond the targets"),
        ("sglang", {"target_modules": None}, "no targets"),
    ],
)
def test_what_the_configuration_says_beside_the_tensors_is_told_and_written_anew(
    base: Path, tmp_path: Path, consumer: str, fields: dict[str, Any], what: str
) -> None:
    adapter = write_peft(tmp_path / "a", _lora(1, MODULES), **fields)
    (check,) = surgery.check(base, adapter, consumer=consumer).consumers
    assert what in {fault.what for fault in check.faults}
    fixed = surgery.check(base, adapter, consumer=consumer, fix=tmp_path / "fixed")
    assert surgery.check(base, tmp_path / "fixed", consumer=consumer).honoured
    assert fixed.fixed is not None
    config = json.loads((tmp_path / "fixed" / "adapter_config.json").read_text())
    assert config["bias"] == "none"
    assert not config.get("lora_bias")
    assert not config.get("modules_to_save")
    assert {*TARGETS} <= {name.rpartition(".")[2] for name in config["target_modules"]}
    meant = peft_deltas(write_peft(tmp_path / "whole", _lora(1, MODULES), target_modules=TARGETS, lora_alpha=8))
    for name, delta in meant.items():
        np.testing.assert_allclose(peft_deltas(tmp_path / "fixed")[name], delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("consumer", ["sglang", "edge-llm"])
def test_another_format_is_brought_to_one_rank_and_beside_its_partners(
    base: Path, tmp_path: Path, consumer: str
) -> None:
    ranks = {"down_proj": 3}
    source = write_peft(tmp_path / "a", _lora(1, MODULES, **ranks), target_modules=TARGETS, rank_pattern=ranks)
    surgery.convert(source, "bare", output=tmp_path / "bare.safetensors", base=base)
    surgery.convert(tmp_path / "bare.safetensors", consumer=consumer, output=tmp_path / "fixed", base=base)
    assert surgery.check(base, tmp_path / "fixed", consumer=consumer).honoured
    written = peft_deltas(tmp_path / "fixed")
    for name, delta in peft_deltas(source).items():
        np.testing.assert_allclose(written[name], delta, rtol=1e-5, atol=1e-6)


def test_what_is_beyond_the_targets_of_one_program_is_within_anothers(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", _lora(1, MODULES), target_modules=TARGETS, exclude_modules=["q_proj"])
    found = {check.name: check.outcome for check in surgery.check(base, adapter).consumers}
    assert (found["peft"], found["transformers"], found["onnxruntime-genai"]) == ("ignored",) * 3
    assert (found["vllm"], found["llama.cpp"], found["olive"]) == ("honoured",) * 3


def test_a_rank_above_what_the_program_takes_is_cut_by_choice(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", _lora(1, MODULES, rank=6), target_modules=TARGETS)
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
    tensors = _lora(1, MODULES, **ranks)
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
        _lora(1, {DOWN: (6, 8), "0.mlp.down_proj": (6, 8)}, rank=2) | _lora(9, {"0.self_attn.q_proj": (6, 6)}, rank=3),
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
    adapter = write_peft(tmp_path / "a", _lora(1, k), target_modules=["k_proj"])
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
    tensors = _lora(1, MODULES)
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
    tensors = _lora(1, MODULES, rank=3) | {"base_model.model.lm_head.weight": draw(8, 11, 6)}
    adapter = write_peft(tmp_path / "a", tensors, target_modules=TARGETS, modules_to_save=["lm_head"])
    result = surgery.check(base, adapter, consumer="vllm", fix=tmp_path / "fixed", saved="lora", rank=2)
    assert result.fixed is not None
    outcomes = {entry.site: entry.outcome for entry in result.fixed.entries}
    assert outcomes.pop("lm_head.weight") == "approximated"
    assert set(outcomes.values()) == {"exact"}


def test_saved_modules_need_consent(base: Path, tmp_path: Path) -> None:
    saved = load_file(base / "model.safetensors")["lm_head.weight"] + draw(4, 11, 1) @ draw(5, 1, 6)
    tensors = _lora(1, MODULES) | {"base_model.model.lm_head.weight": saved.astype(np.float32)}
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
    tensors = _lora(1, MODULES) | {f"{ROOT}.{Q}.lora_B.bias": draw(7, 6)}
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
    adapter = write_peft(tmp_path / "a", embedding | _lora(1, MODULES), target_modules=[*TARGETS, "embed_tokens"])
    if consumer != "mlx-lm":
        assert surgery.check(base, adapter, consumer=consumer).honoured
    surgery.check(base, adapter, consumer=consumer, fix=tmp_path / "fixed")
    read = mlx_deltas if consumer == "mlx-lm" else peft_deltas
    assert_close(read(tmp_path / "fixed"), peft_deltas(adapter))


def test_the_rest_is_merged_into_a_copy_of_the_base(base: Path, tmp_path: Path) -> None:
    """Together the two do what the adapter does: a vocabulary that grew, as mlx-lm and servers refuse it."""
    grown = np.concatenate([load_file(base / "model.safetensors")["lm_head.weight"], draw(4, 2, 6)])
    whole = {f"base_model.model.{name}.weight": grown for name in ("lm_head", "model.embed_tokens")}
    adapter = write_peft(tmp_path / "a", _lora(1, MODULES) | whole, target_modules=TARGETS)
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
        "biases": (_lora(1, MODULES) | {f"{ROOT}.{Q}.lora_B.bias": draw(7, 6)}, {"lora_bias": True}),
    }[kind]
    adapter = write_peft(tmp_path / "a", tensors, target_modules=TARGETS, **config)
    surgery.check(base, adapter, consumer="peft", fix=tmp_path / "fixed")
    written = load_file(tmp_path / "fixed" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[name], value) for name, value in tensors.items())


def test_a_sum_of_adapters_is_honoured_by_servers_with_one_alpha(base: Path, tmp_path: Path) -> None:
    parts = [
        write_peft(
            tmp_path / name, _lora(seed, {DOWN: (6, 8), "0.mlp.down_proj": (6, 8)}), target_modules=["down_proj"]
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
    adapter = write_peft(tmp_path / "a", _lora(1, MODULES) | whole, target_modules=TARGETS, modules_to_save=saved)
    with pytest.raises(surgery.FitError, match="2 modules trained in full"):
        surgery.convert(adapter, consumer="mlx-lm", base=base, output=tmp_path / "never")
    result = surgery.convert(adapter, consumer="mlx-lm", base=base, saved="lora", rank=1, output=tmp_path / "out")
    assert result.max_approximation < 1e-6
    deltas = mlx_deltas(tmp_path / "out")
    for name in ("lm_head", "model.embed_tokens"):
        change = whole[f"base_model.model.{name}.weight"] - stored[f"{name}.weight"]
        assert np.abs(deltas[name] - change).max() < 1e-5


def test_convert_asks_for_one_of_a_format_and_a_program(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", _lora(1, MODULES), target_modules=TARGETS)
    with pytest.raises(surgery.FitError, match="a program decides about format"):
        surgery.convert(adapter, "peft", consumer="vllm", base=base, output=tmp_path / "never")
    with pytest.raises(surgery.FitError, match="look at the base too"):
        surgery.convert(adapter, consumer="vllm", output=tmp_path / "never")
    dry = surgery.convert(adapter, consumer="sglang", base=base, dry_run=True)
    assert (dry.output, dry.consumer) == (None, "sglang")


def test_parts_alike_are_one_row_and_all_of_them_if_asked(base: Path, tmp_path: Path) -> None:
    leaves = {"q_proj": 6, "k_proj": 4}
    modules = {f"{layer}.self_attn.{name}": (out, 6) for layer in range(2) for name, out in leaves.items()}
    adapter = write_peft(
        tmp_path / "a",
        _lora(1, modules),
        target_modules=["q_proj", "k_proj"],
        use_rslora=True,
        alpha_pattern={"layers.1.self_attn.k_proj": 5},
    )
    found = surgery.check(base, adapter, consumer="sglang")
    lines = {
        line.split()[0]: line.split()[1] for line in str(found.summary()).splitlines() if line.startswith("model.")
    }
    alone = {f"model.layers.{layer}.self_attn.k_proj.weight": "1" for layer in range(2)}
    assert lines == {"model.layers.*.self_attn.q_proj": "2", **alone}
    assert "model.layers.1.self_attn.q_proj.weight" in str(found.summary(verbose=True))


def test_a_virtual_prompt_has_no_way_into_a_server_or_the_base(base: Path, tmp_path: Path) -> None:
    prompt = {"prompt_embeddings": draw(1, 3, 6)}
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "token_dim": 6, "task_type": "CAUSAL_LM"}
    adapter = write_peft(tmp_path / "a", prompt, **config)
    assert not surgery.check(base, adapter, consumer="vllm").honoured
    with pytest.raises(surgery.FitError, match="vLLM has no way to honour") as caught:
        surgery.check(base, adapter, consumer="vllm", fix=tmp_path / "never")
    assert caught.value.hint == "`surgery export-onnx` puts it in front of the input"


def test_another_format_is_converted(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", _lora(1, MODULES, q_proj=3), target_modules=TARGETS, use_rslora=True)
    (check,) = surgery.check(base, adapter, consumer="mlx-lm").consumers
    assert [fault.what for fault in check.faults] == ["format"]
    surgery.check(base, adapter, consumer="mlx-lm", fix=tmp_path / "fixed")
    assert_close(mlx_deltas(tmp_path / "fixed"), peft_deltas(adapter))
    (back,) = surgery.check(base, tmp_path / "fixed", consumer="vllm").consumers
    assert [fault.why for fault in back.faults] == ["it loads peft, this is mlx"]


@pytest.mark.parametrize("consumer", ["vllm", "vllm@0.30", "llama.cpp"])
def test_experts_that_were_not_trained_are_zeros_where_a_program_wants_all(tmp_path: Path, consumer: str) -> None:
    experts = {
        f"model.layers.0.mlp.experts.{e}.{name}.weight": shape
        for e in range(2)
        for name, shape in (("gate_proj", (4, 6)), ("up_proj", (4, 6)), ("down_proj", (6, 4)))
    }
    shapes = {"model.embed_tokens.weight": (11, 6), **experts, "lm_head.weight": (11, 6)}
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 2}
    moe = write_base(tmp_path / "moe", shapes, config)
    trained = {f"0.mlp.experts.{e}.down_proj": (6, 4) for e in range(2)}
    adapter = write_peft(tmp_path / "a", _lora(1, trained, rank=3), target_modules=["down_proj"])
    (check,) = surgery.check(moe, adapter, consumer=consumer).consumers
    assert {fault.remedy for fault in check.faults} == {"dialect"}
    surgery.check(moe, adapter, consumer=consumer, fix=tmp_path / "fixed")
    assert surgery.check(moe, tmp_path / "fixed", consumer=consumer).honoured
    got, want = peft_deltas(tmp_path / "fixed"), peft_deltas(adapter)
    assert len(got) == len(experts)
    assert_close({name: got[name] for name in want}, want)
    assert not any(value.any() for name, value in got.items() if name not in want)


def test_ia3_is_the_kind_of_lycoris_that_comfyui_has_no_class_for(tmp_path: Path) -> None:
    model = unet(tmp_path / "unet")
    name = next(key for key in load_file(model / "diffusion_pytorch_model.safetensors") if key.endswith("to_q.weight"))
    stem = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
    rows = load_file(model / "diffusion_pytorch_model.safetensors")[name].shape[0]
    tensors = {f"{stem}.weight": draw(1, rows, 1), f"{stem}.on_input": np.zeros((), np.bool_)}
    save_file(tensors, tmp_path / "ia3.safetensors")
    (check,) = surgery.check(model, tmp_path / "ia3.safetensors", consumer="comfyui").consumers
    assert (check.outcome, check.faults[0].what, check.faults[0].remedy) == ("ignored", "other kind", "lora")


@pytest.mark.parametrize("consumer", ["diffusers", "comfyui"])
def test_diffusion_programs_get_one_file_with_the_scale_inside(tmp_path: Path, consumer: str) -> None:
    network = unet(tmp_path / "unet")
    linear = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    convolution = "base_model.model.down_blocks.0.resnets.0.conv1"
    tensors = {
        f"{linear}.lora_A.weight": draw(1, 2, 4),
        f"{linear}.lora_B.weight": draw(2, 6, 2),
        f"{convolution}.lora_A.weight": draw(3, 2, 4, 3, 3),
        f"{convolution}.lora_B.weight": draw(4, 4, 2, 1, 1),
    }
    adapter = write_peft(tmp_path / "a", tensors, target_modules=["to_q", "conv1"], use_rslora=True)
    fixed = tmp_path / "style.safetensors"
    surgery.check(network, adapter, consumer=consumer, fix=fixed)
    assert surgery.check(network, fixed, consumer=consumer).honoured
    assert_close(
        {name.replace(".", "_"): value for name, value in peft_deltas(adapter).items()},
        {name.removeprefix("lora_unet_"): value for name, value in kohya_deltas(fixed).items()},
    )


def test_results_are_json_and_markdown_without_values_read_twice(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", _lora(1, MODULES), target_modules=TARGETS, use_rslora=True)
    result = surgery.check(base, adapter)
    document = json.loads(json.dumps(result.as_json()))
    assert [entry["name"] for entry in document["consumers"]] == list(consumers())
    assert document["consumers"][0]["outcome"] == "honoured"
    assert "| SGLang |" in result.summary().as_markdown()


def test_a_plugin_is_a_consumer(base: Path, tmp_path: Path) -> None:
    rules = dict.fromkeys(TRAITS, refused("nothing pleases it")) | {"LoRA of the head": honoured}
    critic = RuledConsumer("critic", "Critic", "2.1", "1", BUILT_IN[0].sources, rules)
    adapter = write_peft(tmp_path / "a", _lora(1, MODULES), target_modules=TARGETS)
    with installed(ENTRY_POINTS, "critic", critic):
        assert consumer_named("critic@2.0") == (critic, "2.0")
        (check,) = surgery.check(base, adapter, consumer="critic").consumers
    assert check.outcome == "refused"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"consumer": "vllm", "max_rank": 0}, "ranks up to 0"),
        ({"consumer": "vllm", "max_rank": -4}, "ranks up to -4"),
        ({"consumer": "vllm@"}, "'' is no version"),
        ({"consumer": "vllm", "merge_rest": "rest"}, "is for a rewriting"),
        ({"consumer": "vllm", "allow_loss": True}, "is for a rewriting"),
        ({"saved": "drop"}, "is for a rewriting"),
    ],
)
def test_options_without_a_meaning_are_refused(
    base: Path, tmp_path: Path, options: dict[str, object], said: str
) -> None:
    adapter = write_peft(tmp_path / "a", _lora(1, MODULES), target_modules=TARGETS)
    with pytest.raises(FitError, match=said):
        surgery.check(base, adapter, **options)
