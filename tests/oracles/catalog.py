# SPDX-License-Identifier: Apache-2.0
"""Merge cases of the arithmetic: architectures, precision, scales and patterns, layer kinds, biases."""

from __future__ import annotations

from typing import Any

from tests.oracles import rewrites
from tests.oracles.cases import Adapter, add

__all__: list[str] = []


def lora(**config: Any) -> Adapter:
    return Adapter(config)


# --- every architecture: plain, rsLoRA, DoRA ------------------------------------------------------------------------------
ARCHITECTURES = [
    "llama",
    "qwen2",
    "gpt2",
    "bert",
    "t5",
    "opt",
    "gpt_neox",
    "phi3",
    "mixtral",
    "qwen2_moe",
    "vit",
    "resnet",
    "whisper",
    "torch_module",
]
for _arch in ARCHITECTURES:
    add(f"{_arch}-lora", _arch, lora(lora_alpha=7), tags="lora alpha")
    add(f"{_arch}-rslora", _arch, lora(use_rslora=True, r=3), tags="lora rslora")
    add(f"{_arch}-dora", _arch, lora(use_dora=True), tags="dora")

# --- half precision ---------------------------------------------------------------------------------------------------------
for _dtype, _short in (("bfloat16", "bf16"), ("float16", "fp16")):
    for _arch in ("llama", "gpt2", "gpt_neox", "qwen2", "vit", "resnet", "torch_module"):
        add(f"{_arch}-lora-{_short}", _arch, lora(), tags="lora half", dtype=_dtype)
    add(f"llama-rslora-{_short}", "llama", lora(use_rslora=True), tags="rslora half", dtype=_dtype)
    add(f"llama-dora-{_short}", "llama", lora(use_dora=True), tags="dora half", dtype=_dtype)
    add(f"gpt2-dora-{_short}", "gpt2", lora(use_dora=True), tags="dora half conv1d", dtype=_dtype)
    add(
        f"llama-embed-{_short}",
        "llama",
        lora(target_modules=["embed_tokens"]),
        tags="embedding half",
        dtype=_dtype,
        peft_rounds_once=False,
        notes="PEFT rounds twice: it casts the embedding's delta to the base dtype first",
    )
    add(
        f"mixtral-experts-{_short}",
        "mixtral",
        lora(target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        tags="target_parameters half",
        dtype=_dtype,
        peft_rounds_once=False,
        notes="PEFT rounds twice: it casts the experts' delta to the base dtype first",
    )
    add(
        f"bert-lora-bias-{_short}",
        "bert",
        lora(target_modules=["query"], lora_bias=True),
        tags="lora_bias half",
        dtype=_dtype,
    )
    add(
        f"llama-two-adapters-{_short}",
        "llama",
        Adapter({"target_modules": ["q_proj"]}, weight=0.75),
        Adapter({"target_modules": ["q_proj", "up_proj"], "r": 2}, weight=-0.5),
        tags="several weights half",
        dtype=_dtype,
        peft_rounds_once=False,
        notes="PEFT rounds after each adapter",
    )
add(
    "llama-mixed-dtypes",
    "llama",
    lora(modules_to_save=["norm"]),
    tags="half mixed modules_to_save",
    dtype="bfloat16",
    base={"float32_parts": "norm"},
    peft_rounds_once=False,
    notes="norms are stored float32 in a bfloat16 checkpoint and stay so; PEFT writes all in bfloat16",
)
add(
    "mixtral-mixed-router",
    "mixtral",
    lora(target_modules=["q_proj"], target_parameters=["mlp.gate.weight"]),
    tags="half mixed target_parameters",
    dtype="bfloat16",
    base={"float32_parts": "gate.weight"},
    peft_rounds_once=False,
    notes="a float32 router is updated in float32; PEFT writes all in bfloat16",
)

# --- rank, alpha, patterns, targets ---------------------------------------------------------------------------------------
add("llama-alpha-float", "llama", lora(lora_alpha=2.5, r=5), tags="alpha")
add("llama-alpha-negative", "llama", lora(lora_alpha=-3), tags="alpha", notes="legal, if odd: a warning at most")
add("llama-rank-one", "llama", lora(r=1, lora_alpha=1), tags="rank")
add("llama-rank-above-width", "llama", lora(r=40, lora_alpha=2), tags="rank", notes="rank 40 in a matrix of width 32")
add(
    "llama-patterns",
    "llama",
    lora(
        rank_pattern={"layers.0.self_attn.q_proj": 2, "v_proj": 6, "q_proj": 3},
        alpha_pattern={"v_proj": 11, "layers.1.self_attn.q_proj": 5},
    ),
    tags="rank_pattern alpha_pattern",
)
add(
    "llama-patterns-first-wins",
    "llama",
    lora(
        rank_pattern={"q_proj": 2, "layers.1.self_attn.q_proj": 6, r"layers\.[01]\.mlp\..*": 3, "up_proj": 7},
        alpha_pattern={
            r".*layers\.1\..*": 3,
            "q_proj": 16,
            "layers.1.self_attn.q_proj": 99,
            "(up|down)_proj": 20,
            ".*": 1,
        },
    ),
    tags="rank_pattern alpha_pattern regex",
    notes="several patterns match one module: the first in the file counts, and the file is not sorted",
)
add(
    "llama-patterns-anchored",
    "llama",
    lora(
        target_modules=["q_proj", "o_proj"],
        alpha_pattern={"proj": 50, "^model.layers.0.self_attn.q_proj": 9, r"self_attn\.o_proj": 4, "attn.q_proj": 77},
    ),
    tags="alpha_pattern regex",
    notes="'proj' and 'attn.q_proj' are no dotted suffix of any module and match nothing",
)
add(
    "llama-rslora-patterns",
    "llama",
    lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 9}),
    tags="rslora rank_pattern",
)
add(
    "llama-dora-patterns",
    "llama",
    lora(use_dora=True, rank_pattern={"q_proj": 2, "up_proj": 9}, alpha_pattern={"v_proj": 3}),
    tags="dora rank_pattern",
)
add("llama-dora-rslora", "llama", lora(use_dora=True, use_rslora=True), tags="dora rslora")
add("llama-layers", "llama", lora(layers_to_transform=[1]), tags="layers_to_transform")
add("llama-layers-pattern", "llama", lora(layers_to_transform=0, layers_pattern="layers"), tags="layers_to_transform")
add(
    "llama-exclude",
    "llama",
    lora(target_modules="all-linear", exclude_modules=["q_proj", "layers.0.mlp.up_proj"]),
    tags="exclude_modules all-linear",
)
add("qwen2-all-linear", "qwen2", lora(target_modules="all-linear"), tags="all-linear")
add("mixtral-all-linear", "mixtral", lora(target_modules="all-linear"), tags="all-linear")
add("llama-regex-targets", "llama", lora(target_modules=r".*\.1\.(self_attn\.[qk]_proj|mlp\.down_proj)"), tags="regex")
add(
    "llama-full-path-targets",
    "llama",
    lora(target_modules=["model.layers.0.self_attn.q_proj", "lm_head"]),
    tags="targets lm_head",
)
add(
    "llama-module-without-tensors",
    "llama",
    Adapter({}, edit=rewrites.drop("layers.0.self_attn.v_proj", "layers.1.mlp")),
    tags="without_tensors",
    notes="modules that are targeted but have no tensors are legal: some trainers store the last layers only",
)
add("phi3-fused-qkv-patterns", "phi3", lora(rank_pattern={"qkv_proj": 2}), tags="fused rank_pattern")
add("gpt_neox-head", "gpt_neox", lora(target_modules=["query_key_value", "lm_head"]), tags="names lm_head")
add(
    "qwen2_moe-shared-expert",
    "qwen2_moe",
    lora(target_modules=["gate_proj", "down_proj", "shared_expert_gate"]),
    tags="moe",
)
add(
    "whisper-conv",
    "whisper",
    lora(target_modules=["conv1", "conv2", "fc1"], use_rslora=True),
    tags="conv rslora",
    notes="Conv1d is no Conv1D",
)
add("vit-patch-conv", "vit", lora(target_modules=["projection", "q_proj"]), tags="conv names")

# --- layers other than Linear ----------------------------------------------------------------------------------------------
add(
    "gpt2-flag-off",
    "gpt2",
    Adapter({}, rewrite=rewrites.config(fan_in_fan_out=False)),
    tags="conv1d",
    notes="the flag lies; the architecture decides",
)
add(
    "llama-flag-on",
    "llama",
    Adapter({}, rewrite=rewrites.config(fan_in_fan_out=True)),
    tags="conv1d",
    notes="the flag lies; nn.Linear is not transposed",
)
for _conv in ("conv1", "conv2", "conv2_point", "conv3"):
    add(f"torch-{_conv}", "torch_module", lora(target_modules=[_conv]), tags="conv")
    add(f"torch-{_conv}-dora", "torch_module", lora(target_modules=[_conv], use_dora=True), tags="conv dora")
add(
    "torch-conv-bias",
    "torch_module",
    lora(target_modules=["conv1", "conv2", "conv3"], lora_bias=True),
    tags="conv lora_bias",
)
add("torch-embedding", "torch_module", lora(target_modules=["embed"]), tags="embedding")
add("torch-embedding-dora", "torch_module", lora(target_modules=["embed"], use_dora=True), tags="embedding dora")
add(
    "torch-embedding-rslora",
    "torch_module",
    lora(target_modules=["embed"], use_rslora=True, r=2),
    tags="embedding rslora",
)
add("torch-mha", "torch_module", lora(target_modules=["attention"]), tags="mha")
add("torch-mha-rslora", "torch_module", lora(target_modules=["attention", "head"], use_rslora=True), tags="mha rslora")
add(
    "torch-everything",
    "torch_module",
    lora(target_modules=["attention", "head", "tail", "embed", "conv1", "conv2", "conv3"]),
    tags="mha conv embedding",
)
add(
    "torch-everything-fp16",
    "torch_module",
    lora(target_modules=["head", "conv1", "conv2", "conv3"]),
    tags="conv half",
    dtype="float16",
)
add(
    "llama-embed",
    "llama",
    lora(target_modules=["embed_tokens"]),
    tags="embedding",
    notes="the file carries a copy of the base embedding",
)
add(
    "llama-embed-dora",
    "llama",
    lora(target_modules=["embed_tokens", "lm_head", "q_proj"], use_dora=True),
    tags="embedding dora lm_head",
)
add("gpt2-positions", "gpt2", lora(target_modules=["wpe", "c_attn"]), tags="embedding conv1d")

# --- biases -----------------------------------------------------------------------------------------------------------------
for _arch, _targets in (("qwen2", ["q_proj", "v_proj"]), ("gpt2", ["c_attn"]), ("bert", ["query", "dense"])):
    add(f"{_arch}-lora-bias", _arch, lora(target_modules=_targets, lora_bias=True), tags="lora_bias")
    add(f"{_arch}-bias-all", _arch, lora(target_modules=_targets, bias="all"), tags="bias_all")
    add(f"{_arch}-bias-lora-only", _arch, lora(target_modules=_targets, bias="lora_only"), tags="bias_lora_only")
add(
    "bert-lora-bias-rslora",
    "bert",
    lora(target_modules=["query"], lora_bias=True, use_rslora=True),
    tags="lora_bias rslora",
)
add("torch-bias-all", "torch_module", lora(target_modules=["conv1", "head"], bias="all"), tags="bias_all conv")
