# SPDX-License-Identifier: Apache-2.0
"""Merge cases of one meaning written in several ways: names, how adapter and base are stored, starts, several adapters."""

from __future__ import annotations

from tests.oracles import rewrites, special
from tests.oracles.cases import Adapter, add
from tests.oracles.catalog import lora
from tests.oracles.catalog_parts import GATE_UP, PEFT_CHANGES_BOTH

__all__: list[str] = []

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
    **PEFT_CHANGES_BOTH,
)
add(
    "mixtral-sharded-experts",
    "mixtral",
    lora(target_modules=["q_proj"], target_parameters=[GATE_UP]),
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
