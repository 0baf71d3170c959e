# SPDX-License-Identifier: Apache-2.0
"""diffusers: ``load_lora_weights`` of pipelines; single files of kohya's and its own keys, LoRA and DoRA alone."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead
from surgery.consumers.rules import honoured, refused
from surgery.consumers.starts import NO_FOLDERS, lora_alone

__all__ = ["DIFFUSERS"]

_NO_LORA = "a key that is no LoRA's"

DIFFUSERS = RuledConsumer(
    name="diffusers",
    title="diffusers",
    version="0.42.1",
    oldest="0.42.1",
    sources=(
        SourceRead(
            "diffusers",
            "0.42.1",
            "diffusers/loaders/lora_conversion_utils.py",
            "_convert_non_diffusers_lora_to_diffusers",
        ),
        SourceRead("diffusers", "0.42.1", "diffusers/loaders/peft.py", "PeftAdapterMixin.load_lora_adapter"),
    ),
    format="kohya",
    reads=frozenset({"kohya", "diffusers"}),
    rules={
        **NO_FOLDERS,
        **lora_alone(refused, _NO_LORA),
        "LoRA of stacked experts": refused(_NO_LORA, "drop"),
        "LoRA on a changed base": refused(_NO_LORA, "lora"),
        "DoRA": honoured,
    },
)
