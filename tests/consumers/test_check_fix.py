# SPDX-License-Identifier: Apache-2.0
"""Adapters of language models that are rewritten until a program honours them, by check and by convert."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import surgery
from tests.support.adapter_files import assert_close, mlx_deltas, peft_deltas, write_base, write_peft
from tests.support.decoder import MODULES, TARGETS, lora_of
from tests.support.kit import ROOT


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
    tensors = {names(name): value for name, value in lora_of(1, MODULES).items()}
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
        ("peft", {"target_modules": None}, "beyond the targets"),  # in a Llama PEFT chooses q_proj and v_proj
        ("peft", {"target_modules": 7}, "unusable targets"),
        ("peft", {"target_modules": ["nothing"]}, "unusable targets"),
        ("peft", {"target_modules": TARGETS, "exclude_modules": 7}, "unusable targets"),
        ("peft", {"target_modules": TARGETS, "layers_pattern": "layers"}, "unusable targets"),
        ("peft", {"target_modules": ".*_proj", "layers_to_transform": [0]}, "unusable targets"),
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
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES), **fields)
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
    meant = peft_deltas(write_peft(tmp_path / "whole", lora_of(1, MODULES), target_modules=TARGETS, lora_alpha=8))
    for name, delta in meant.items():
        np.testing.assert_allclose(peft_deltas(tmp_path / "fixed")[name], delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("consumer", ["sglang", "edge-llm"])
def test_another_format_is_brought_to_one_rank_and_beside_its_partners(
    base: Path, tmp_path: Path, consumer: str
) -> None:
    ranks = {"down_proj": 3}
    source = write_peft(tmp_path / "a", lora_of(1, MODULES, **ranks), target_modules=TARGETS, rank_pattern=ranks)
    surgery.convert(source, "bare", output=tmp_path / "bare.safetensors", base=base)
    surgery.convert(tmp_path / "bare.safetensors", consumer=consumer, output=tmp_path / "fixed", base=base)
    assert surgery.check(base, tmp_path / "fixed", consumer=consumer).honoured
    written = peft_deltas(tmp_path / "fixed")
    for name, delta in peft_deltas(source).items():
        np.testing.assert_allclose(written[name], delta, rtol=1e-5, atol=1e-6)


def test_convert_asks_for_one_of_a_format_and_a_program(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES), target_modules=TARGETS)
    with pytest.raises(surgery.FitError, match="a program decides about format"):
        surgery.convert(adapter, "peft", consumer="vllm", base=base, output=tmp_path / "never")
    with pytest.raises(surgery.FitError, match="look at the base too"):
        surgery.convert(adapter, consumer="vllm", output=tmp_path / "never")
    dry = surgery.convert(adapter, consumer="sglang", base=base, dry_run=True)
    assert (dry.output, dry.consumer) == (None, "sglang")


def test_another_format_is_converted(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES, q_proj=3), target_modules=TARGETS, use_rslora=True)
    (check,) = surgery.check(base, adapter, consumer="mlx-lm").consumers
    assert [fault.what for fault in check.faults] == ["format"]
    surgery.check(base, adapter, consumer="mlx-lm", fix=tmp_path / "fixed")
    assert_close(mlx_deltas(tmp_path / "fixed"), peft_deltas(adapter))
    (back,) = surgery.check(base, tmp_path / "fixed", consumer="vllm").consumers
    assert [fault.why for fault in back.faults] == ["it loads peft; this is mlx"]


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
    adapter = write_peft(tmp_path / "a", lora_of(1, trained, rank=3), target_modules=["down_proj"])
    (check,) = surgery.check(moe, adapter, consumer=consumer).consumers
    assert {fault.remedy for fault in check.faults} == {"dialect"}
    surgery.check(moe, adapter, consumer=consumer, fix=tmp_path / "fixed")
    assert surgery.check(moe, tmp_path / "fixed", consumer=consumer).honoured
    got, want = peft_deltas(tmp_path / "fixed"), peft_deltas(adapter)
    assert len(got) == len(experts)
    assert_close({name: got[name] for name in want}, want)
    assert not any(value.any() for name, value in got.items() if name not in want)


def test_modules_left_out_by_choice_are_in_the_account(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES), target_modules=TARGETS)
    made = surgery.convert(adapter, consumer="vllm", base=base, without="*down_proj", output=tmp_path / "b")
    gone = [entry.site for entry in made.entries if entry.detail == "left out by choice"]
    assert gone
    assert all(site.endswith("down_proj.weight") for site in gone)
    assert {
        entry["site"] for entry in json.loads((tmp_path / "b" / "surgery_manifest.json").read_text())["entries"]
    } >= {*gone}


def test_llama_cpp_loads_the_gguf_that_is_written_for_it(tmp_path: Path) -> None:
    """Its converter reads PEFT folders, its runtime what that makes of them."""
    base, lora, file = ROOT / "examples/base", ROOT / "examples/lora", tmp_path / "a.gguf"
    surgery.convert(lora, "gguf", base=base, output=file)
    (check,) = surgery.check(base, file, consumer="llama.cpp").consumers
    assert [verdict.outcome for verdict in check.verdicts] == ["honoured"] * 42
    (other,) = surgery.check(base, file, consumer="mlx-lm").consumers
    assert [fault.why for fault in other.faults] == ["it loads mlx; this is gguf"]
    with pytest.raises(surgery.UsageError, match=r"a folder is written for llama\.cpp, of which a GGUF is made"):
        surgery.convert(lora, consumer="llama.cpp", base=base, output=tmp_path / "b.gguf")


def test_a_program_that_refuses_the_file_refuses_every_part_of_it() -> None:
    """One refusal of the format beside 42 parts that another program honours would draw as nearly nothing."""
    result = surgery.check(ROOT / "examples/base", ROOT / "examples/lora")
    parts, chart = result.summary().sections[1:3]
    rows = {row[0]: row for row in parts.rows}
    assert rows["mlx-lm"][2:4] == ("refused", "all refused")
    assert {row[0]: row[1:] for row in chart.table.rows}["mlx-lm"] == (0, 0, 0, 42)
