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
    "AdaLora": {"target_modules": ["q_proj", "down_proj"], "init_r": 4, "total_step": 10},
    "Miss": {"target_modules": ["q_proj", "down_proj"], "r": 8},
    "Hira": {"target_modules": ["q_proj", "down_proj"], "r": 4},
    "HRA": {"target_modules": ["q_proj", "down_proj"], "r": 4},
    "BOFT": {"target_modules": ["q_proj", "down_proj"], "boft_block_size": 4},
    "C3A": {"target_modules": ["q_proj", "down_proj"], "block_size": 8},
    "Shira": {"target_modules": ["q_proj", "down_proj"], "r": 2},
    "Road": {"target_modules": ["q_proj", "down_proj"], "group_size": 8},
    "Delora": {"target_modules": ["q_proj", "down_proj"], "r": 4},
    "Gralora": {"target_modules": ["q_proj", "down_proj"], "r": 4, "gralora_k": 2, "hybrid_r": 2},
    "FourierFT": {"target_modules": ["q_proj", "down_proj"], "n_frequency": 50},
    "RandLora": {"target_modules": ["q_proj", "down_proj"], "r": 6},
    "Pvera": {"target_modules": ["q_proj", "down_proj"], "r": 4},
    "VBLoRA": {"target_modules": ["q_proj", "down_proj"], "r": 2, "num_vectors": 9, "vector_length": 8},
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
    ("AdaLora", "q_proj.lora_E"),
    ("Miss", "q_proj.miss_block"),
    ("Hira", "q_proj.hira_B"),
    ("HRA", "q_proj.hra_u"),
    ("BOFT", "q_proj.boft_R"),
    ("C3A", "q_proj.c3a_kernel"),
    ("Shira", "q_proj.shira_weight"),
    ("Road", "q_proj.road_theta"),
    ("Delora", "q_proj.delora_lambda"),
    ("Gralora", "q_proj.gralora_A"),
    ("FourierFT", "q_proj.fourierft_spectrum"),
    ("RandLora", "q_proj.randlora_gamma"),
    ("Pvera", "q_proj.pvera_lambda_b"),
    ("VBLoRA", "q_proj.vblora_logits_A"),
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


def _on_a_kernel(kind: str, fields: Config, tensors: Tensors) -> None:
    """Factors of ``conv2``, whose kernel is (3, 2), with one axis more than it has."""

    @fault(f"{kind.lower()}-one-axis-more", 4, "conv2", "a factor of a convolution of 3 axes")
    def _make(base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
        module = models.build_base("torch_module", folder / "module")
        own = {f"base_model.model.conv2.{name}": tensor for name, tensor in tensors.items()}
        return module, disk.write_adapter(folder / "bad", {"peft_type": kind, **fields}, own)


_on_a_kernel("IA3", {"feedforward_modules": []}, {"ia3_l": torch.ones(1, 6, 1, 1, 1)})
_on_a_kernel("LOKR", {"r": 2, "alpha": 2}, {"lokr_w1": torch.ones(2, 1), "lokr_w2": torch.ones(3, 1, 3, 2, 1)})


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


# --- the less common kinds ----------------------------------------------------------------------------------------------------
_kind("AdaLora", "rank-it-has-not", (3, 4), lambda c, t: c.update(init_r=5), "init_r")
_kind("AdaLora", "pattern-of-numbers", 3, lambda c, t: c.update(rank_pattern={"x.lora_E": 3}), "rank_pattern")
_kind(
    "AdaLora",
    "no-alpha-and-pruned",
    (4, 3),
    lambda c, t: c.update(lora_alpha=0, rank_pattern={"x.lora_E": [True]}),
    "lora_alpha",
)
_kind("AdaLora", "acts-after-tokens", (4, 3), lambda c, t: c.update(alora_invocation_tokens=[1]), "invocation")
_kind("Miss", "mini-of-another-width", (3, 4), lambda c, t: c.update(init_weights="mini", mini_r=4), "mini_r")
_kind("Miss", "bat-of-two-axes", (3, 4), lambda c, t: c.update(init_weights="bat"), "three axes")
_kind("Miss", "no-such-variant", (4, 3), lambda c, t: c.update(init_weights="cat"), "cat")
_kind(
    "Miss",
    "wider-than-the-base",
    4,
    lambda c, t: (c.update(r=40), [_edit(t, key, lambda v: v.repeat(5, 1)) for key in list(t)]),
    "q_proj",
)
_kind("Hira", "without-its-a", (3, 4), lambda c, t: _drop(t, "q_proj.hira_A"), "hira_A")
_kind(
    "HRA", "a-vector-of-zeros", 4, lambda c, t: _edit(t, "q_proj.hra_u", lambda v: v * (torch.arange(4) != 2)), "is 0"
)
_kind(
    "HRA",
    "vectors-alike",
    4,
    lambda c, t: (c.update(apply_GS=True), _edit(t, "q_proj.hra_u", lambda v: v[:, [0, 1, 1, 2]])),
    "Gram-Schmidt",
)
_kind("BOFT", "blocks-not-square", (3, 4), lambda c, t: _edit(t, "q_proj.boft_R", lambda v: v[..., :3]), "square")
_kind(
    "BOFT",
    "factors-of-odd-blocks",
    (3, 4),
    lambda c, t: _edit(t, "q_proj.boft_R", lambda v: v[:, :7].repeat(2, 1, 1, 1)),
    "shuffled",
)
_kind("C3A", "blocks-too-small", 4, lambda c, t: _edit(t, "q_proj.c3a_kernel", lambda v: v[..., :4]), "q_proj")
_kind("Shira", "an-index-outside", 4, lambda c, t: _edit(t, "q_proj.shira_indices", lambda v: v + 9), "outside")
_kind(
    "Shira",
    "an-index-short",
    (3, 4),
    lambda c, t: _edit(t, "q_proj.shira_indices", lambda v: v[:, 1:]),
    "shira_indices",
)
_kind("Shira", "no-indices", (3, 4), lambda c, t: _drop(t, "q_proj.shira_indices"), "shira_indices")
_kind("Road", "another-variant", (3, 4), lambda c, t: c.update(variant="road_4"), "down_proj")
_kind("Road", "no-such-variant", 3, lambda c, t: c.update(variant="road_3"), "variant")
_kind("Road", "groups-that-do-not-fit", (3, 4), lambda c, t: c.update(group_size=48), "48")
_kind("Delora", "without-lengths", (3, 4), lambda c, t: _drop(t, "q_proj.delora_w_norm"), "delora_w_norm")
_kind("Gralora", "general-of-another-rank", (3, 4), lambda c, t: c.update(hybrid_r=3), "hybrid_r")
_kind(
    "Gralora",
    "general-without-b",
    (3, 4),
    lambda c, t: _drop(t, "q_proj.gralora_B_general.weight"),
    "gralora_B_general",
)
_kind(
    "FourierFT",
    "more-than-there-are",
    4,
    lambda c, t: (
        c.update(n_frequency_pattern={"layers.0.self_attn.q_proj": 99 * 50}),
        _edit(t, "q_proj.fourierft_spectrum", lambda v: v.repeat(99)),
    ),
    "frequencies",
)
_kind(
    "RandLora",
    "another-basis",
    (3, 4),
    lambda c, t: _edit(t, "1.self_attn.q_proj.randlora_B", lambda v: v + 1),
    "base_model.randlora_B",
)
_kind(
    "RandLora",
    "drawn-dense",
    4,
    lambda c, t: (c.update(save_projection=False), [t.pop(k) for k in list(t) if k.endswith(("_A", "_B"))]),
    "half precision",
)
_kind("Pvera", "odd-halves", (3, 4), lambda c, t: _edit(t, "q_proj.pvera_lambda_d", lambda v: v[1:]), "half")
_kind("VBLoRA", "no-bank", 3, lambda c, t: _drop(t, "vblora_vector_bank"), "vblora_vector_bank")
_kind("VBLoRA", "more-than-the-bank", (3, 4), lambda c, t: c.update(topk=10), "bank")
