# SPDX-License-Identifier: Apache-2.0
"""diffusers: ``load_lora_weights`` of pipelines; single files of kohya's and its own keys, LoRA and DoRA alone.

Its converters of kohya's keys hold less than their files: magnitudes are filtered out before any of them, of Flux they
give the layers outside the blocks no prefix, and not every pipeline has one. Its own keys it loads as they are. Of files with
the modules' names alone it has converters for three of Flux: XLabs', fal's, and Black Forest Labs' control LoRAs.
"""

from __future__ import annotations

import re
from dataclasses import replace

from surgery.consumers.consumer import RuledConsumer, SourceRead
from surgery.consumers.facts import AdapterFacts
from surgery.consumers.part import AdapterPart
from surgery.consumers.rules import TraitRule, honoured, ignored, refused
from surgery.consumers.starts import NO_FOLDERS, lora_alone
from surgery_formats.updates import Update, is_directed

__all__ = ["DIFFUSERS"]

_NO_LORA = "a key that is no LoRA's"
_CONVERTED = ("Stable Diffusion XL", "Stable Diffusion 1", "Flux", "Chroma", "Wan", "Qwen-Image", "Z-Image")
"""Families, some of them told from others by no name, whose pipelines convert kohya's keys."""
_ENCODERS = {"Flux or HunyuanVideo": 1, "Flux": 1, "Flux, Stable Diffusion 3 or Qwen-Image": 2}
"""Text encoders that a pipeline loads LoRAs into: of Stable Diffusion one and two, of other families none."""
_OUTSIDE = ("img_in", "txt_in", "time_in_", "vector_in_", "guidance_in_", "final_layer_")
_OF_CONTROL = re.compile(r"norm\.(query|key)_norm\.scale$|\.norm_(added_)?[qk]\.weight$")

_OF_FLUX = re.compile(r"\.processor\.|\.query_norm\.scale$|^base_model\.")
"""Names by which it tells files of XLabs, control LoRAs and fal's."""
_TURNED = "final_layer.adaLN_modulation.1.weight"

_NO_ENCODER = ignored("its pipeline of this network loads no LoRA into this text encoder", "drop")
_WITHOUT_LENGTHS = ignored(
    "it filters 'dora_scale' out, with a warning in its log, and loads the rest as a LoRA", "rewrite"
)
_WITHOUT_PREFIX = ignored(
    "its converter gives this layer no 'transformer.', and keys without it are passed over", "rewrite"
)
_NOT_CONVERTED = ignored(
    "its pipeline of this network does not convert kohya's keys, and finds none of its own", "rewrite"
)

_OTHER_CHANGE = ignored(
    "its converter exchanges the halves of both factors, where those of the first are no shift and scale: another change",
    "rewrite",
)


def _is_of_flux(facts: AdapterFacts) -> bool:
    """Whether it is a file of Flux with the modules' names alone that diffusers converts."""
    names = (tensor.name for tensor in facts.adapter.tensors)
    return facts.adapter.format == "bare" and "Flux" in facts.denoiser and any(map(_OF_FLUX.search, names))


def _of_dora(part: AdapterPart, update: Update, facts: AdapterFacts) -> TraitRule | None:
    """By how its lengths are spelt, and whose they are; beside a LoRA in its network, PEFT finds none for that one."""
    spelt = any(tensor.name.endswith(".dora_scale") for tensor in update.tensors)
    of_columns = is_directed(update) and not update.per_row
    network = part.name.rpartition(":")[0]
    beside = any(other.trait == "LoRA" and other.name.rpartition(":")[0] == network for other in facts.parts)
    if spelt and (of_columns or beside):
        return replace(_WITHOUT_LENGTHS, remedy="lora")
    return _WITHOUT_LENGTHS if spelt else None


def _of_file(part: AdapterPart, facts: AdapterFacts, version: tuple[int, ...]) -> TraitRule | None:
    """By the network, and by the spelling of the file."""
    component, _, path = part.name.rpartition(":")
    family = facts.denoiser
    if component.startswith("text_encoder"):
        loaded = _ENCODERS.get(family, 2 if not family or family.startswith("Stable Diffusion") else 0)
        if component not in ("text_encoder", "text_encoder_2")[:loaded]:
            return _NO_ENCODER
    if part.trait == "DoRA" and part.update is not None:
        return _of_dora(part, part.update, facts)
    if part.trait == "saved norm" and _OF_CONTROL.search(path):
        return honoured
    if facts.adapter.format == "bare" and path == _TURNED and any(one.trait == "saved norm" for one in facts.parts):
        return _OTHER_CHANGE
    if facts.adapter.format != "kohya" or part.scale is None or component.startswith("text_encoder") or not family:
        return None
    if not any(name in family for name in _CONVERTED):
        return _NOT_CONVERTED
    return _WITHOUT_PREFIX if family in ("Flux or HunyuanVideo", "Flux") and path.startswith(_OUTSIDE) else None


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
        SourceRead(
            "diffusers", "0.42.1", "diffusers/loaders/lora_conversion_utils.py", "_convert_kohya_flux_lora_to_diffusers"
        ),
        *(
            SourceRead("diffusers", "0.42.1", "diffusers/loaders/lora_conversion_utils.py", name)
            for name in (
                "_convert_xlabs_flux_lora_to_diffusers",
                "_convert_bfl_flux_control_lora_to_diffusers",
                "_convert_fal_kontext_lora_to_diffusers",
            )
        ),
        SourceRead("diffusers", "0.42.1", "diffusers/loaders/lora_pipeline.py", "FluxLoraLoaderMixin.lora_state_dict"),
        SourceRead("diffusers", "0.42.1", "diffusers/loaders/peft.py", "PeftAdapterMixin.load_lora_adapter"),
    ),
    format="diffusers",
    reads=frozenset({"kohya", "diffusers"}),
    reads_too=_is_of_flux,
    exceptions=_of_file,
    rules={
        **NO_FOLDERS,
        **lora_alone(refused, _NO_LORA),
        "LoRA of stacked experts": refused(_NO_LORA, "drop"),
        "LoRA on a changed base": refused(_NO_LORA, "lora"),
        "DoRA": honoured,
        "bias of a LoRA": honoured,
    },
)
