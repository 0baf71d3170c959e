# SPDX-License-Identifier: Apache-2.0
"""Check: what consumers' rules say of adapters, and adapters that are rewritten until a consumer honours them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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
    GOLDEN,
    assert_close,
    draw,
    merged,
    mlx_deltas,
    peft_deltas,
    unet,
    write_base,
    write_peft,
)
from tests.support.decoder import DOWN, MODULES, TARGETS, lora_of


@pytest.mark.parametrize("consumer", BUILT_IN, ids=lambda one: one.name)
def test_every_consumer_has_a_rule_for_every_trait_and_names_its_sources(consumer: RuledConsumer) -> None:
    assert {"LoRA", *consumer.rules} == {*TRAITS}
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


def test_what_is_beyond_the_targets_of_one_program_is_within_anothers(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES), target_modules=TARGETS, exclude_modules=["q_proj"])
    found = {check.name: check.outcome for check in surgery.check(base, adapter).consumers}
    assert (found["peft"], found["transformers"], found["onnxruntime-genai"]) == ("ignored",) * 3
    assert (found["vllm"], found["llama.cpp"], found["olive"]) == ("honoured",) * 3


def test_convert_asks_for_one_of_a_format_and_a_program(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES), target_modules=TARGETS)
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


def test_another_format_is_converted(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES, q_proj=3), target_modules=TARGETS, use_rslora=True)
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
    adapter = write_peft(tmp_path / "a", lora_of(1, trained, rank=3), target_modules=["down_proj"])
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
    own = {"diffusers": "unet.", "comfyui": "lora_unet_"}[consumer]
    assert all(name.startswith(own) for name in load_file(fixed))
    assert_close(merged(network, fixed, tmp_path / "one"), merged(network, adapter, tmp_path / "other"))


_FLUX = {
    "img_in": (16, 4),
    "time_in.in_layer": (16, 8),
    "final_layer.linear": (4, 16),
    "final_layer.adaLN_modulation.1": (32, 16),
    "double_blocks.0.img_attn.qkv": (48, 16),
    "single_blocks.0.linear2": (16, 80),
}
_OF_FLUX = {name.replace(".", "_"): shape for name, shape in _FLUX.items()}


def _flux(folder: Path) -> Path:
    """In the release's names, with the layers that tell its family and the others' sizes."""
    others = {
        "txt_in": (16, 8),
        "time_in.out_layer": (16, 16),
        "vector_in.in_layer": (16, 8),
        "vector_in.out_layer": (16, 16),
        "double_blocks.0.img_mod.lin": (96, 16),
        "single_blocks.0.linear1": (112, 16),
        "single_blocks.0.modulation.lin": (48, 16),
    }
    shapes = {f"{name}.weight": shape for name, shape in {**_FLUX, **others}.items()}
    return write_base(folder, {**shapes, "single_blocks.0.norm.key_norm.scale": (8,)}, {})


def _kohya(file: Path, modules: Mapping[str, tuple[int, int]], axis: int | None = None) -> Path:
    tensors: dict[str, np.ndarray] = {}
    for number, (name, shape) in enumerate(modules.items()):
        tensors[f"lora_unet_{name}.lora_down.weight"] = draw(number, 2, shape[1])
        tensors[f"lora_unet_{name}.lora_up.weight"] = draw(number + 50, shape[0], 2)
        if axis is not None:
            lengths = abs(draw(number + 90, shape[axis]))
            tensors[f"lora_unet_{name}.dora_scale"] = lengths[:, None] if axis == 0 else lengths[None]
    save_file(tensors, file)
    return file


def test_diffusers_leaves_layers_of_kohyas_flux_files_out_and_gets_its_own_names(tmp_path: Path) -> None:
    base, file = _flux(tmp_path / "base"), _kohya(tmp_path / "a.safetensors", _OF_FLUX)
    (check,) = surgery.check(base, file, consumer="diffusers").consumers
    left_out = {fault.part.removeprefix("unet:").removesuffix(".weight") for fault in check.faults}
    assert left_out == {name for name in _OF_FLUX if "blocks" not in name}
    assert {(fault.outcome, fault.remedy) for fault in check.faults} == {("ignored", "rewrite")}
    surgery.check(base, file, consumer="diffusers", fix=tmp_path / "own.safetensors")
    own = load_file(tmp_path / "own.safetensors")
    assert all(name.startswith("transformer.") for name in own)
    assert "transformer.x_embedder.lora_A.weight" in own
    assert surgery.check(base, tmp_path / "own.safetensors", consumer="diffusers").honoured
    assert_close(
        merged(base, tmp_path / "own.safetensors", tmp_path / "one"), merged(base, file, tmp_path / "other"), 1e-6
    )


@pytest.mark.parametrize("kind", ["control", "xlabs", "fal"])
def test_diffusers_loads_three_kinds_of_flux_files_and_turns_a_layer_of_one(kind: str, tmp_path: Path) -> None:
    """tests/golden/flux has what diffusers made of them: all as they were trained, but norm_out of the control LoRA."""
    base, file = GOLDEN / "flux/base-diffusers.safetensors", GOLDEN / "flux" / kind / "adapter.safetensors"
    (check,) = surgery.check(base, file, consumer="diffusers").consumers
    turned = ["denoiser:final_layer.adaLN_modulation.1.weight"] if kind == "control" else []
    assert [fault.part for fault in check.faults] == turned
    if turned:
        surgery.check(base, file, consumer="diffusers", fix=tmp_path / "own.safetensors")
        assert surgery.check(base, tmp_path / "own.safetensors", consumer="diffusers").honoured


def test_diffusers_refuses_other_files_with_the_modules_names_alone(tmp_path: Path) -> None:
    stem = "single_blocks.0.linear2"
    save_file(
        {f"{stem}.lora_A.weight": draw(1, 2, 80), f"{stem}.lora_B.weight": draw(2, 16, 2)}, tmp_path / "a.safetensors"
    )
    (check,) = surgery.check(
        GOLDEN / "flux/base-bfl.safetensors", tmp_path / "a.safetensors", consumer="diffusers"
    ).consumers
    assert [(fault.part, fault.outcome) for fault in check.faults] == [("a.safetensors", "refused")]


def test_diffusers_filters_dora_scale_out_of_every_file(tmp_path: Path) -> None:
    """Of rows they are written as PEFT spells them; of columns, and beside a LoRA, a LoRA stands for them."""
    base, file = _flux(tmp_path / "base"), tmp_path / "a.safetensors"
    one = {"single_blocks_0_linear2": _OF_FLUX["single_blocks_0_linear2"]}
    for axis, remedy in ((0, "rewrite"), (1, "lora")):
        (check,) = surgery.check(base, _kohya(file, one, axis), consumer="diffusers").consumers
        assert [(fault.what, fault.outcome, fault.remedy) for fault in check.faults] == [("DoRA", "ignored", remedy)]
        fixed, options = tmp_path / f"{axis}.safetensors", {"rank": 16} if axis else {}
        surgery.check(base, file, consumer="diffusers", fix=fixed, **options)
        assert not any("dora_scale" in name for name in load_file(fixed))
        assert any("lora_magnitude_vector" in name for name in load_file(fixed)) == (axis == 0)
        assert_close(merged(base, fixed, tmp_path / f"m{axis}"), merged(base, file, tmp_path / f"w{axis}"), 1e-5)
    dotted = tmp_path / "dotted.safetensors"
    stem = "transformer.single_transformer_blocks.0.proj_out"
    own = {"lora_A.weight": draw(1, 2, 80), "lora_B.weight": draw(2, 16, 2), "dora_scale": abs(draw(3, 16, 1))}
    save_file({f"{stem}.{leaf}": value for leaf, value in own.items()}, dotted)
    surgery.check(base, dotted, consumer="diffusers", fix=tmp_path / "spelt.safetensors")
    assert f"{stem}.lora_magnitude_vector" in load_file(tmp_path / "spelt.safetensors")


def test_pipelines_without_a_converter_find_nothing_in_kohyas_files(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"joint_blocks.0.x_block.attn.proj.weight": (8, 8)}, {})
    file = _kohya(tmp_path / "a.safetensors", {"joint_blocks_0_x_block_attn_proj": (8, 8)})
    (check,) = surgery.check(base, file, consumer="diffusers").consumers
    assert [(fault.outcome, fault.remedy) for fault in check.faults] == [("ignored", "rewrite")]


def test_results_are_json_and_markdown_without_values_read_twice(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES), target_modules=TARGETS, use_rslora=True)
    result = surgery.check(base, adapter)
    document = json.loads(json.dumps(result.as_json()))
    assert [entry["name"] for entry in document["consumers"]] == list(consumers())
    assert document["consumers"][0]["outcome"] == "honoured"
    assert "| SGLang |" in result.summary().as_markdown()


def test_a_plugin_is_a_consumer(base: Path, tmp_path: Path) -> None:
    rules = dict.fromkeys(TRAITS, refused("nothing pleases it")) | {"LoRA of the head": honoured}
    critic = RuledConsumer("critic", "Critic", "2.1", "1", BUILT_IN[0].sources, rules)
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES), target_modules=TARGETS)
    with installed(ENTRY_POINTS, "critic", critic):
        assert consumer_named("critic@2.0") == (critic, "2.0")
        (check,) = surgery.check(base, adapter, consumer="critic").consumers
    assert check.outcome == "refused"


def test_modules_left_out_by_choice_are_in_the_account(base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", lora_of(1, MODULES), target_modules=TARGETS)
    made = surgery.convert(adapter, consumer="vllm", base=base, without="*down_proj", output=tmp_path / "b")
    gone = [entry.site for entry in made.entries if entry.detail == "left out by choice"]
    assert gone
    assert all(site.endswith("down_proj.weight") for site in gone)
    assert {
        entry["site"] for entry in json.loads((tmp_path / "b" / "surgery_manifest.json").read_text())["entries"]
    } >= {*gone}


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
