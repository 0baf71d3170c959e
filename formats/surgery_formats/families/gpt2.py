# SPDX-License-Identifier: Apache-2.0
"""GPT-2: Conv1D weights are ``(in, out)``; the head is the embedding; causal masks are stored by old files."""

from surgery_formats.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    names=("gpt2", "openai-gpt", "imagegpt", "decision_transformer"),
    embedding="transformer.wte",
    head="lm_head",
    tied=True,
    conv1d=("c_attn", "c_proj", "c_fc", "q_attn"),
    derivable=("attn.bias", "attn.masked_bias"),
)
