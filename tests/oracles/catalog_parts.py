# SPDX-License-Identifier: Apache-2.0
"""Merge cases of whole parts and of spelling: replaced modules, tokens, ties, experts, names, storage, several adapters."""

from __future__ import annotations

from tests.oracles import rewrites, special
from tests.oracles.cases import Adapter, add
from tests.oracles.catalog import lora

__all__: list[str] = []

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
for _arch, _embed in (("qwen2", "embed_tokens"), ("gpt2", "wte"), ("opt", "embed_tokens")):
    _wrong = {"oracle": special.untied, "peft_wrong": True}
    _note = (
        "PEFT adds the delta to the shared tensor and so changes both; attached, they differ: the output must be untied"
    )
    add(f"{_arch}-tied-embed", _arch, lora(target_modules=[_embed]), tags="tied embedding", notes=_note, **_wrong)
    add(f"{_arch}-tied-head", _arch, lora(target_modules=["lm_head"]), tags="tied lm_head", notes=_note, **_wrong)
    add(
        f"{_arch}-tied-both",
        _arch,
        lora(target_modules=[_embed, "lm_head"]),
        tags="tied embedding lm_head",
        notes=_note,
        **_wrong,
    )
add(
    "whisper-tied-head",
    "whisper",
    lora(target_modules=["proj_out", "q_proj"]),
    tags="tied lm_head",
    notes=_note,
    **_wrong,
)
add(
    "qwen2-tied-embed-bf16",
    "qwen2",
    lora(target_modules=["embed_tokens"]),
    tags="tied embedding half",
    dtype="bfloat16",
    notes=_note,
    **_wrong,
)
add(
    "qwen2-tied-dora",
    "qwen2",
    lora(target_modules=["lm_head", "q_proj"], use_dora=True),
    tags="tied lm_head dora",
    notes=_note,
    **_wrong,
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
_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
for _arch in ("mixtral", "qwen2_moe", "mixtral_square"):
    for _name, _parameters in (("gate-up", [_GATE_UP]), ("down", [_DOWN]), ("experts", [_DOWN, _GATE_UP])):
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
        target_parameters=[_GATE_UP, _DOWN],
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

# --- names ------------------------------------------------------------------------------------------------------------------
add(
    "vit-v4-names",
    "vit",
    Adapter({"target_modules": ["q_proj", "v_proj"]}, rewrite=rewrites.vit_v4),
    tags="names v4",
    notes="module names of transformers 4; PEFT 0.21 cannot load it",
)
add(
    "vit-v4-names-mlp",
    "vit",
    Adapter({"target_modules": ["o_proj", "fc1", "fc2"], "use_dora": True}, rewrite=rewrites.vit_v4),
    tags="names v4 dora",
)
add(
    "gpt_neox-v4-head",
    "gpt_neox",
    Adapter({"target_modules": ["lm_head", "dense"]}, rewrite=rewrites.rename("model.lm_head.", "model.embed_out.")),
    tags="names v4 lm_head",
)
add(
    "gpt2-bare-adapter",
    "gpt2",
    Adapter({}, rewrite=rewrites.rename(".transformer.h.", ".h.")),
    tags="names bare",
    notes="trained on GPT2Model, merged into the LM checkpoint",
)
add(
    "gpt2_bare-headed-adapter",
    "gpt2_bare",
    Adapter({}, rewrite=rewrites.rename("model.h.", "model.transformer.h.")),
    tags="names bare",
    notes="trained on GPT2LMHeadModel; the checkpoint has no prefix, as the published gpt2",
)
add(
    "bert-bare-adapter",
    "bert",
    Adapter({"target_modules": ["query"]}, rewrite=rewrites.rename(".bert.encoder.", ".encoder.")),
    tags="names bare",
)
add(
    "bert_bare-headed-adapter",
    "bert_bare",
    Adapter({}, rewrite=rewrites.rename("model.encoder.", "model.bert.encoder.")),
    tags="names bare",
)
add(
    "llama-bare-adapter",
    "llama",
    Adapter({}, rewrite=rewrites.rename("model.model.layers.", "model.layers.")),
    tags="names bare",
    notes="trained on LlamaModel",
)

# --- how the adapter is stored ------------------------------------------------------------------------------------------
add("llama-adapter-fp16", "llama", Adapter({}, store="float16"), tags="stored_half")
add("llama-adapter-bf16", "llama", Adapter({"use_dora": True}, store="bfloat16"), tags="stored_half dora")
add("llama-adapter-fp64", "llama", Adapter({}, store="float64"), tags="stored_double")
add("llama-bf16-adapter-bf16", "llama", Adapter({}, store="bfloat16"), tags="stored_half half", dtype="bfloat16")
add("llama-fp16-adapter-bf16", "llama", Adapter({}, store="bfloat16"), tags="stored_half half", dtype="float16")
add("llama-adapter-bin", "llama", Adapter({"use_dora": True}, pickled=True), tags="pickled")
add("llama-adapter-bin-bf16", "llama", Adapter({}, store="bfloat16", pickled=True), tags="pickled stored_half")
add("llama-default-keys", "llama", Adapter({}, rewrite=rewrites.adapter_name("default")), tags="adapter_name")
add(
    "llama-named-keys",
    "llama",
    Adapter({"use_dora": True, "modules_to_save": ["lm_head"]}, rewrite=rewrites.adapter_name("my_task")),
    tags="adapter_name dora modules_to_save",
)
add(
    "torch-default-keys",
    "torch_module",
    Adapter({"target_modules": ["embed", "conv1", "head"]}, rewrite=rewrites.adapter_name("default")),
    tags="adapter_name embedding conv",
)
add(
    "llama-minimal-config",
    "llama",
    Adapter({}, rewrite=rewrites.minimal),
    tags="config",
    notes="peft_type, r, lora_alpha, target_modules and nothing else",
)
add(
    "llama-future-config",
    "llama",
    Adapter({}, rewrite=rewrites.config(use_frobnicate=False, frob_config=None, frobs=[])),
    tags="config",
    notes="unknown fields that are off are harmless",
)
add("llama-dropout-config", "llama", lora(lora_dropout=0.3), tags="config", notes="dropout plays no part in a merge")

# --- how the base is stored ---------------------------------------------------------------------------------------------
add("llama-sharded", "llama", lora(target_modules="all-linear"), tags="sharded", base={"layout": "sharded"})
add("llama-sharded-bf16", "llama", lora(), tags="sharded half", dtype="bfloat16", base={"layout": "sharded"})
add("llama-base-bin", "llama", lora(), tags="base_pickled", base={"layout": "bin"})
add(
    "llama-base-sharded-bin",
    "llama",
    lora(use_dora=True),
    tags="base_pickled sharded dora",
    base={"layout": "sharded_bin"},
)
add(
    "qwen2-sharded-tied-embed",
    "qwen2",
    lora(target_modules=["embed_tokens"]),
    tags="sharded tied",
    base={"layout": "sharded"},
    notes=_note,
    **_wrong,
)
add(
    "mixtral-sharded-experts",
    "mixtral",
    lora(target_modules=["q_proj"], target_parameters=[_GATE_UP]),
    tags="sharded target_parameters",
    base={"layout": "sharded"},
)

# --- inits that end as plain LoRA ---------------------------------------------------------------------------------------
add(
    "llama-pissa-converted",
    "llama",
    Adapter(make=special.converted("pissa")),
    tags="converted",
    notes="rank doubled on saving; plain LoRA for the original base",
)
add("llama-olora-converted", "llama", Adapter(make=special.converted("olora")), tags="converted")
add("llama-orthogonal", "llama", lora(init_lora_weights="orthogonal"), tags="config")

# --- several adapters in one merge --------------------------------------------------------------------------------------
add(
    "llama-two-adapters",
    "llama",
    Adapter({"target_modules": ["q_proj", "v_proj"]}, weight=0.7),
    Adapter({"target_modules": ["v_proj", "up_proj"], "r": 2, "use_rslora": True}, weight=0.4),
    tags="several weights",
)
add(
    "gpt2-three-adapters",
    "gpt2",
    Adapter({"target_modules": ["c_attn"]}, weight=1.0),
    Adapter({"target_modules": ["c_attn", "c_fc"], "r": 3}, weight=-0.6),
    Adapter({"target_modules": ["c_fc"], "lora_alpha": 1, "r": 1}, weight=2.5),
    tags="several weights conv1d",
)
add(
    "bert-weighted-bias",
    "bert",
    Adapter({"target_modules": ["query"], "lora_bias": True}, weight=0.3),
    tags="weights lora_bias",
)
add(
    "torch-weighted",
    "torch_module",
    Adapter({"target_modules": ["embed", "conv2", "head"]}, weight=0.3),
    tags="weights conv embedding",
)
add(
    "llama-dora-then-lora",
    "llama",
    Adapter({"target_modules": ["q_proj"], "use_dora": True}),
    Adapter({"target_modules": ["v_proj"]}),
    tags="several dora",
    notes="different modules, so the order is nothing",
)
