# SPDX-License-Identifier: Apache-2.0
"""diffusers: ``load_lora_weights`` of pipelines; single files of kohya's and its own keys, LoRA and DoRA alone."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead, honoured, ignored, refused

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
        "LoRA of an embedding": honoured,
        "LoRA of the head": honoured,
        "LoRA of one expert": honoured,
        "LoRA of stacked experts": refused(_NO_LORA, "drop"),
        "LoRA taken for experts": honoured,
        "LoRA of a turned weight": honoured,
        "LoRA of a convolution": honoured,
        "LoRA on a changed base": refused(_NO_LORA, "lora"),
        "DoRA": honoured,
        "other kind": refused(_NO_LORA, "lora"),
        "bias of a LoRA": refused(_NO_LORA, "drop"),
        "trained bias": refused(_NO_LORA, "drop"),
        "saved norm": refused(_NO_LORA, "drop"),
        "saved head": refused(_NO_LORA, "drop"),
        "saved module": refused(_NO_LORA, "saved"),
        "saved vocabulary": refused(_NO_LORA, "saved"),
        "carried weight": honoured,
        "added rows": refused(_NO_LORA, "drop"),
        "token rows": refused(_NO_LORA, "drop"),
        "virtual tokens": refused(_NO_LORA),
        "pattern of targets": honoured,
        "no targets": honoured,
        "beyond the targets": honoured,
        "missing fields": honoured,
        "bias setting": honoured,
        "promised modules": honoured,
        "null patterns": honoured,
        "block-diagonal factors": honoured,
        "bare names": honoured,
        "wrapped names": honoured,
        "doubled prefix": honoured,
        "names of an adapter": honoured,
        "targeted parameters": honoured,
        "added tokens": ignored("not looked at"),
        "pickled weights": honoured,
        "other weight files": honoured,
    },
)
