# SPDX-License-Identifier: Apache-2.0
"""Which program wrote a file, and what for, by its header and the spelling of its keys.

Fields of headers as these write them: sd-scripts (``library/sai_model_spec.py``, ``library/train_util.py``), musubi-tuner
(``utils/sai_model_spec.py``), ai-toolkit (``toolkit/metadata.py``), ComfyUI (``nodes_model_merging.py``, ``save_checkpoint``)
and diffusers 0.42.1 (``loaders/lora_base.py``, ``LORA_ADAPTER_METADATA_KEY``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from surgery_formats.text import show

__all__ = ["TOOLS", "Tool", "stated_base", "tool_of"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A program that writes adapters.

    Attributes:
        name: As people call it.
        field: A field of the header that it writes, as a pattern; empty for one that is told by keys.
        value: A pattern that the field's value has.
        key: A pattern that one of the file's keys matches; empty for one that is told by the header.
    """

    name: str
    field: str = ""
    value: str = ""
    key: str = ""

    def evidence(self, names: Collection[str], metadata: Mapping[str, str]) -> str:
        """The field or key that tells of it; empty if none does."""
        if self.field:
            fields = (name for name in metadata if re.fullmatch(self.field, name))
            return next((name for name in fields if re.search(self.value, metadata[name][:10_000])), "")
        return next((name for name in names if re.search(self.key, name)), "")


TOOLS = (
    Tool("OneTrainer", "ot_.*"),
    Tool("ai-toolkit", "software", "ai-toolkit"),
    Tool("SimpleTuner", "simpletuner.*|.*trainer.*|software", "(?i)simple.?tuner"),
    Tool("LyCORIS", "ss_network_module", "lycoris"),
    Tool("musubi-tuner", "ss_network_module", r"networks\.lora_(?!flux|sd3|lumina|anima|hunyuan_image)"),
    Tool("sd-scripts", "ss_network_module", r"networks\."),
    Tool("sd-scripts", r"modelspec\.implementation_version", "^sd-scripts/"),
    Tool("ComfyUI", "prompt", '"class_type"'),  # the workflow that saved it
    Tool("sd-scripts, merged", r"modelspec\.merged_from"),
    Tool("sd-scripts or musubi-tuner", "ss_.*"),
    Tool("diffusers", "lora_adapter_metadata"),
    Tool("OneTrainer", key=r"^lora_transformer_|^bundle_emb\."),
    Tool("VideoX-Fun", key="^lora_unet__"),
    Tool("SimpleTuner, or LyCORIS alone", key="^lycoris_"),
    Tool("sd-scripts", key="^oft_unet_"),
    Tool("DiffSynth-Studio", key=r"\.lora_[AB]\.default\.weight$"),
    Tool("LightX2V, or an extraction of ComfyUI", key=r"^diffusion_model\..*\.(diff|diff_b)$"),
    Tool("LyCORIS", key=r"\.(hada_w1_a|oft_blocks|a1\.weight|on_input|w_norm)$"),
    Tool("XLabs, or one that follows it", key=r"_blocks\.\d+\.processor\.(qkv|proj)_lora[12]?\.(up|down)\.weight$"),
    Tool("Black Forest Labs", key=r"_norm\.scale$"),
    Tool("diffusers before 0.20", key=r"\.processor\.\w+_lora\.(up|down)\.weight$"),
    Tool("diffusers before 0.26", key=r"\.lora(_linear_layer)?\.(up|down)\.weight$"),
)
"""In order: what a header says goes before what keys look like."""


_BASE_FIELDS = ("modelspec.architecture", "ss_base_model_version")
"""Of Stability's ModelSpec, and of sd-scripts, musubi-tuner and ai-toolkit; the first is more exact where both are there."""


def tool_of(names: Collection[str], metadata: Mapping[str, str]) -> str:
    """The program, and what tells of it; empty if nothing does. Without names the header alone is asked, as of a model."""
    for tool in TOOLS:
        if evidence := tool.evidence(names, metadata):
            return f"{tool.name} ({evidence})"
    return ""


def stated_base(metadata: Mapping[str, str]) -> str:
    """What a header says of the network it is for, word by word, and the field; empty if it says nothing."""
    found = ((name, metadata[name].partition("/")[0]) for name in _BASE_FIELDS if metadata.get(name))
    return next((f"{show(said, 80)} ({name})" for name, said in found), "")
