# SPDX-License-Identifier: Apache-2.0
"""Files in the names of the Open Model Initiative (OMI-Model-Standards 16e78ee), which OneTrainer wrote until 2026.

A network's modules have the names of its makers; of what they fuse, every part has a number (``img_attn.qkv.1`` is k). The text
encoders are ``clip_l``, ``clip_g``, ``t5`` and ``llama``.
"""

from __future__ import annotations

from surgery_formats.adapters.grammar.dialect import Dialect
from surgery_formats.adapters.grammar.format import WeightFileFormat
from surgery_formats.adapters.grammar.leaves import LORA_SPELLINGS
from surgery_formats.adapters.grammar.spelling import KeyPrefix

__all__ = ["OMI"]

_DOWN, _UP = LORA_SPELLINGS["lora_down"]
_PREFIXES = (
    KeyPrefix("transformer.", "transformer", False),
    KeyPrefix("unet.", "unet", False),
    KeyPrefix("clip_l.", "text_encoder", False),
    KeyPrefix("clip_g.", "text_encoder_2", False),
    KeyPrefix("t5.", "text_encoder_3", False),
    KeyPrefix("llama.", "text_encoder_4", False),
)
_NETWORKS = r"transformer\.(double_blocks|single_blocks|joint_blocks|txt_in|img_in|x_embedder|final_layer|vector_in|time_in|guidance_in)\."
_UNET = r"unet\.(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\."
_TRAINED = r"(.*\.)?(lora_(down|up|mid)\.weight|alpha|dora_scale|hada_\w+|lokr_\w+|oft_R\.\w+)$"

OMI = WeightFileFormat(
    Dialect(
        name="omi",
        prefixes=_PREFIXES,
        own=tuple(prefix.text for prefix in _PREFIXES),
        mark=rf"bundle_emb\.|({_NETWORKS}|{_UNET}|(clip_[lg]|t5|llama)\.){_TRAINED}",
        written={"": "transformer.", **{prefix.component: prefix.text for prefix in _PREFIXES}},
        encoders={
            "t5": "t5.",
            "llama": "llama.",
            "clip_l": "clip_l.",
            "clip_g": "clip_g.",
            "t5xxl": "t5.",
            "clip_text_model:text_encoder": "clip_l.",
            "clip_text_model:text_encoder_2": "clip_g.",
        },
        leaves={"down": _DOWN, "up": _UP},
        names_of="OMI",
    ),
    title="OMI file (OneTrainer until 2026): original names, numbered parts, clip_l., clip_g., t5.",
    needs_base=True,
)
