# SPDX-License-Identifier: Apache-2.0
"""Check: what the rules of programs say of an adapter, and how the result says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

import surgery
from surgery.consumers.consumer import RuledConsumer
from surgery.consumers.registry import BUILT_IN, ENTRY_POINTS, consumer_named, consumers
from surgery.consumers.rules import honoured, refused
from surgery.consumers.traits import Trait
from surgery_formats.errors import FitError
from surgery_formats.testing.plugins import installed
from tests.support.adapter_files import draw, write_peft
from tests.support.decoder import DOWN, MODULES, TARGETS, lora_of


@pytest.mark.parametrize("consumer", BUILT_IN, ids=lambda one: one.name)
def test_every_consumer_has_a_rule_for_every_trait_and_names_its_sources(consumer: RuledConsumer) -> None:
    assert {"LoRA", *consumer.rules} == {*get_args(Trait)}
    assert consumer.sources
    assert all(source.version and source.file for source in consumer.sources)
    for rules in (consumer.rules, *(changed for _, changed in consumer.since)):
        assert all(rule.why for rule in rules.values() if rule.outcome != "honoured")


def test_a_plain_lora_is_honoured_by_all_that_read_its_format(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES), target_modules=TARGETS)
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
    adapter = write_peft(tmp_path / "a", lora_of(1, {DOWN: (6, 8)}), target_modules=["down_proj"], **config)
    (check,) = surgery.check(base, adapter, consumer=consumer).consumers
    (wrong,) = check.faults
    assert check.outcome == wrong.outcome == "scaled wrongly"
    assert wrong.factor == pytest.approx(factor)


def test_an_alpha_of_zero_is_a_scale_of_one_in_llama_cpp(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", lora_of(1, {DOWN: (6, 8)}), target_modules=["down_proj"], lora_alpha=0)
    (check,) = surgery.check(base, adapter, consumer="llama.cpp").consumers
    assert check.outcome == "scaled wrongly"


def test_versions_have_their_own_rules(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES), target_modules=TARGETS, alpha_pattern={"down_proj": 1})
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


def test_what_is_beyond_the_targets_of_one_program_is_within_anothers(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES), target_modules=TARGETS, exclude_modules=["q_proj"])
    found = {check.name: check.outcome for check in surgery.check(base, adapter).consumers}
    assert (found["peft"], found["transformers"], found["onnxruntime-genai"]) == ("ignored",) * 3
    assert (found["vllm"], found["llama.cpp"], found["olive"]) == ("honoured",) * 3


def test_parts_alike_are_one_row_and_all_of_them_if_asked(base: Path, tmp_path: Path) -> None:
    leaves = {"q_proj": 6, "k_proj": 4}
    modules = {f"{layer}.self_attn.{name}": (out, 6) for layer in range(2) for name, out in leaves.items()}
    adapter = write_peft(
        tmp_path / "a",
        lora_of(1, modules),
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


def test_results_are_json_and_markdown_without_values_read_twice(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES), target_modules=TARGETS, use_rslora=True)
    result = surgery.check(base, adapter)
    document = json.loads(json.dumps(result.as_json()))
    assert [entry["name"] for entry in document["consumers"]] == list(consumers())
    assert document["consumers"][0]["outcome"] == "honoured"
    assert "| SGLang |" in result.summary().as_markdown()


def test_a_plugin_is_a_consumer(base: Path, tmp_path: Path) -> None:
    rules = dict.fromkeys(get_args(Trait), refused("nothing pleases it")) | {"LoRA of the head": honoured}
    critic = RuledConsumer("critic", "Critic", "2.1", "1", BUILT_IN[0].sources, rules)
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES), target_modules=TARGETS)
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
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES), target_modules=TARGETS)
    with pytest.raises(FitError, match=said):
        surgery.check(base, adapter, **options)
