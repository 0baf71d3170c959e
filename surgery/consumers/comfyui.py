# SPDX-License-Identifier: Apache-2.0
"""ComfyUI: single files by key, kind by kind; a key that it does not know is a line in its log and no more."""

from __future__ import annotations

from surgery.consumers.consumer import RuledConsumer, SourceRead
from surgery.consumers.rules import honoured, ignored, refused
from surgery.consumers.starts import NO_FOLDERS

__all__ = ["COMFYUI"]

_LOG = "'lora key not loaded', in the log"


COMFYUI = RuledConsumer(
    name="comfyui",
    title="ComfyUI",
    version="0.8.1",
    oldest="0.8.1",
    sources=(
        SourceRead("comfyanonymous/ComfyUI", "00728eb2", "comfy/lora.py", "load_lora"),
        SourceRead("comfyanonymous/ComfyUI", "0323d874", "comfy/weight_adapter/lora.py", "LoRAAdapter.load"),
        SourceRead("comfyanonymous/ComfyUI", "0bca89eb", "comfy/weight_adapter/__init__.py", "adapters"),
    ),
    format="kohya",
    reads=frozenset({"kohya", "diffusers", "comfyui", "bare"}),
    of_kinds={"IA3": ignored(_LOG, "lora")},  # the one kind of LyCORIS that it has no class for
    rules={
        **NO_FOLDERS,
        "LoRA of stacked experts": ignored(_LOG, "drop"),
        "LoRA on a changed base": ignored(_LOG, "lora"),
        "DoRA": honoured,
        "other kind": honoured,  # LoHa, LoKr, OFT, BOFT, GLoRA and differences have adapters of their own
        "bias of a LoRA": honoured,
        "trained bias": honoured,
        "saved norm": honoured,
        "saved head": honoured,
        "saved module": honoured,
        "saved vocabulary": honoured,
        "added rows": refused("a difference of another shape", "drop"),
        "token rows": ignored(_LOG, "drop"),
        "virtual tokens": ignored(_LOG),
    },
)
