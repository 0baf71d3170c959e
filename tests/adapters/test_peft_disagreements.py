# SPDX-License-Identifier: Apache-2.0
"""A PEFT configuration that its tensors, or the base, do not bear out is told by name, or refused where the rank is open."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import surgery
from surgery_formats.errors import FitError, MalformedError
from tests.oracles import models, peft_oracle
from tests.support.adapter_files import Arrays, draw, write_base, write_peft

ROOT = "base_model.model."
SHAPES = {
    "model.embed_tokens.weight": (12, 6),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in {
            "self_attn.q_proj.weight": (8, 6),
            "self_attn.q_proj.bias": (8,),
            "self_attn.k_proj.weight": (4, 6),
            "mlp.down_proj.weight": (6, 10),
            "input_layernorm.weight": (6,),
        }.items()
    },
    "model.norm.weight": (6,),
    "lm_head.weight": (12, 6),
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 12,
    "tie_word_embeddings": False,
}


def factors(layers: tuple[int, ...] = (0, 1), rank: int = 2) -> Arrays:
    """A LoRA on every q_proj."""
    tensors = {}
    for layer in layers:
        stem = f"{ROOT}model.layers.{layer}.self_attn.q_proj"
        tensors |= {
            f"{stem}.lora_A.weight": draw(layer, rank, 6),
            f"{stem}.lora_B.weight": draw(layer + 9, 8, rank),
        }
    return tensors


def base_of(folder: Path) -> Path:
    return write_base(folder / "base", SHAPES, CONFIG)


def said(folder: Path, tensors: Arrays, **config: Any) -> tuple[str, str]:
    """What inspect says of an adapter, and what a merge says besides."""
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    adapter = write_peft(
        folder / "adapter", tensors, **{key: value for key, value in fields.items() if value is not ...}
    )
    traps = surgery.inspect(adapter).traps  # type: ignore[union-attr]
    alone = "\n".join(trap for trap in traps if "differs from module to module" not in trap)
    merged = "\n".join(surgery.merge(base_of(folder), adapter, dry_run=True).warnings)
    assert all(line in merged for line in alone.splitlines())
    return alone, merged


def test_what_agrees_is_not_spoken_of(tmp_path: Path) -> None:
    assert said(tmp_path, factors()) == ("", "")


STATED: dict[str, tuple[str, dict[str, Any]]] = {
    "HiRA": ("HiraConfig", {"r": 4}),
    "DeLoRA": ("DeloraConfig", {"r": 4}),
    "GraLoRA": ("GraloraConfig", {"r": 4, "gralora_k": 2}),
    "RandLoRA": ("RandLoraConfig", {"r": 4}),
    "VB-LoRA": ("VBLoRAConfig", {"r": 4, "num_vectors": 11, "vector_length": 8}),
    "VB-LoRA of the greatest": (
        "VBLoRAConfig",
        {"r": 4, "num_vectors": 11, "vector_length": 8, "save_only_topk_weights": True},
    ),
    "VeRA": ("VeraConfig", {"r": 4}),
    "PVeRA": ("PveraConfig", {"r": 4}),
    "HRA": ("HRAConfig", {"r": 4}),
    "MiSS": ("MissConfig", {"r": 4}),
    "BAT": ("MissConfig", {"r": 4, "init_weights": "bat"}),
    "PEANuT": ("PeanutConfig", {"r": 4}),
    "GLoRA": ("GloraConfig", {"r": 4}),
    "Uni-LoRA": ("UniLoraConfig", {"r": 4, "save_indices": True}),
    "DEFT": ("DeftConfig", {"r": 4}),
    "PaRa": ("DeftConfig", {"r": 4, "para": True, "alpha": 3}),
    "TinyLoRA": ("TinyLoraConfig", {"r": 4, "u": 5}),
    "Lily": ("LilyConfig", {"r": 4}),
    "SuperTuning": ("SupertuningConfig", {"r": 4, "lora_alpha": 8}),
}


def test_a_rank_that_is_not_the_configured_one_is_refused(tmp_path: Path) -> None:
    """The scale of alpha 4 would be 2 by the file and 0.5 by the configuration."""
    base, adapter = (
        base_of(tmp_path),
        write_peft(tmp_path / "a", factors(), peft_type="LORA", r=8, lora_alpha=4, target_modules=["q_proj"]),
    )
    for verb in (lambda: surgery.merge(base, adapter, dry_run=True), lambda: surgery.inspect(adapter)):
        with pytest.raises(MalformedError, match=r"rank 2, but r says 8.*q_proj|q_proj.*rank 2, but r says 8"):
            verb()


@pytest.mark.parametrize(
    ("patterns", "refused"),
    [
        ({"q_proj": 2}, ""),
        ({r"layers\.1\..*": 2}, "r says 8"),
        ({"q_proj": 3}, r"rank_pattern\['q_proj'\] says 3"),
        ({r".*\.layers\.(0|1)\._orig_mod\.self_attn\.q_proj": 2}, ""),  # written of a compiled model
    ],
)
def test_a_pattern_is_a_reason_for_another_rank(patterns: dict[str, int], refused: str, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "a", factors(), peft_type="LORA", r=8, lora_alpha=4, rank_pattern=patterns)
    if not refused:
        assert surgery.merge(base_of(tmp_path), adapter, dry_run=True).ledger.classes["updated"] == 2
        return
    with pytest.raises(MalformedError, match=refused):
        surgery.inspect(adapter)


def test_loha_has_the_configured_rank_too(tmp_path: Path) -> None:
    stem = f"{ROOT}model.layers.0.self_attn.q_proj"
    pair = {"a": (8, 2), "b": (2, 6)}
    tensors = {f"{stem}.hada_w{i}_{side}": draw(i, *shape) for i in (1, 2) for side, shape in pair.items()}
    adapter = write_peft(tmp_path / "a", tensors, peft_type="LOHA", r=4, alpha=4, target_modules=["q_proj"])
    with pytest.raises(MalformedError, match="rank 2, but r says 4"):
        surgery.inspect(adapter)


@pytest.mark.parametrize("name", STATED)
def test_every_kind_has_the_rank_that_peft_would_build(name: str, tmp_path: Path) -> None:
    """PEFT makes factors of r, which the file's do not fit."""
    kind, fields = STATED[name]
    base = models.build_base("llama", tmp_path / "base")
    peft_oracle.train("llama", base, kind, {"target_modules": ["q_proj"], **fields}, tmp_path / "a", seed=1)
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    surgery.inspect(tmp_path / "a")
    file.write_text(json.dumps(config | {"r": 16}))
    with pytest.raises(MalformedError, match="rank 4, but r says 16: which of them was trained"):
        surgery.inspect(tmp_path / "a")
    with peft_oracle.quiet(), pytest.raises((RuntimeError, ValueError)):
        peft_oracle.attach("llama", base, [(tmp_path / "a", 1.0)], "float32")


@pytest.mark.parametrize("kind", ["FourierFTConfig", "WaveFTConfig"])
def test_coefficients_are_as_many_as_stated(kind: str, tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")
    fields = {"target_modules": ["q_proj"], "n_frequency": 20}
    peft_oracle.train("llama", base, kind, fields, tmp_path / "a", seed=1)
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    for changed, refused in (
        ({}, ""),
        ({"n_frequency": 30, "n_frequency_pattern": {"q_proj": 20}}, ""),
        ({"n_frequency": 30}, "20 coefficients, but n_frequency says 30"),
        ({"n_frequency_pattern": {"q_proj": 30}}, r"20 coefficients, but n_frequency_pattern\['q_proj'\] says 30"),
    ):
        file.write_text(json.dumps(config | changed))
        with pytest.raises(MalformedError, match=refused) if refused else nullcontext():
            surgery.inspect(tmp_path / "a")
        with peft_oracle.quiet(), pytest.raises((RuntimeError, ValueError)) if refused else nullcontext():
            peft_oracle.attach("llama", base, [(tmp_path / "a", 1.0)], "float32")


@pytest.mark.parametrize(("stated", "says"), [(20, 20), (0.25, 8), (None, 16)])
def test_osf_keeps_as_many_directions_as_it_says(stated: float | None, says: int, tmp_path: Path) -> None:
    """A number of them, a share of the weight's smaller size, or half."""
    base, fields = models.build_base("llama", tmp_path / "base"), {"target_modules": ["q_proj"]}
    peft_oracle.train("llama", base, "OSFConfig", {**fields, "effective_rank": stated}, tmp_path / "good", seed=1)
    surgery.inspect(tmp_path / "good")
    peft_oracle.train("llama", base, "OSFConfig", {**fields, "effective_rank": 11}, tmp_path / "bad", seed=1)
    file = tmp_path / "bad" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"effective_rank": stated}))
    with pytest.raises(MalformedError, match=f"11 of 32 singular values stay, but 'effective_rank' says {says}"):
        surgery.inspect(tmp_path / "bad")
    with peft_oracle.quiet(), pytest.raises(RuntimeError):
        peft_oracle.attach("llama", base, [(tmp_path / "bad", 1.0)], "float32")


@pytest.mark.parametrize(
    ("name", "fields", "refused"),
    [
        ("HiRA", {"r": 16, "rank_pattern": {"q_proj": 4}}, ""),
        ("HiRA", {"rank_pattern": {"q_proj": 3}}, ""),  # PEFT 0.21 does not look at its pattern
        ("HiRA", {"r": 16, "rank_pattern": {"q_proj": 3}}, r"rank_pattern\['q_proj'\] says 3"),
        ("DeLoRA", {"r": 16, "rank_pattern": {"q_proj": 4}}, ""),
        ("DeLoRA", {"rank_pattern": {"q_proj": 3}}, r"rank_pattern\['q_proj'\] says 3"),
    ],
)
def test_patterns_of_other_kinds(name: str, fields: dict[str, Any], refused: str, tmp_path: Path) -> None:
    kind, made = STATED[name]
    base = models.build_base("llama", tmp_path / "base")
    peft_oracle.train("llama", base, kind, {"target_modules": ["q_proj"], **made}, tmp_path / "a", seed=1)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(MalformedError, match=refused) if refused else nullcontext():
        surgery.inspect(tmp_path / "a")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"r": ...}, "no 'r'"),
        ({"lora_alpha": ...}, "no lora_alpha in its configuration: PEFT's default, 8, is used"),
        ({"lora_alpha": -4}, r"'lora_alpha' is negative \(-4\)"),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": -1}}, r"'alpha_pattern' is negative \(layers.1"),
        ({"target_modules": ["q_proj", "v_proj"]}, "target_modules names 'v_proj', for which the file has no tensors"),
        ({"target_modules": ["layers.1.self_attn.q_proj"]}, "'model.layers.0.self_attn.q_proj': beyond the targets"),
        ({"target_modules": r".*layers\.0.*q_proj"}, "'model.layers.1.self_attn.q_proj': beyond the targets"),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, "'model.layers.0.self_attn.q_proj': beyond the targets"),
        ({"layers_to_transform": [0]}, "'model.layers.1.self_attn.q_proj': beyond the targets"),
        ({"layers_to_transform": [0, 1, 5]}, "layers_to_transform names '5'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names 'lm_head', which the file lacks"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_the_file_alone_shows_it(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    alone, _ = said(tmp_path, factors(), **config)
    assert re.search(says, alone), alone
    assert len(alone.splitlines()) == 1


@pytest.mark.parametrize("alpha", [0, -4])
def test_adalora_subtracts_nothing(alpha: int, tmp_path: Path) -> None:
    """PEFT has the initial rank in the place of an alpha that is not positive."""
    base, fields = models.build_base("llama", tmp_path / "base"), {"init_r": 4, "total_step": 9, "lora_alpha": alpha}
    peft_oracle.train("llama", base, "AdaLoraConfig", {"target_modules": ["q_proj"], **fields}, tmp_path / "a", seed=1)
    (trap,) = surgery.inspect(tmp_path / "a").traps  # type: ignore[union-attr]
    assert trap == f"lora_alpha is not positive ({alpha}): PEFT takes init_r in its place"


@pytest.mark.parametrize(
    ("config", "layers", "says"),
    [
        (
            {"bias": "lora_only"},
            (0, 1),
            "bias is 'lora_only', but the file lacks 'model.layers.0.self_attn.q_proj.bias'",
        ),
        ({"bias": "all"}, (0, 1), "bias is 'all', but the file lacks 'model.layers.0.self_attn.q_proj.bias'"),
        ({}, (1,), "target_modules names 'model.layers.0.self_attn.q_proj', for which the file has nothing"),
        ({"fan_in_fan_out": True}, (0, 1), "fan_in_fan_out is true, but the base stores linear layers as (out, in)"),
    ],
    ids=["bias-of-targets", "every-bias", "layer", "orientation"],
)
def test_the_base_shows_it(config: dict[str, Any], layers: tuple[int, ...], says: str, tmp_path: Path) -> None:
    alone, merged = said(tmp_path, factors(layers), **config)
    assert alone == ""
    assert says in merged
    assert len(merged.splitlines()) == 1


def test_a_saved_module_of_which_half_is_there(tmp_path: Path) -> None:
    norm = {f"{ROOT}model.layers.0.input_layernorm.weight": draw(3, 6)}
    _, merged = said(tmp_path, factors() | norm, modules_to_save=["layernorm"])
    assert "modules_to_save names 'model.layers.1.input_layernorm.weight', which the file lacks" in merged


def test_heads_of_which_a_model_has_one_are_no_promise(tmp_path: Path) -> None:
    score = {f"{ROOT}score.weight": draw(3, 2, 6)}
    saved = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    assert said(tmp_path, factors() | score, **saved) == ("", "")


@pytest.mark.parametrize(
    "change",
    [
        lambda shape: (),
        lambda shape: shape[:1],
        lambda shape: (*shape, 1),
        lambda shape: (0,),
        lambda shape: (0, *shape[1:]),
    ],
    ids=["no-dimension", "one", "three", "nothing", "no-row"],
)
@pytest.mark.parametrize("side", ["lora_A", "lora_B", "both"])
def test_a_factor_of_another_shape_is_refused_by_name(
    change: Callable[[tuple[int, ...]], tuple[int, ...]], side: str, tmp_path: Path
) -> None:
    tensors = {
        key: np.resize(value, change(value.shape)) if side in key or side == "both" else value
        for key, value in factors((0,)).items()
    }
    adapter = write_peft(tmp_path / "a", tensors, peft_type="LORA", r=2, lora_alpha=4, target_modules=["q_proj"])
    with pytest.raises((FitError, MalformedError)) as error:
        surgery.merge(base_of(tmp_path), adapter, dry_run=True)
    assert error.value.tensor
    assert "q_proj" in error.value.tensor


def test_factors_that_zero3_did_not_gather_are_named_as_such(tmp_path: Path) -> None:
    tensors = {key: np.zeros(0, np.float32) for key in factors()}
    adapter = write_peft(tmp_path / "a", tensors, peft_type="LORA", r=2, lora_alpha=4)
    with pytest.raises(MalformedError, match=r"shape \[0\]") as error:
        surgery.inspect(adapter)
    assert "ZeRO-3" in str(error.value.hint)
    assert "zero_to_fp32" in str(error.value.hint)


def test_saved_modules_that_zero3_did_not_gather_are_named_as_such(tmp_path: Path) -> None:
    head = {f"{ROOT}lm_head.weight": np.zeros(0, np.float32)}
    adapter = write_peft(
        tmp_path / "a", factors() | head, peft_type="LORA", r=2, lora_alpha=4, modules_to_save=["lm_head"]
    )
    traps = "\n".join(surgery.inspect(adapter).traps)  # type: ignore[union-attr]
    assert "lm_head.weight: shape [0]. ZeRO-3" in traps
    with pytest.raises(FitError, match=r"shape \[0\], but \[12, 6\] in the base") as error:
        surgery.merge(base_of(tmp_path), adapter, dry_run=True)
    assert "zero_to_fp32" in str(error.value.hint)


PEFT = ROOT.rstrip(".")
WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled-inside": lambda key: key.replace(PEFT, f"{PEFT}._orig_mod"),
    "compiled-blocks": lambda key: key.replace(".self_attn", "._orig_mod.self_attn"),
    "checkpointed": lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "sharded": lambda key: key.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "several": lambda key: key.replace(".self_attn", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn"),
    "parallel": lambda key: f"module.{key}",
    "parallel-inside": lambda key: key.replace(PEFT, f"{PEFT}.module"),
    "in-a-container": lambda key: f"thinker.{key}",
    "doubled": lambda key: f"{ROOT}{key}",
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_segments_of_wrappers_are_removed_with_a_note(name: str, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    base, plain = base_of(tmp_path), write_peft(tmp_path / "plain", factors(), **config)
    wrapped = write_peft(
        tmp_path / "wrapped", {WRAPPED[name](key): value for key, value in factors().items()}, **config
    )
    surgery.merge(base, plain, output=tmp_path / "one")
    result = surgery.merge(base, wrapped, output=tmp_path / "other")
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "other"))
    assert all(np.array_equal(one[key], other[key]) for key in one)
    assert len(result.warnings) == 1
    assert "of programs that wrapped the model in training" in result.warnings[0]


def test_a_module_that_is_there_twice_under_a_wrapper_is_refused(tmp_path: Path) -> None:
    twice = factors() | {f"_orig_mod.{key}": value for key, value in factors().items()}
    with pytest.raises(MalformedError, match="twice"):
        surgery.inspect(write_peft(tmp_path / "a", twice))


@pytest.mark.parametrize("tied", [True, False])
def test_token_rows_beside_a_tied_head_with_a_bias_are_told(tmp_path: Path, tied: bool) -> None:
    """PEFT's wrapper of such a head leaves the bias out, so that the attached logits lack what the merged have."""
    base = models.build_base("bert_mlm", tmp_path / "base", tie_word_embeddings=tied)
    config = {"target_modules": ["query"], "r": 2, "trainable_token_indices": [3, 5]}
    trained = peft_oracle.train("bert_mlm", base, "LoraConfig", config, tmp_path / "adapter", seed=1)
    result = surgery.merge(base, [tmp_path / "adapter"], output=tmp_path / "merged")
    merged = models.logits_of("bert_mlm", tmp_path / "merged")
    bias = load_file(base / "model.safetensors")["cls.predictions.bias"]
    told = [text for text in result.warnings if "without 'cls.predictions.bias'" in text]
    assert len(told) == tied
    np.testing.assert_allclose(merged.numpy() - trained.numpy(), np.broadcast_to(bias * tied, merged.shape), atol=1e-5)


@pytest.mark.parametrize(
    ("task", "types", "told"), [("QUESTION_ANS", 2, True), ("QUESTION_ANS", 1, False), ("TOKEN_CLS", 2, False)]
)
def test_token_types_that_peft_did_not_train_with_are_named(task: str, types: int, told: bool, tmp_path: Path) -> None:
    """See findings/peft_questions_lose_segments.sh: its model for questions calls the base without them."""
    at = "bert.encoder.layer.0.attention.self.query"
    shapes = {"bert.embeddings.token_type_embeddings.weight": (types, 6), f"{at}.weight": (6, 6)}
    base = write_base(tmp_path / "base", shapes, {"model_type": "bert", "architectures": ["BertForQuestionAnswering"]})
    tensors = {f"{ROOT}{at}.lora_A.weight": draw(1, 2, 6), f"{ROOT}{at}.lora_B.weight": draw(2, 6, 2)}
    adapter = write_peft(
        tmp_path / "a", tensors, peft_type="LORA", r=2, lora_alpha=4, target_modules=["query"], task_type=task
    )
    warnings = surgery.merge(base, adapter, dry_run=True).warnings
    assert [("token_type_ids" in warning) for warning in warnings] == [True] * told
