# SPDX-License-Identifier: Apache-2.0
"""Faults in adapters of PEFT's kinds beside LoRA, and in soft prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from tests.oracles import disk, models, peft_oracle
from tests.oracles.cases import Config, Tensors
from tests.oracles.faults import fault

__all__: list[str] = []

_TRAINED: Mapping[str, dict[str, Any]] = {
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LoHa": {"target_modules": ["q_proj", "up_proj"], "r": 4},
    "LoKr": {"target_modules": ["q_proj", "up_proj"], "r": 2, "decompose_both": True, "decompose_factor": 8},
    "OFT": {"target_modules": ["q_proj", "down_proj"], "oft_block_size": 8},
    "Vera": {"target_modules": ["q_proj", "down_proj"], "r": 4},
}


def _kind(
    kind: str, name: str, codes: int | tuple[int, ...], change: Callable[[Config, Tensors], Any], *mentions: str
) -> None:
    """A fault made by changing the config and the tensors of a sound adapter of `kind` in place."""

    @fault(f"{kind.lower()}-{name}", codes, *mentions)
    def _make(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
        peft_oracle.train("llama", base, f"{kind}Config", _TRAINED[kind], folder / "sound", seed=3)
        config, tensors = disk.adapter(folder / "sound")
        change(config, tensors)
        return base, disk.write_adapter(folder / "bad", config, tensors)


def _edit(tensors: Tensors, suffix: str, change: Callable[[Tensor], Tensor]) -> None:
    """Replace the first tensor whose name ends with ``suffix``."""
    key = next(key for key in sorted(tensors) if key.endswith(suffix))
    tensors[key] = change(tensors[key]).contiguous()


def _drop(tensors: Tensors, suffix: str) -> None:
    del tensors[next(key for key in sorted(tensors) if key.endswith(suffix))]


def _spoil(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return spoil


# --- every kind: no number, a switch nobody knows, a tensor nobody knows, another base ----------------------------------------
for _name, _factor in (
    ("IA3", "down_proj.ia3_l"),
    ("LoHa", "q_proj.hada_w1_b"),
    ("LoKr", "up_proj.lokr_w2_a"),
    ("OFT", "q_proj.oft_R.weight"),
    ("Vera", "q_proj.vera_lambda_d"),
):
    _leaf = _factor.partition(".")[2]
    _kind(_name, "nan", (3, 4), lambda c, t, f=_factor: _edit(t, f, _spoil(math.nan)), _factor)
    _kind(_name, "inf", (3, 4), lambda c, t, f=_factor: _edit(t, f, _spoil(math.inf)), _factor)
    _kind(_name, "unknown-switch", (4, 3), lambda c, t: c.update(use_frobnicate=True), "use_frobnicate")
    _kind(_name, "is-integers", (3, 4), lambda c, t, f=_factor: _edit(t, f, lambda v: (9 * v).int()), _factor)
    _kind(
        _name,
        "unknown-tensor",
        (3, 4),
        lambda c, t, f=_factor: t.update(
            {next(k for k in t if k.endswith(f)).replace(f, "q_proj.frob"): torch.ones(2)}
        ),
        "q_proj.frob",
    )
    _kind(
        _name,
        "layer-beyond-the-base",
        4,
        lambda c, t: t.update({k.replace("layers.1", "layers.9"): v for k, v in list(t.items()) if "layers.1" in k}),
        "layers.9",
    )
    _kind(_name, "lora-among-it", (3, 4), lambda c, t: t.update({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}))

# --- (IA)^3 -------------------------------------------------------------------------------------------------------------------
_kind("IA3", "too-long", 4, lambda c, t: _edit(t, "q_proj.ia3_l", lambda v: torch.ones(33, 1)), "q_proj")
_kind("IA3", "transposed", (3, 4), lambda c, t: _edit(t, "q_proj.ia3_l", lambda v: v.T), "feedforward_modules")
_kind("IA3", "is-a-matrix", (3, 4), lambda c, t: _edit(t, "q_proj.ia3_l", lambda v: torch.ones(32, 2)), "q_proj")
_kind("IA3", "sides-swapped", (3, 4), lambda c, t: c.update(feedforward_modules=["q_proj"]), "feedforward_modules")
_kind(
    "IA3",
    "pattern-endless",
    3,
    lambda c, t: c.update(feedforward_modules=r"(?:(.+)+\1*)+(?<!j)"),
    "feedforward_modules",
)

# --- LoHa, LoKr ---------------------------------------------------------------------------------------------------------------
for _factor in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"):
    _kind("LoHa", f"no-{_factor}", (3, 4), lambda c, t, f=_factor: _drop(t, f), _factor)
_kind("LoHa", "ranks-differ", (3, 4), lambda c, t: _edit(t, "q_proj.hada_w2_b", lambda v: v[:2]), "hada_w2")
_kind("LoHa", "pairs-differ", (3, 4), lambda c, t: _edit(t, "q_proj.hada_w2_b", lambda v: v[:, :9]), "hada_w2")
_kind(
    "LoHa",
    "stray-core",
    (3, 4),
    lambda c, t: t.update(_core(t, "q_proj.hada_w1_a", "hada_t1", (3, 3, 1, 1))),
    "hada_t1",
)
_kind("LoHa", "alpha-is-a-string", 3, lambda c, t: c.update(alpha="8"), "alpha")
_kind("LoKr", "no-w1_b", (3, 4), lambda c, t: _drop(t, "lokr_w1_b"), "lokr_w1_b")
_kind("LoKr", "no-w2_a", (3, 4), lambda c, t: _drop(t, "lokr_w2_a"), "lokr_w2_a")
_kind(
    "LoKr",
    "whole-and-factors",
    (3, 4),
    lambda c, t: t.update(_core(t, "q_proj.lokr_w1_a", "lokr_w1", (8, 8))),
    "lokr_w1",
)
_kind("LoKr", "other-width", 4, lambda c, t: _edit(t, "q_proj.lokr_w2", lambda v: v[:, :2]), "q_proj")


def _core(tensors: Tensors, suffix: str, name: str, shape: tuple[int, ...]) -> Tensors:
    key = next(key for key in sorted(tensors) if key.endswith(suffix))
    return {key.replace(suffix.rpartition(".")[2], name): torch.ones(shape)}


# --- OFT ----------------------------------------------------------------------------------------------------------------------
_kind("OFT", "no-triangle", (3, 4), lambda c, t: _edit(t, "q_proj.oft_R.weight", lambda v: v[:, :-1]), "triangle")
_kind("OFT", "too-few-blocks", 4, lambda c, t: _edit(t, "q_proj.oft_R.weight", lambda v: v[:-1]), "q_proj")
_kind("OFT", "share-of-many", (3, 4), lambda c, t: c.update(block_share=True), "block_share")
_kind(
    "OFT",
    "share-does-not-divide",
    4,
    lambda c, t: (c.update(block_share=True), [_edit(t, k, lambda v: torch.ones(1, 10)) for k in list(t)]),
    "blocks of 5",
)
_kind("OFT", "written-by-017", (4, 3), lambda c, t: c.update(peft_version="0.17.1"), "0.18")
_kind("OFT", "no-version", (4, 3), lambda c, t: c.pop("peft_version"), "0.18")
_kind("OFT", "no-transform-named", (4, 3), lambda c, t: c.pop("use_cayley_neumann"), "use_cayley_neumann")
_kind("OFT", "a-million-terms", (4, 3), lambda c, t: c.update(num_cayley_neumann_terms=10**6), "1000000 terms")
_kind("OFT", "eps-is-nan", 3, lambda c, t: c.update(coft=True, eps=math.nan), "adapter_config.json")
_kind(
    "OFT",
    "old-layout",
    (4, 3),
    lambda c, t: [t.update({k.replace("oft_R.weight", "oft_r"): t.pop(k)}) for k in list(t)],
    "before 0.16",
)


@fault("oft-on-a-kernel", (4, 3), "conv2", "kernel")
def _oft_conv(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
    module = models.build_base("torch_module", folder / "module")
    fields = {"peft_type": "OFT", "peft_version": "0.21.2", "use_cayley_neumann": False}
    tensors = {"base_model.model.conv2.oft_R.weight": torch.ones(3, 1)}
    return module, disk.write_adapter(folder / "bad", fields, tensors)


# --- VeRA ---------------------------------------------------------------------------------------------------------------------
_kind("Vera", "no-lambda_d", (3, 4), lambda c, t: _drop(t, "vera_lambda_d"), "vera_lambda_d")
_kind("Vera", "no-lambda_b", (3, 4), lambda c, t: _drop(t, "vera_lambda_b"), "vera_lambda_b")
_kind("Vera", "no-projection", (3, 4), lambda c, t: _drop(t, "vera_A"), "vera_A")
_kind("Vera", "no-projections", (3, 4), lambda c, t: (_drop(t, "vera_A"), _drop(t, "vera_B")), "vera_A")
_kind("Vera", "ranks-differ", (3, 4), lambda c, t: _edit(t, "vera_A", lambda v: v[:-1]), "ranks")
_kind("Vera", "projection-too-narrow", 4, lambda c, t: _edit(t, "vera_A", lambda v: v[:, :40]), "down_proj")
_kind("Vera", "projection-too-low", (3, 4), lambda c, t: _edit(t, "vera_B", lambda v: v[:20]), "20 rows")
_kind(
    "Vera",
    "drawn-with-another-rank",
    (3, 4),
    lambda c, t: (c.update(save_projection=False, r=5), _drop(t, "vera_A"), _drop(t, "vera_B")),
    "'r'",
)


# --- kinds that are known and cannot be, and soft prompts ---------------------------------------------------------------------
def _field(name: str, codes: int | tuple[int, ...], fields: Mapping[str, Any], *mentions: str) -> None:
    @fault(name, codes, *mentions)
    def _make(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
        config, tensors = disk.adapter(adapter)
        return base, disk.write_adapter(folder / "bad", {**config, **fields}, tensors)


for _type, _why in (
    ("ADAPTION_PROMPT", "gates"),
    ("MULTITASK_PROMPT_TUNING", "per task"),
    ("XLORA", "routes"),
    ("POLY", "routes"),
):
    _field(f"kind-{_type.lower()}", (4, 3), {"peft_type": _type}, _type, _why)


def _prompt(
    name: str, kind: str, change: Callable[[Config, Tensors], Any], codes: tuple[int, ...], *mentions: str
) -> None:
    @fault(f"prompt-{name}", codes, *mentions)
    def _make(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
        fields = {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM"}
        with peft_oracle.quiet():
            model = models.load("llama", base, "float32")
            peft.get_peft_model(model, getattr(peft, kind)(**fields)).save_pretrained(folder / "sound")
        config, tensors = disk.adapter(folder / "sound")
        change(config, tensors)
        return base, disk.write_adapter(folder / "bad", config, tensors)


_prompt("sound", "PromptTuningConfig", lambda c, t: None, (4,), "virtual tokens", "export-onnx")
_prompt("unknown-switch", "PrefixTuningConfig", lambda c, t: c.update(rotate_keys=True), (4, 3), "rotate_keys")
_prompt("missing", "PromptTuningConfig", lambda c, t: t.clear(), (3,), "prompt_embeddings")
_prompt("other-count", "PromptTuningConfig", lambda c, t: c.update(num_virtual_tokens=6), (4, 3), "[6, 32]")
_prompt("other-dim", "PromptTuningConfig", lambda c, t: c.update(token_dim=64), (4, 3), "[5, 64]")
_prompt("three-submodules", "PromptTuningConfig", lambda c, t: c.update(num_transformer_submodules=3), (4, 3))
_prompt("stray", "PromptTuningConfig", lambda c, t: t.update({"base_model.stray.x": torch.ones(2)}), (3, 4), "stray")
_prompt(
    "prefix-of-other-layers", "PrefixTuningConfig", lambda c, t: c.update(num_layers=3), (4, 3), "prompt_embeddings"
)
_prompt("prefix-of-odd-heads", "PrefixTuningConfig", lambda c, t: c.update(num_attention_heads=3), (4, 3), "token_dim")
_prompt("prefix-without-layers", "PrefixTuningConfig", lambda c, t: c.pop("num_layers"), (3, 4), "num_layers")
