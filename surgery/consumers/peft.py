# SPDX-License-Identifier: Apache-2.0
"""PEFT, and transformers through it: every kind it saves is what it loads; files of other programs are not."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead, honoured, refused
from surgery.consumers.traits import TRAITS

__all__ = ["PEFT"]

PEFT = RuledConsumer(
    name="peft",
    title="PEFT and transformers",
    version="0.21.2",
    oldest="0.19",
    sources=(
        SourceRead("peft", "0.21.2", "peft/peft_model.py", "PeftModel.from_pretrained"),
        SourceRead("peft", "0.21.2", "peft/utils/save_and_load.py", "load_peft_weights, set_peft_model_state_dict"),
        SourceRead("transformers", "5.23.0", "transformers/integrations/peft.py", "PeftAdapterMixin.load_adapter"),
    ),
    rules=dict.fromkeys(TRAITS, honoured)
    | {
        "other weight files": refused(
            "it opens adapter_model.safetensors or adapter_model.bin, and no other file", "rewrite"
        ),
        "added rows": honoured,  # once the base's vocabulary is resized, as every program must
    },
)
