# SPDX-License-Identifier: Apache-2.0
"""vLLM: LoRA of linear layers, embeddings and heads; scales by configuration, patterns since 0.32."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead
from surgery.consumers.facts import AdapterFacts, lacks_experts
from surgery.consumers.part import AdapterPart
from surgery.consumers.rules import TraitRule, honoured, ignored, refused
from surgery.consumers.scales import alpha_over_r_or_root
from surgery.consumers.starts import BY_NAMES
from surgery_formats.adapters.peft.dialects.vllm import STACKED

__all__ = ["VLLM"]

_UNKNOWN = "no tensor of such a name: 'unsupported LoRA weight'"

_ONE_BY_ONE = "its class for this model takes experts one by one"
_WITH_EMBEDDINGS = frozenset(
    [
        "apertus",
        "exaone",
        "exaone4",
        "exaone_moe",
        "falcon_h1",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "granitemoeshared",
        "hyperclovax",
        "jamba",
        "k2_horizon",
        "lfm2",
        "lfm2_moe",
        "llama",
        "minicpm",
        "mixtral",
        "nemotron",
        "nemotron_h",
        "nemotron-nas",
        "phimoe",
        "qwen3",
        "qwen3_5",
        "qwen3_5_text",
        "qwen3_moe",
        "solar",
    ]
)
"""Model types whose class has ``embedding_modules`` for the embedding and the head; Cohere's has the embedding alone."""


def _of_model(part: AdapterPart, facts: AdapterFacts, version: tuple[int, ...]) -> TraitRule | None:
    """What depends on the class that serves the model."""
    kind = facts.model_type
    if part.trait in ("LoRA of an embedding", "LoRA of the head") and kind not in _WITH_EMBEDDINGS:
        if kind in ("cohere", "cohere2") and part.trait == "LoRA of an embedding":
            return honoured
        return refused(
            "its class for this model has no LoRA of the vocabulary: 'expected target modules in ...'", "drop"
        )
    if part.trait == "no targets" and part.name not in facts.config:
        return refused("'Missing required configuration fields'", "rewrite")
    if part.trait == "promised modules" and version >= (0, 31) and part.name in ("classifier", "score"):
        return honoured
    if part.trait in ("LoRA of stacked experts", "LoRA of one expert"):
        stacked = part.trait == "LoRA of stacked experts"
        if stacked and not kind.startswith(STACKED):
            return refused(_ONE_BY_ONE, "dialect")
        if stacked and facts.dialect not in ("peft", "vllm"):
            return refused("it takes stacks as PEFT has them since 0.19", "dialect")
        if not stacked and kind.startswith(STACKED):
            return refused("its class for this model takes stacks of experts", "dialect")
        if not stacked and lacks_experts(part, facts):
            return refused("it packs all projections of all experts of a layer", "dialect")
    return None


VLLM = RuledConsumer(
    name="vllm",
    title="vLLM",
    version="0.33.0",
    oldest="0.25",
    sources=(
        SourceRead("vllm", "0.33.0", "vllm/lora/peft_helper.py", "PEFTHelper"),
        SourceRead("vllm", "0.33.0", "vllm/lora/utils.py", "parse_fine_tuned_lora_name"),
        SourceRead("vllm", "0.33.0", "vllm/lora/lora_model.py", "LoRAModel.from_local_checkpoint"),
        SourceRead("vllm", "0.33.0", "vllm/lora/model_manager.py", "_validate_moe_lora_format"),
        SourceRead("vllm", "0.33.0", "vllm/model_executor/models", "embedding_modules, is_3d_moe_weight"),
        SourceRead("vllm", "0.25.0, 0.28.0, 0.30.0, 0.31.0, 0.32.0", "vllm/lora/peft_helper.py", "PEFTHelper"),
    ),
    scale=alpha_over_r_or_root,
    greatest_rank=16,
    dialect="vllm",
    exceptions=_of_model,
    scale_since=(((0, 32), None),),
    since=(
        ((0, 31), {"saved head": honoured}),  # 'score' and 'classifier' of classification models
        (
            (0, 32),
            {
                "LoRA on a changed base": refused("'vLLM does not support init_lora_weights=...'", "lora"),
                "block-diagonal factors": refused("'vLLM does not support block-diagonal LoRA'", "rewrite"),
            },
        ),
    ),
    rules={
        **BY_NAMES,
        "LoRA of a convolution": refused("it has LoRA for linear layers and embeddings", "drop"),
        "DoRA": refused("'vLLM does not yet support DoRA'", "lora"),
        "other kind": refused("it loads LoRA alone: its configuration lacks 'r' or 'lora_alpha'", "lora"),
        "bias of a LoRA": refused("no LoRA bias: 'unsupported LoRA weight'", "drop"),
        "trained bias": refused("'Adapter bias is not supported'", "drop"),
        "saved norm": refused(_UNKNOWN, "drop"),
        "saved head": refused("'vLLM only supports modules_to_save being None'", "drop"),
        "saved module": refused(
            "'vLLM only supports modules_to_save being either None or [classifier, score]'", "saved"
        ),
        "saved vocabulary": refused(
            "'vLLM only supports modules_to_save being either None or [classifier, score]'", "saved"
        ),
        "added rows": refused(_UNKNOWN, "drop"),
        "token rows": refused(_UNKNOWN, "drop"),
        "virtual tokens": refused("it loads LoRA alone"),
        "missing fields": refused("'Missing required configuration fields'", "rewrite"),
        "bias setting": refused("'Adapter bias is not supported', nor is lora_bias", "rewrite"),
        "promised modules": refused(
            "'vLLM only supports modules_to_save being either None or [classifier, score]'", "rewrite"
        ),
        "block-diagonal factors": ignored("blocks are taken for whole factors", "rewrite"),
        "wrapped names": ignored("its names are of no module", "rewrite"),
        "doubled prefix": honoured,
        "names of an adapter": refused(_UNKNOWN, "rewrite"),
        "pickled weights": honoured,
        "other weight files": refused("it opens adapter_model.safetensors, .bin or .pt", "rewrite"),
    },
)
