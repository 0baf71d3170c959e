# SPDX-License-Identifier: Apache-2.0
"""Small models for `same_bytes.py`: their configurations, and the names and shapes of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["EXPERTS", "HEAD", "HIDDEN", "KEYS", "LAYERS", "LM", "MLP", "MODELS", "VOCABULARY", "Shape"]

Shape = tuple[int, ...]

HIDDEN, MLP, VOCABULARY, LAYERS, HEADS, EXPERTS = 32, 56, 99, 2, 4, 3
KEYS = HIDDEN // 2  # width of keys and values: two heads serve four

LM: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}


def _shapes(
    prefix: str, linears: Mapping[str, Shape], vectors: Mapping[str, int], biased: str = ""
) -> dict[str, Shape]:
    """Of all layers; linears whose name holds one of the words of `biased` have a bias too."""
    shapes: dict[str, Shape] = {}
    for layer in range(LAYERS):
        for name, shape in linears.items():
            shapes[f"{prefix}.{layer}.{name}.weight"] = shape
            if any(word in name for word in biased.split()):
                shapes[f"{prefix}.{layer}.{name}.bias"] = (shape[-1],) if ".c_" in f".{name}" else (shape[0],)
        shapes |= {f"{prefix}.{layer}.{name}": (size,) for name, size in vectors.items()}
    return shapes


def _norm(name: str) -> dict[str, int]:
    return {f"{name}.weight": HIDDEN, f"{name}.bias": HIDDEN}


ATTENTION = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
}
GATED_MLP = {"mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP)}
NORMS = {"input_layernorm.weight": HIDDEN, "post_attention_layernorm.weight": HIDDEN}
ENDS: dict[str, Shape] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
HEAD: dict[str, Shape] = {"lm_head.weight": (VOCABULARY, HIDDEN)}
SQUARE = (HIDDEN, HIDDEN)
EXPERT = {"w1": (24, HIDDEN), "w2": (HIDDEN, 24), "w3": (24, HIDDEN)}

MODELS: dict[str, tuple[dict[str, Any], dict[str, Shape]]] = {
    "llama": (
        {**GROUPED, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {**_shapes("model.layers", ATTENTION | GATED_MLP, NORMS), **ENDS, **HEAD},
    ),
    "qwen2": (  # tied, biases on q, k and v
        {**GROUPED, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
        {**_shapes("model.layers", ATTENTION | GATED_MLP, NORMS, "q_proj k_proj v_proj"), **ENDS},
    ),
    "gpt2": (  # Conv1D: stored (in, out)
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": True}
        | {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "layer_norm_epsilon": 1e-5},
        {
            **_shapes(
                "transformer.h",
                {
                    "attn.c_attn": (HIDDEN, 96),
                    "attn.c_proj": SQUARE,
                    "mlp.c_fc": (HIDDEN, 128),
                    "mlp.c_proj": (128, HIDDEN),
                },
                _norm("ln_1") | _norm("ln_2"),
                "c_",
            ),
            "transformer.wte.weight": (VOCABULARY, HIDDEN),
            "transformer.wpe.weight": (64, HIDDEN),
            "transformer.ln_f.weight": (HIDDEN,),
            "transformer.ln_f.bias": (HIDDEN,),
        },
    ),
    "mixtral": (
        {**GROUPED, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "intermediate_size": 24}
        | {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
        {
            **_shapes(
                "model.layers",
                {
                    **ATTENTION,
                    "block_sparse_moe.gate": (EXPERTS, HIDDEN),
                    **{f"block_sparse_moe.experts.{e}.{w}": s for e in range(EXPERTS) for w, s in EXPERT.items()},
                },
                NORMS,
            ),
            **ENDS,
            **HEAD,
        },
    ),
    "phi3": (  # fused projections
        {**GROUPED, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 64},
        {
            **_shapes(
                "model.layers",
                {"self_attn.qkv_proj": (HIDDEN + 2 * KEYS, HIDDEN), "self_attn.o_proj": SQUARE}
                | {"mlp.gate_up_proj": (2 * MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP)},
                NORMS,
            ),
            **ENDS,
            **HEAD,
        },
    ),
    "gemma3": (  # local and global layers, norms of queries and keys
        {**GROUPED, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "tie_word_embeddings": True}
        | {"head_dim": 8, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24, "sliding_window": 5}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        {
            **_shapes(
                "model.layers",
                ATTENTION | GATED_MLP,
                NORMS
                | {"pre_feedforward_layernorm.weight": HIDDEN, "post_feedforward_layernorm.weight": HIDDEN}
                | {"self_attn.q_norm.weight": 8, "self_attn.k_norm.weight": 8},
            ),
            **ENDS,
        },
    ),
    "gpt_neox": (  # q, k and v head by head, parallel branches
        {
            "model_type": "gpt_neox",
            "architectures": ["GPTNeoXForCausalLM"],
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu",
        }
        | {"rotary_pct": 0.25, "use_parallel_residual": True},
        {
            **_shapes(
                "gpt_neox.layers",
                {"attention.query_key_value": (96, HIDDEN), "attention.dense": SQUARE}
                | {"mlp.dense_h_to_4h": (MLP, HIDDEN), "mlp.dense_4h_to_h": (HIDDEN, MLP)},
                _norm("input_layernorm") | _norm("post_attention_layernorm"),
                "query dense",
            ),
            "gpt_neox.embed_in.weight": (VOCABULARY, HIDDEN),
            "embed_out.weight": (VOCABULARY, HIDDEN),
            "gpt_neox.final_layer_norm.weight": (HIDDEN,),
            "gpt_neox.final_layer_norm.bias": (HIDDEN,),
        },
    ),
    "bert": (
        {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "type_vocab_size": 2}
        | {"id2label": {"0": "a", "1": "b", "2": "c"}, "layer_norm_eps": 1e-12, "hidden_act": "gelu"},
        {
            **_shapes(
                "bert.encoder.layer",
                {f"attention.self.{name}": SQUARE for name in ("query", "key", "value")}
                | {
                    "attention.output.dense": SQUARE,
                    "intermediate.dense": (MLP, HIDDEN),
                    "output.dense": (HIDDEN, MLP),
                },
                _norm("attention.output.LayerNorm") | _norm("output.LayerNorm"),
                "query key value dense",
            ),
            "bert.embeddings.word_embeddings.weight": (VOCABULARY, HIDDEN),
            "bert.embeddings.position_embeddings.weight": (64, HIDDEN),
            "bert.embeddings.token_type_embeddings.weight": (2, HIDDEN),
            **{f"bert.embeddings.{name}": (size,) for name, size in _norm("LayerNorm").items()},
            "bert.pooler.dense.weight": SQUARE,
            "bert.pooler.dense.bias": (HIDDEN,),
            "classifier.weight": (3, HIDDEN),
            "classifier.bias": (3,),
        },
    ),
    "layers": (  # of no known family: every kind of layer a LoRA fits
        {},
        {
            "embed.weight": (17, 12),
            "conv1.weight": (10, 12, 3),
            "conv1.bias": (10,),
            "conv2.weight": (6, 4, 3, 2),
            "conv3.weight": (4, 2, 2, 3, 1),
            "attention.in_proj_weight": (30, 10),
            "attention.in_proj_bias": (30,),
            "attention.out_proj.weight": (10, 10),
            "attention.out_proj.bias": (10,),
            "head.weight": (7, 10),
        },
    ),
}

LLAMA = MODELS["llama"][1]
MODELS |= {  # llama's tensors, computed with otherwise
    "mistral": (
        {**GROUPED, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5}
        | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        LLAMA,
    ),
    "granite": (
        {**GROUPED, "model_type": "granite", "architectures": ["GraniteForCausalLM"], "embedding_multiplier": 3.0}
        | {"residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 2.5},
        LLAMA,
    ),
    "smollm3": (
        {**GROUPED, "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0]},
        LLAMA,
    ),
}
