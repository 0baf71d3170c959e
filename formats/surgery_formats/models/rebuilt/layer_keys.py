# SPDX-License-Identifier: Apache-2.0
"""Keys of configurations that speak of layers by their number, and the types that say it by a rule of their own.

Checked against transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["LAST_IS_FULL", "LISTED", "LISTS", "NUMBERS", "OF_LAYERS", "OTHER_LISTS", "PERIODS", "REFUSED"]

LISTS = (
    *("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers", "layers_block_type", "layer_rope_theta"),
    *("indexer_types", "num_attention_heads_per_layer", "num_key_value_heads_per_layer", "activation_sparsity_pattern"),
    *("intermediate_size", "sliding_windows", "block_configs", "num_query_heads", "num_kv_heads", "ffn_multipliers"),
    *("num_key_value_heads", "num_attention_heads", "hybrid_override_pattern", "hybrid_layer_pattern"),
)
"""What has an entry for each layer, where it is a list."""
NUMBERS = (
    *("mlp_only_layers", "cross_attention_layers", "full_attn_idxs", "attn_layer_indices", "hybrid_layer_ids"),
    *("moe_layers", "local_layer_ids", "global_layers", "ple_layer_ids", "rope_scaling_layers", "global_attn_indexes"),
    *("fullatt_block_indexes", "window_block_indices", "window_block_indexes", "global_attention_blocks"),
)
"""Lists of the numbers of layers."""
OF_LAYERS = re.compile(r"(layer|block)(s|_ids|_idxs?|_index(es)?|_indices|_numbers)$")
"""Names of lists of numbers of layers that are not known."""
OTHER_LISTS = frozenset(
    {
        *("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens"),
        *("keys_to_ignore_at_inference", "mrope_section", "summary_proj_to_labels", "labels", "decoder_start_token_id"),
    }
)
PERIODS = (
    *("attn_layer_period", "expert_layer_period", "interleave_moe_layer_step", "moe_layer_freq"),
    *("moe_layer_frequency", "layer_group_size", "moe_every_n_layers", "moe_layer_interval", "cross_layer_interval"),
    "dense_attention_every_n_layers",
)
"""Rules by which every n-th layer is of another kind."""
REFUSED = ("num_kv_shared_layers", "num_last_full_attention_layers", "num_first_full_attention_layers")
"""Rules that count from the last layer, or tie layers to others."""
LAST_IS_FULL = ("gemma4_text", "gemma4_unified_text", "diffusion_gemma_text", "embedding_gemma2_text")
"""Types whose last layer attends to everything, whatever config.json says of it (transformers 5)."""
_NOT_LISTED = [
    "afmoe",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "cohere2_moe",
    "cwm",
    "deepseek_v4",
    "diffusion_gemma_text",
    "embedding_gemma2_text",
    "exaone4",
    "exaone_moe",
    "flint",
    "gemma3n_text",
    "gemma4_text",
    "gemma4_unified_text",
    "glm5_next_text",
    "granite_swa",
    "granitemoe_swa",
    "inkling2_text",
    "inkling_text",
    "kimi_linear",
    "kolibri1",
    "lfm2",
    "lfm3",
    "lfm3_vl_vision",
    "llama4_text",
    "mimo_v2_flash",
    "minimax",
    "modernbert-decoder",
    "muse_glimmer_text",
    "muse_glimmer_vision",
    "muse_spark_text",
    "muse_spark_vision",
    "nemotron_h",
    "neomme",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen4_exp_text",
    "t5_gemma_module",
    "t5gemma2_decoder",
    "t5gemma2_text",
    "ultrabert",
    "vaultgemma",
    "zamba",
    "zamba2",
]
"""Types whose layers differ by a rule of their own, if config.json does not list their types."""
LISTED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_NOT_LISTED, ("layer_types",)),
    "hy_v4": ("indexer_types",),
    "llama4_text": ("layer_types", "no_rope_layers"),
    "mistral_large4_text": ("no_rope_layers", "kv_source_layers"),
    "molmo2_text": ("rope_scaling_layers",),
    "muse_glimmer_text": ("layer_types", "layer_rope_theta"),
    "muse_spark_text": ("layer_types", "layer_rope_theta"),
    "rf_detr_dinov2": ("window_block_indexes",),
}
"""What config.json has to list of each of these types."""
