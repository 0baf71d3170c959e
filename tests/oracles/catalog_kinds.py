# SPDX-License-Identifier: Apache-2.0
"""Merge cases of PEFT's kinds beside LoRA: every option that changes the arithmetic, every kind of layer PEFT allows it on."""

from __future__ import annotations

from typing import Any

from tests.oracles import rewrites, special
from tests.oracles.cases import Adapter, add

__all__: list[str] = []


def kind(name: str, *targets: str, **config: Any) -> Adapter:
    return Adapter({"target_modules": list(targets), **config}, f"{name}Config")


# --- (IA)^3 -----------------------------------------------------------------------------------------------------------------
def ia3(*outputs: str, inputs: tuple[str, ...] = (), **config: Any) -> Adapter:
    return kind("IA3", *outputs, *inputs, **{"feedforward_modules": list(inputs), **config})


add("llama-ia3", "llama", ia3("k_proj", "v_proj", inputs=("down_proj",)), tags="ia3")
add("gpt2-ia3", "gpt2", ia3("c_attn", inputs=("mlp.c_proj",)), tags="ia3 conv1d bias")
add("gpt2-ia3-everything", "gpt2", ia3("c_attn", inputs=("c_proj", "c_fc")), tags="ia3 conv1d")
add("bert-ia3", "bert", ia3("key", "value", inputs=("output.dense",)), tags="ia3 bias")
add("qwen2-ia3", "qwen2", ia3("k_proj", "v_proj", inputs=("down_proj",)), tags="ia3 bias")
add("t5-ia3", "t5", ia3("k", "v", inputs=("wo",)), tags="ia3")
add("gpt_neox-ia3", "gpt_neox", ia3("query_key_value", inputs=("dense_4h_to_h",)), tags="ia3 fused")
add("vit-ia3", "vit", ia3("k_proj", "v_proj", inputs=("fc2",)), tags="ia3 names")
add("resnet-ia3", "resnet", ia3("convolution"), tags="ia3 conv")
add("torch-ia3", "torch_module", ia3("conv2", "conv3", "head"), tags="ia3 conv bias")
add("torch-ia3-inputs", "torch_module", ia3("head", inputs=("conv2", "conv2_point", "conv3")), tags="ia3 conv")
add(
    "llama-ia3-pattern",
    "llama",
    ia3("q_proj", "down_proj", "up_proj", feedforward_modules=r".*\.0\.mlp\.(up|down)_proj"),
    tags="ia3 regex",
    notes="a pattern must match the whole path: layer 1 is treated on its outputs",
)
add("llama_cls-ia3", "llama_cls", ia3("v_proj", task_type="SEQ_CLS"), tags="ia3 modules_to_save score")
for _dtype, _short in (("bfloat16", "bf16"), ("float16", "fp16")):
    add(f"qwen2-ia3-{_short}", "qwen2", ia3("k_proj", inputs=("down_proj",)), tags="ia3 half bias", dtype=_dtype)
    add(f"gpt2-ia3-{_short}", "gpt2", ia3("c_attn", inputs=("mlp.c_proj",)), tags="ia3 half conv1d", dtype=_dtype)
add(
    "llama-two-ia3",
    "llama",
    ia3("v_proj", inputs=("down_proj",)),
    ia3("v_proj", "k_proj"),
    tags="ia3 several",
)
add(
    "bert-ia3-weighted",
    "bert",
    Adapter({"target_modules": ["value"], "feedforward_modules": []}, "IA3Config", weight=0.4),
    tags="ia3 weights bias",
    oracle=special.partway,
    notes="PEFT has no such weight: 0.4 of the way from the base to the merge",
)

# --- LoHa and LoKr ----------------------------------------------------------------------------------------------------------
for _name, _prefix in (("LoHa", "loha"), ("LoKr", "lokr")):
    _fields = {"r": 4, "alpha": 6}
    add(f"llama-{_prefix}", "llama", kind(_name, "q_proj", "v_proj", "up_proj", **_fields), tags=_prefix)
    add(f"bert-{_prefix}", "bert", kind(_name, "query", "dense", r=3, alpha=2.5), tags=_prefix)
    add(f"gpt_neox-{_prefix}", "gpt_neox", kind(_name, "query_key_value", **_fields), tags=f"{_prefix} fused")
    add(f"whisper-{_prefix}", "whisper", kind(_name, "conv1", "fc1", **_fields), tags=f"{_prefix} conv")
    add(
        f"llama-{_prefix}-patterns",
        "llama",
        kind(_name, "q_proj", "up_proj", rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.*": 3}, **_fields),
        tags=f"{_prefix} rank_pattern alpha_pattern",
    )
    for _conv in ("conv1", "conv2", "conv2_point"):
        for _flat in (False, True):
            add(
                f"torch-{_prefix}-{_conv}{'-cp' if _flat else ''}",
                "torch_module",
                kind(_name, _conv, "tail", use_effective_conv2d=_flat, r=2, alpha=3),
                tags=f"{_prefix} conv",
            )
    for _dtype, _short in (("bfloat16", "bf16"), ("float16", "fp16")):
        add(
            f"llama-{_prefix}-{_short}", "llama", kind(_name, "q_proj", **_fields), tags=f"{_prefix} half", dtype=_dtype
        )
    add(
        f"llama-two-{_prefix}",
        "llama",
        Adapter({"target_modules": ["q_proj"], **_fields}, f"{_name}Config", weight=0.6),
        Adapter({"target_modules": ["q_proj", "up_proj"], "r": 2, "alpha": 1}, f"{_name}Config", weight=-0.5),
        tags=f"{_prefix} several weights",
    )
add("llama-lokr-both", "llama", kind("LoKr", "up_proj", r=2, alpha=3, decompose_both=True), tags="lokr factors")
add("llama-lokr-factor", "llama", kind("LoKr", "up_proj", "q_proj", r=2, alpha=3, decompose_factor=4), tags="lokr")
add("llama-lokr-whole", "llama", kind("LoKr", "q_proj", r=40, alpha=80), tags="lokr", notes="both matrices are whole")
for _conv in ("conv1", "conv2"):
    add(
        f"torch-lokr-{_conv}-whole",
        "torch_module",
        kind("LoKr", _conv, r=12, alpha=5),
        tags="lokr conv",
        notes="of a Conv1d PEFT takes kron of a matrix and a 3-D tensor: another order than of all other layers",
    )
add("torch-lokr-conv1-both", "torch_module", kind("LoKr", "conv1", r=1, alpha=2, decompose_both=True), tags="lokr conv")


# --- OFT --------------------------------------------------------------------------------------------------------------------
def oft(*targets: str, **config: Any) -> Adapter:
    return kind("OFT", *targets, **{"oft_block_size": 8, **config})


add("llama-oft", "llama", oft("q_proj", "down_proj"), tags="oft")
add("llama-oft-blocks", "llama", oft("q_proj", "down_proj", r=4, oft_block_size=0), tags="oft")
add("llama-oft-share", "llama", oft("q_proj", "down_proj", block_share=True), tags="oft block_share")
add("llama-oft-exact", "llama", oft("v_proj", "up_proj", use_cayley_neumann=False), tags="oft cayley")
add(
    "llama-oft-exact-share",
    "llama",
    oft("v_proj", use_cayley_neumann=False, block_share=True, oft_block_size=16),
    tags="oft cayley block_share",
)
for _terms in (2, 3, 4, 6, 9):
    add(f"llama-oft-{_terms}-terms", "llama", oft("q_proj", num_cayley_neumann_terms=_terms), tags="oft terms")
add("llama-oft-coft", "llama", oft("q_proj", "down_proj", coft=True, eps=0.4), tags="oft coft")
add("llama-oft-coft-share", "llama", oft("q_proj", coft=True, eps=0.3, block_share=True), tags="oft coft block_share")
add(
    "llama-oft-adjusted", "llama", oft("q_proj", "down_proj", oft_block_size=12), tags="oft", notes="12 is not possible"
)
add("bert-oft-bias", "bert", oft("query", "value", bias="oft_only"), tags="oft bias")
add("torch-oft", "torch_module", oft("conv2_point", "tail", "head", oft_block_size=2), tags="oft conv")
add("torch-oft-embed", "torch_module", oft("embed", oft_block_size=4), tags="oft embedding")
add("llama-oft-embed", "llama", oft("embed_tokens", "q_proj", oft_block_size=4), tags="oft embedding")
add("mixtral-oft", "mixtral", oft("q_proj", "o_proj"), tags="oft")
for _dtype, _short in (("bfloat16", "bf16"), ("float16", "fp16")):
    add(f"llama-oft-{_short}", "llama", oft("q_proj", "up_proj"), tags="oft half", dtype=_dtype)
add(
    "llama-two-oft",
    "llama",
    oft("q_proj", "v_proj"),
    oft("v_proj"),
    tags="oft several",
    oracle=special.in_order,
    notes="as if merged one after the other, which is what PEFT's merge does; attached together, PEFT turns in the other order",
)
add(
    "llama-oft-weighted",
    "llama",
    Adapter({"target_modules": ["q_proj"], "oft_block_size": 8}, "OFTConfig", weight=0.7),
    tags="oft weights",
    oracle=special.partway,
)


# --- VeRA -------------------------------------------------------------------------------------------------------------------
def vera(*targets: str, **config: Any) -> Adapter:
    return kind("Vera", *targets, **{"r": 6, **config})


for _arch, _targets in (
    ("llama", ("q_proj", "down_proj", "up_proj")),
    ("gpt2", ("c_attn", "c_fc", "c_proj")),
    ("t5", ("q", "wi", "wo")),
    ("gpt_neox", ("query_key_value", "dense")),
):
    add(f"{_arch}-vera", _arch, vera(*_targets), tags="vera")
    add(
        f"{_arch}-vera-drawn",
        _arch,
        vera(*_targets, save_projection=False, projection_prng_key=7),
        tags="vera save_projection",
        notes="the projections are not in the file: their sizes are those of the widest weights",
    )
add("bert-vera-bias", "bert", vera("query", "value", bias="vera_only"), tags="vera bias")
add("llama-vera-wide", "llama", vera("q_proj", r=40, d_initial=0.3), tags="vera rank")
for _dtype, _short in (("bfloat16", "bf16"), ("float16", "fp16")):
    add(f"llama-vera-{_short}", "llama", vera("q_proj", "up_proj"), tags="vera half", dtype=_dtype)
add(
    "llama-vera-weighted",
    "llama",
    Adapter({"target_modules": ["q_proj"], "r": 6}, "VeraConfig", weight=0.7),
    tags="vera weights",
    oracle=special.partway,
)

# --- ties: what changes one side of a tie parts the two, whatever its equation ------------------------------------------------
for _name, _adapter in (
    ("oft-tied-embed", oft("embed_tokens", oft_block_size=4)),
    ("ia3-tied-head", ia3("k_proj", "lm_head")),
    ("vera-tied-head", vera("lm_head", "q_proj")),
):
    add(f"qwen2-{_name}", "qwen2", _adapter, tags="tied", oracle=special.untied, peft_wrong=True)

# --- the rest ---------------------------------------------------------------------------------------------------------------
add("llama-ln-tuning", "llama", kind("LNTuning", "input_layernorm", "norm"), tags="ln_tuning")
add("gpt2-ln-tuning", "gpt2", kind("LNTuning", "ln_1", "ln_f"), tags="ln_tuning bias")
add(
    "llama-ia3-minimal",
    "llama",
    Adapter(
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        "IA3Config",
        rewrite=rewrites.keep("peft_type", "target_modules"),
    ),
    tags="ia3 config",
    notes="without the list of inputs the shapes of linear layers still tell",
)
