# SPDX-License-Identifier: Apache-2.0
"""Diffusion networks under diffusers' names, and the original release's ("sgm") names of the same modules.

LoRA files for SDXL use the original names, flattened. The map follows from the original numbering of blocks: on the way
down, every resnet and every downsampler is an ``input_block``, with L resnets per level; the way up is similar.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from surgery_formats.models.families.family import Family

__all__ = ["FAMILY", "original_flat"]

_OUTSIDE = {
    "conv_in": "input_blocks_0_0",
    "conv_norm_out": "out_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
_RESNET = {
    "norm1": "in_layers_0",
    "conv1": "in_layers_2",
    "norm2": "out_layers_0",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_BLOCK = re.compile(
    r"(?:(down|up)_blocks\.(\d{1,3})|mid_block)\.((resnets|attentions|downsamplers|upsamplers)\.(\d{1,3}))\.(.+)"
)


def original_flat(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield ``(flattened original name, module)`` for every module of a UNet, by its path in diffusers.

    ``down_blocks.1.resnets.0.conv1`` is ``input_blocks_4_0_in_layers_2`` if there are two resnets per level.
    """
    per_level = {side: _resnets(modules, f"{side}_blocks.0.resnets.") for side in ("down", "up")}
    with_attention = {name.partition(".attentions.")[0] for name in modules if ".attentions." in name}
    for module in modules:
        if module in _OUTSIDE:
            yield _OUTSIDE[module], module
        elif match := _BLOCK.fullmatch(module):
            side, level, inner, kind, number, rest = match.groups()
            tail = _RESNET.get(rest, rest) if kind == "resnets" else rest
            if side is None:
                block = f"middle_block_{_MIDDLE[inner]}" if inner in _MIDDLE else None
            elif kind == "downsamplers":
                block, tail = f"input_blocks_{(int(level) + 1) * (per_level['down'] + 1)}_0", "op"
            elif kind == "upsamplers":
                last = int(level) * per_level["up"] + per_level["up"] - 1
                block = f"output_blocks_{last}_{2 if f'up_blocks.{level}' in with_attention else 1}"
            else:
                position = int(number) + int(level) * (per_level[side] + (side == "down")) + (side == "down")
                block = f"{'input' if side == 'down' else 'output'}_blocks_{position}_{int(kind == 'attentions')}"
            if block is not None:
                yield f"{block}_{tail.replace('.', '_')}", module


def _resnets(modules: Collection[str], prefix: str) -> int:
    """Count the resnets of the first level; all levels have the same number."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in modules if name.startswith(prefix)})


FAMILY = Family(names=("UNet2DConditionModel",), other_flat=original_flat)
