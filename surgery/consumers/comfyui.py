# SPDX-License-Identifier: Apache-2.0
"""ComfyUI: single files by key, kind by kind; a key that it does not know is a line in its log and no more.

It knows keys of the diffusion model that is loaded, and of that model's text encoders. Some of these are language models
(Qwen, Gemma, Llama), each under the name that it has there: ``text_encoders.qwen3_4b.transformer.model.layers.0...``. Of a
language model that is the base by itself nobody can tell that name.
"""

from __future__ import annotations

from dataclasses import replace

from surgery.consumers.consumer import RuledConsumer, SourceRead
from surgery.consumers.facts import AdapterFacts
from surgery.consumers.part import AdapterPart
from surgery.consumers.rules import TraitRule, honoured, ignored, refused
from surgery.consumers.starts import NO_FOLDERS
from surgery_formats.models.families.denoisers import COMPONENTS
from surgery_formats.models.layouts.parts import encoder_name

__all__ = ["COMFYUI"]

_LOG = "'lora key not loaded', in the log"
_NOT_KOHYAS = ignored("of kohya's keys it knows those of CLIP and T5; a language model has its own name in ComfyUI")
_CLIP = "clip_text_model"  # whose keys are the same in every file
_OF_NO_DIFFUSION = ignored(
    "it loads LoRAs of diffusion models and of the text encoders in them; the base is a language model by itself"
)


def _of_network(part: AdapterPart, facts: AdapterFacts, version: tuple[int, ...]) -> TraitRule | None:
    """By the base: a model of transformers is no diffusion model, and a language model in one has no keys of kohya's."""
    named, _, path = part.name.rpartition(":")
    if named.startswith("text_encoder") and facts.adapter.format == "kohya" and path.startswith(("model.", "model_")):
        names = facts.base.names_of(named)
        return replace(_NOT_KOHYAS, remedy="rewrite" if names and encoder_name(names.prefix) else "")
    config = facts.main.config
    alone = not facts.base.is_pipeline and "model_type" in config and "_class_name" not in config
    other = alone and facts.model_type != _CLIP and named in ("", *COMPONENTS)
    return _OF_NO_DIFFUSION if other and part.update is not None else None


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
    otherwise="comfyui",  # a text encoder that kohya has no name for
    reads=frozenset({"kohya", "diffusers", "comfyui", "bare"}),
    exceptions=_of_network,
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
