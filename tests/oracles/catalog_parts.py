# SPDX-License-Identifier: Apache-2.0
"""Merge cases of whole parts of a model: replaced modules, tokens, tied embeddings, experts."""

from __future__ import annotations

from tests.oracles import rewrites, special
from tests.oracles.cases import Adapter, add
from tests.oracles.catalog import lora

__all__ = ["GATE_UP", "PEFT_CHANGES_BOTH"]

# --- modules that are replaced ----------------------------------------------------------------------------------------------
add("llama_cls-score", "llama_cls", lora(task_type="SEQ_CLS"), tags="modules_to_save score")
add("bert-classifier", "bert", lora(task_type="SEQ_CLS", target_modules=["query"]), tags="modules_to_save classifier")
add("vit-classifier", "vit", lora(modules_to_save=["classifier"]), tags="modules_to_save classifier names")
add("llama-save-lm-head", "llama", lora(modules_to_save=["lm_head"]), tags="modules_to_save lm_head")
add(
    "llama-save-norms",
    "llama",
    lora(modules_to_save=["norm"]),
    tags="modules_to_save norm",
    notes="'norm' also takes every *layernorm",
)
add("gpt2-save-norms", "gpt2", lora(modules_to_save=["ln_1", "ln_f"]), tags="modules_to_save norm")
add("mixtral-save-router", "mixtral", lora(modules_to_save=["gate"]), tags="modules_to_save names")
add(
    "llama-save-bf16",
    "llama",
    lora(modules_to_save=["lm_head"], use_dora=True),
    tags="modules_to_save half dora",
    dtype="bfloat16",
)

# --- tokens -----------------------------------------------------------------------------------------------------------------
add("llama-tokens", "llama", lora(trainable_token_indices=[3, 98, 0]), tags="trainable_tokens")
add(
    "llama-tokens-both",
    "llama",
    lora(trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [5, 7, 9]}),
    tags="trainable_tokens",
)
add(
    "qwen2-tokens-tied",
    "qwen2",
    lora(trainable_token_indices=[3, 5]),
    tags="trainable_tokens tied",
    notes="stays tied: the head follows the rows",
)
add(
    "llama-tokens-method",
    "llama",
    Adapter({"token_indices": [4, 1], "target_modules": ["embed_tokens"]}, "TrainableTokensConfig"),
    tags="trainable_tokens method",
)
add(
    "qwen2-tokens-method",
    "qwen2",
    Adapter({"token_indices": [4, 1], "target_modules": ["embed_tokens"]}, "TrainableTokensConfig"),
    tags="trainable_tokens method tied",
)
add("llama-tokens-bf16", "llama", lora(trainable_token_indices=[3, 5]), tags="trainable_tokens half", dtype="bfloat16")
add(
    "llama-resized",
    "llama",
    lora(),
    tags="resized",
    resize=3,
    notes="embedding and head come whole with the adapter; PEFT wants the base resized first",
)
add(
    "llama-resized-targeted",
    "llama",
    lora(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    tags="resized embedding lm_head",
    resize=3,
)
add("qwen2-resized-tied", "qwen2", lora(), tags="resized tied", resize=2)
add("llama-resized-bf16", "llama", lora(), tags="resized half", resize=3, dtype="bfloat16")
add("llama-resized-tokens", "llama", lora(trainable_token_indices=[99, 100]), tags="resized trainable_tokens", resize=2)

# --- tied embeddings --------------------------------------------------------------------------------------------------------
_wrong = {"oracle": special.untied, "peft_wrong": True}
PEFT_CHANGES_BOTH = {
    **_wrong,
    "notes": "PEFT adds the delta to the shared tensor and so changes both; attached, they differ: the output must be untied",
}
for _arch, _embed in (("qwen2", "embed_tokens"), ("gpt2", "wte"), ("opt", "embed_tokens")):
    add(f"{_arch}-tied-embed", _arch, lora(target_modules=[_embed]), tags="tied embedding", **PEFT_CHANGES_BOTH)
    add(f"{_arch}-tied-head", _arch, lora(target_modules=["lm_head"]), tags="tied lm_head", **PEFT_CHANGES_BOTH)
    add(
        f"{_arch}-tied-both",
        _arch,
        lora(target_modules=[_embed, "lm_head"]),
        tags="tied embedding lm_head",
        **PEFT_CHANGES_BOTH,
    )
add(
    "whisper-tied-head",
    "whisper",
    lora(target_modules=["proj_out", "q_proj"]),
    tags="tied lm_head",
    **PEFT_CHANGES_BOTH,
)
add(
    "qwen2-tied-embed-bf16",
    "qwen2",
    lora(target_modules=["embed_tokens"]),
    tags="tied embedding half",
    dtype="bfloat16",
    **PEFT_CHANGES_BOTH,
)
add(
    "qwen2-tied-dora",
    "qwen2",
    lora(target_modules=["lm_head", "q_proj"], use_dora=True),
    tags="tied lm_head dora",
    **PEFT_CHANGES_BOTH,
)
add(
    "qwen2-tied-ensured",
    "qwen2",
    lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    tags="tied ensured embedding",
    notes="the file holds the pair twice, transposed for the head; PEFT adds the delta twice"
    " to the shared tensor. Once is right, and it stays tied",
    **_wrong,
)
add(
    "qwen2-tied-ensured-bf16",
    "qwen2",
    lora(target_modules=["embed_tokens"], ensure_weight_tying=True),
    tags="tied ensured half",
    dtype="bfloat16",
    **_wrong,
)
add(
    "qwen2-tied-tokens-apart",
    "qwen2",
    lora(trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [5, 7]}),
    tags="tied trainable_tokens",
    notes="other rows for embedding and head of a tied pair: PEFT writes one over the other; attached they differ, so the output is untied",
    **_wrong,
)
add(
    "qwen2-tied-save-embed",
    "qwen2",
    lora(modules_to_save=["embed_tokens"]),
    tags="tied modules_to_save",
    notes="untied: the head keeps the old rows",
)
add(
    "qwen2-tied-save-head",
    "qwen2",
    lora(modules_to_save=["lm_head"]),
    tags="tied modules_to_save",
    notes="untied: the embedding keeps the old rows",
)
add(
    "qwen2-tied-save-both",
    "qwen2",
    lora(modules_to_save=["embed_tokens", "lm_head"]),
    tags="tied modules_to_save",
    notes="untied",
)
add(
    "qwen2-tied-save-ensured",
    "qwen2",
    lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    tags="tied ensured modules_to_save",
)

# --- experts ----------------------------------------------------------------------------------------------------------------
GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
for _arch in ("mixtral", "qwen2_moe", "mixtral_square"):
    for _name, _parameters in (("gate-up", [GATE_UP]), ("down", [_DOWN]), ("experts", [_DOWN, GATE_UP])):
        _fields = {"target_modules": ["q_proj"], "target_parameters": _parameters, "use_rslora": _arch == "qwen2_moe"}
        add(f"{_arch}-{_name}", _arch, lora(**_fields), tags="target_parameters experts")
        add(
            f"{_arch}-{_name}-peft018",
            _arch,
            Adapter(_fields, rewrite=rewrites.peft_018),
            tags="target_parameters experts peft018",
            notes="the axis order of PEFT before 0.19, told by peft_version only"
            + ("; gate_up is square, so shapes cannot tell" if _arch == "mixtral_square" else ""),
        )
add(
    "mixtral-experts-patterns",
    "mixtral",
    lora(
        target_modules=[],
        target_parameters=[GATE_UP, _DOWN],
        rank_pattern={"layers.1.mlp.experts.down_proj": 2, "experts.gate_up_proj": 3},
        alpha_pattern={"experts.down_proj": 10},
    ),
    tags="target_parameters experts rank_pattern",
    notes="patterns name the parameter, not the module",
)
add(
    "mixtral-router",
    "mixtral",
    lora(target_modules=["q_proj"], target_parameters=["mlp.gate.weight"]),
    tags="target_parameters",
)
add(
    "llama-target-parameters-2d",
    "llama",
    lora(target_modules=["v_proj"], target_parameters=["q_proj.weight"]),
    tags="target_parameters",
)
for _arch, _module, _parts in (
    ("mixtral", "block_sparse_moe", ("w1", "w2", "w3")),
    ("qwen2_moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
):
    for _name, _extra in (
        ("", {}),
        ("-rslora", {"use_rslora": True}),
        (
            "-patterns",
            {"rank_pattern": {"experts.1." + _parts[0]: 2}, "alpha_pattern": {_parts[1]: 9, "layers.1.*": 3}},
        ),
    ):
        add(
            f"{_arch}-per-expert{_name}",
            _arch,
            Adapter(make=special.per_expert(_module, _parts, **_extra)),
            tags="per_expert v4" + _name.replace("-", " "),
            oracle=special.linear_formula,
            notes="trained with transformers 4, keys per expert as on the disk; PEFT 0.21 "
            + ("drops the deltas" if _arch == "qwen2_moe" else "fuses them" + (" and is wrong" if _name else "")),
        )
add(
    "mixtral-one-expert",
    "mixtral",
    Adapter(make=special.per_expert("block_sparse_moe", ("w1",), experts=(2,))),
    tags="per_expert v4",
    oracle=special.linear_formula,
    notes="only w1 of one expert: nothing else moves",
)
