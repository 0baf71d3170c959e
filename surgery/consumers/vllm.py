# SPDX-License-Identifier: Apache-2.0
"""vLLM: LoRA of linear layers, embeddings and heads; scales by configuration, patterns since 0.33."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead, honoured, refused
from surgery.consumers.scales import alpha_over_r_or_root

__all__ = ["VLLM"]

_UNKNOWN = "no tensor of such a name: 'unsupported LoRA weight'"

VLLM = RuledConsumer(
    name="vllm",
    title="vLLM",
    version="0.33.0",
    oldest="0.9",
    sources=(
        SourceRead("vllm", "0.33.0", "vllm/lora/peft_helper.py", "PEFTHelper"),
        SourceRead("vllm", "0.33.0", "vllm/lora/utils.py", "parse_fine_tuned_lora_name"),
        SourceRead("vllm", "0.33.0", "vllm/lora/lora_model.py", "LoRAModel.from_local_checkpoint"),
        SourceRead("vllm-project/vllm", "02143692", "vllm/lora/peft_helper.py", "PEFTHelper, without patterns"),
    ),
    scale=alpha_over_r_or_root,
    scale_since=(((0, 33), None),),
    rules={
        "LoRA of an embedding": honoured,
        "LoRA of the head": honoured,
        "LoRA of one expert": honoured,
        "LoRA of stacked experts": honoured,
        "LoRA of a turned weight": honoured,
        "LoRA of a convolution": refused("it has LoRA for linear layers and embeddings", "drop"),
        "LoRA on a changed base": refused("it takes the factors for a LoRA of the base as it is", "lora"),
        "DoRA": refused("'vLLM does not yet support DoRA'", "lora"),
        "other kind": refused("it loads LoRA alone: its configuration lacks 'r' or 'lora_alpha'", "lora"),
        "bias of a LoRA": refused("'vLLM does not support LoRA bias'", "drop"),
        "trained bias": refused("'Adapter bias is not supported'", "drop"),
        "saved norm": refused(_UNKNOWN, "drop"),
        "saved head": honoured,  # 'score' and 'classifier' of classification models
        "saved module": refused(
            "'vLLM only supports modules_to_save being either None or [classifier, score]'", "saved"
        ),
        "saved vocabulary": refused(
            "'vLLM only supports modules_to_save being either None or [classifier, score]'", "saved"
        ),
        "carried weight": honoured,
        "added rows": refused(_UNKNOWN, "drop"),
        "token rows": refused(_UNKNOWN, "drop"),
        "virtual tokens": refused("it loads LoRA alone"),
        "pattern of targets": honoured,  # it goes by the tensors' names
        "targeted parameters": honoured,
        "added tokens": honoured,  # not looked at: the rows that they need are refused as such
        "pickled weights": honoured,
        "other weight files": refused("it opens adapter_model.safetensors, .bin or .pt", "rewrite"),
    },
)
