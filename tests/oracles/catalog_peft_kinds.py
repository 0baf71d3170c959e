# SPDX-License-Identifier: Apache-2.0
"""Merge cases of PEFT's less common kinds: every variant, on every kind of layer PEFT allows it on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.oracles import special
from tests.oracles.cases import Adapter, Config, Tensors, add
from tests.oracles.catalog_kinds import kind

__all__: list[str] = []

_LLAMA = ("q_proj", "down_proj", "up_proj")  # square, wide and tall
_GPT2 = ("c_attn", "c_fc", "c_proj")  # stored (in, out)


def half(name: str, arch: str, adapter: Adapter, tags: str) -> None:
    add(f"{name}-bf16", arch, adapter, tags=f"{tags} half", dtype="bfloat16", peft_rounds_once=False)


def variants(prefix: str, name: str, arch: str, *targets: str, **fields: Mapping[str, Any]) -> None:
    """A case for each set of fields."""
    for variant, config in fields.items():
        add(f"{arch}-{prefix}-{variant}", arch, kind(name, *targets, **config), tags=prefix)


# --- AdaLoRA ----------------------------------------------------------------------------------------------------------------
def pruned(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """As a training leaves them that keeps one direction less in each module, and none in the last."""
    kept: dict[str, list[bool]] = {}
    modules = sorted({key.rpartition(".")[0] for key in tensors})
    for number, module in enumerate(modules):
        initial = config["init_r"]
        keep = [number + 1 < len(modules) and at != number % initial for at in range(initial)]
        kept[f"{module.removeprefix('base_model.model.')}.lora_E"] = keep
        for name in "AE":
            tensors[f"{module}.lora_{name}"] = tensors[f"{module}.lora_{name}"][keep].contiguous()
        tensors[f"{module}.lora_B"] = tensors[f"{module}.lora_B"][:, keep].contiguous()
    return config | {"rank_pattern": kept}, tensors


_ADA: dict[str, Any] = {"init_r": 4, "lora_alpha": 6, "total_step": 10}
for _arch, _targets in (
    ("llama", _LLAMA),
    ("gpt2", _GPT2),
    ("bert", ("query", "dense")),
    ("torch_module", ("conv2", "head")),
):
    add(f"{_arch}-adalora", _arch, kind("AdaLora", *_targets, **_ADA), tags="adalora")
add(
    "llama-adalora-pruned",
    "llama",
    Adapter({"target_modules": ["q_proj", "up_proj"], **_ADA}, "AdaLoraConfig", edit=pruned),
    tags="adalora rank_pattern",
    notes="alpha is divided by the initial rank, and by 1e-5 more, whatever is left of it; a module of rank 0 stays as it was",
)
add("llama-adalora-no-alpha", "llama", kind("AdaLora", "q_proj", **_ADA | {"lora_alpha": 0}), tags="adalora alpha")
half("llama-adalora", "llama", kind("AdaLora", *_LLAMA, **_ADA), "adalora")

# --- MiSS -------------------------------------------------------------------------------------------------------------------
variants(
    "miss",
    "Miss",
    "llama",
    *_LLAMA,
    whole={"r": 8},
    padded={"r": 5},
    random={"r": 6, "init_weights": False},
    mini={"r": 8, "mini_r": 4, "init_weights": "mini"},
    bat={"r": 8, "init_weights": "bat"},
)
add("bert-miss-bias", "bert", kind("Miss", "query", "value", r=8, bias="MiSS_only"), tags="miss bias")
half("llama-miss-bat", "llama", kind("Miss", *_LLAMA, r=8, init_weights="bat"), "miss")


def bone(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """As PEFT 0.14 to 0.18 wrote it."""
    fields = {"mini_r", "miss_dropout", "peft_version"}
    old = {key: value for key, value in config.items() if key not in fields} | {"peft_type": "BONE"}
    return old, {key.replace("miss_block", "bone_block"): value for key, value in tensors.items()}


for _variant, _init in (("whole", True), ("bat", "bat")):
    add(
        f"llama-bone-{_variant}",
        "llama",
        Adapter({"target_modules": list(_LLAMA), "r": 8, "init_weights": _init}, "MissConfig", rewrite=bone),
        tags="bone miss",
    )

# --- kinds that multiply ------------------------------------------------------------------------------------------------------
for _arch, _targets in (
    ("llama", (*_LLAMA, "embed_tokens")),
    ("gpt2", _GPT2),
    ("bert", ("query", "dense")),
    ("whisper", ("conv1", "fc1")),
    ("torch_module", ("conv2", "conv2_point", "conv3", "embed", "head")),
):
    add(f"{_arch}-hira", _arch, kind("Hira", *_targets, r=3), tags="hira")
add("llama-hira-ranks", "llama", kind("Hira", "q_proj", "up_proj", r=3, rank_pattern={"up_proj": 2}), tags="hira")
half("llama-hira", "llama", kind("Hira", *_LLAMA, r=3), "hira")

variants("hra", "HRA", "llama", *_LLAMA, plain={"r": 5, "init_weights": False}, gs={"r": 4, "apply_GS": True})
add("resnet-hra", "resnet", kind("HRA", "convolution", r=3, init_weights=False), tags="hra conv")
add("bert-hra-bias", "bert", kind("HRA", "query", r=4, bias="hra_only"), tags="hra bias")
half("llama-hra", "llama", kind("HRA", *_LLAMA, r=4), "hra")

variants(
    "boft", "BOFT", "llama", *_LLAMA, blocks={"boft_block_size": 8}, count={"boft_block_size": 0, "boft_block_num": 4}
)
add(
    "resnet-boft",
    "resnet",
    Adapter({"target_modules": r".*encoder.*convolution", "boft_block_size": 4}, "BOFTConfig"),
    tags="boft conv",
)
add("bert-boft-bias", "bert", kind("BOFT", "query", "dense", boft_block_size=4, bias="boft_only"), tags="boft bias")
half("llama-boft", "llama", kind("BOFT", *_LLAMA, boft_block_size=4), "boft")

for _variant in ("road_1", "road_2", "road_4"):
    for _arch, _targets in (
        ("llama", _LLAMA),
        ("qwen2", ("q_proj", "k_proj", "up_proj")),
        ("bert", ("query", "dense")),
    ):
        add(f"{_arch}-{_variant}", _arch, kind("Road", *_targets, variant=_variant, group_size=8), tags="road bias")
half("qwen2-road", "qwen2", kind("Road", "q_proj", "up_proj", variant="road_4", group_size=4), "road")
add(
    "bert-road-weighted",
    "bert",
    Adapter({"target_modules": ["value"], "group_size": 4}, "RoadConfig", weight=0.4),
    tags="road weights bias",
    oracle=special.partway,
)

# --- kinds that add -----------------------------------------------------------------------------------------------------------
variants(
    "c3a",
    "C3A",
    "llama",
    *_LLAMA,
    blocks={"block_size": 8},
    sizes={"block_size": 8, "block_size_pattern": {"up_proj": 4}},
)
add("bert-c3a-bias", "bert", kind("C3A", "query", "dense", block_size=8, bias="c3a_only"), tags="c3a bias")
half("llama-c3a", "llama", kind("C3A", *_LLAMA, block_size=4), "c3a")

add("llama-shira", "llama", kind("Shira", *_LLAMA, r=2), tags="shira")
add("bert-shira-seed", "bert", kind("Shira", "query", "dense", r=1, random_seed=3), tags="shira")
half("llama-shira", "llama", kind("Shira", *_LLAMA, r=2), "shira")

add("llama-delora", "llama", kind("Delora", *_LLAMA, r=4, delora_lambda=7), tags="delora")
add(
    "bert-delora-patterns",
    "bert",
    kind("Delora", "query", "dense", r=4, rank_pattern={"query": 2}, lambda_pattern={"dense": 3}, bias="delora_only"),
    tags="delora bias rank_pattern",
)
half("llama-delora", "llama", kind("Delora", *_LLAMA, r=4), "delora")

for _arch, _targets in (("llama", _LLAMA), ("gpt2", _GPT2)):
    for _name, _fields in (
        ("gralora", {"gralora_k": 4}),
        ("gralora-hybrid", {"hybrid_r": 3, "alpha": 5}),
    ):
        add(
            f"{_arch}-{_name}", _arch, kind("Gralora", *_targets, **{"r": 8, "gralora_k": 2, **_fields}), tags="gralora"
        )
add("bert-gralora-bias", "bert", kind("Gralora", "query", r=4, gralora_k=2, bias="gralora_only"), tags="gralora bias")
half("gpt2-gralora", "gpt2", kind("Gralora", *_GPT2, r=8, gralora_k=2, hybrid_r=2), "gralora")

for _arch, _targets in (("llama", _LLAMA), ("gpt2", _GPT2)):
    add(f"{_arch}-fourierft", _arch, kind("FourierFT", *_targets, n_frequency=60, scaling=40.0), tags="fourierft")
add(
    "bert-fourierft-pattern",
    "bert",
    kind("FourierFT", "query", "dense", n_frequency=1000, n_frequency_pattern={"query": 7}, random_loc_seed=5),
    tags="fourierft",
)
half("llama-fourierft", "llama", kind("FourierFT", *_LLAMA, n_frequency=60), "fourierft")

for _arch, _targets in (("llama", _LLAMA), ("gpt2", _GPT2)):
    for _name, _fields in (
        ("stored", {}),
        ("sparse", {"save_projection": False, "sparse": True, "projection_prng_key": 7}),
        ("very-sparse", {"save_projection": False, "very_sparse": True}),
    ):
        fields = {"r": 5, "randlora_alpha": 3, **_fields}
        add(f"{_arch}-randlora-{_name}", _arch, kind("RandLora", *_targets, **fields), tags="randlora save_projection")
half("llama-randlora", "llama", kind("RandLora", *_LLAMA, r=8, randlora_alpha=3), "randlora")

for _arch, _targets in (("llama", _LLAMA), ("gpt2", _GPT2)):
    for _name, _fields in (("pvera", {}), ("pvera-drawn", {"save_projection": False, "projection_prng_key": 7})):
        add(f"{_arch}-{_name}", _arch, kind("Pvera", *_targets, r=6, **_fields), tags="pvera save_projection")
half("llama-pvera", "llama", kind("Pvera", *_LLAMA, r=6), "pvera")

for _arch, _targets in (("llama", _LLAMA), ("gpt2", _GPT2)):
    for _name, _fields in (("vblora", {}), ("vblora-topk", {"topk": 3, "save_only_topk_weights": True})):
        fields = {"r": 3, "num_vectors": 11, "vector_length": 8, **_fields}
        add(f"{_arch}-{_name}", _arch, kind("VBLoRA", *_targets, **fields), tags="vblora")
half("llama-vblora", "llama", kind("VBLoRA", *_LLAMA, r=3, num_vectors=11, vector_length=4), "vblora")

add("bert-beft", "bert", kind("Beft", "query", "dense"), tags="beft bias")
add("qwen2-beft", "qwen2", kind("Beft", "q_proj", "k_proj"), tags="beft bias")
half("qwen2-beft", "qwen2", kind("Beft", "q_proj"), "beft")
