# SPDX-License-Identifier: Apache-2.0
"""The U-Net of Stable Diffusion 1, 2 and XL: CompVis' and Stability's release ("ldm", "sgm").

The map follows from the original numbering of blocks: on the way down, every resnet and every downsampler is an
``input_block``, with L resnets per level; the way up is similar. So the rules are made for the blocks that a base has.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from surgery_formats.models.layouts.rule import Network, Rule, same

__all__ = ["NETWORK", "original_names"]

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OF_RESNET = {original: diffusers for diffusers, original in _RESNET.items()}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_OF_MIDDLE = {number: inner for inner, number in _MIDDLE.items()}
_BLOCK = re.compile(
    r"(?:(down|up)_blocks\.(\d{1,3})|mid_block)\.((resnets|attentions|downsamplers|upsamplers)\.(\d{1,3}))\.(.+)"
)
_ORIGINAL = re.compile(r"(input_blocks|output_blocks|middle_block)\.(?:(\d{1,3})\.)?(\d)\.(.+)")


def original_names(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield ``(original name, module)`` for every module of a U-Net, by its path in diffusers.

    ``down_blocks.1.resnets.0.conv1`` is ``input_blocks.4.0.in_layers.2`` if there are two resnets per level.
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
                block = f"middle_block.{_MIDDLE[inner]}" if inner in _MIDDLE else None
            elif kind == "downsamplers":
                block, tail = f"input_blocks.{(int(level) + 1) * (per_level['down'] + 1)}.0", "op"
            elif kind == "upsamplers":
                last = int(level) * per_level["up"] + per_level["up"] - 1
                block = f"output_blocks.{last}.{2 if f'up_blocks.{level}' in with_attention else 1}"
            else:
                position = int(number) + int(level) * (per_level[side] + (side == "down")) + (side == "down")
                block = f"{'input' if side == 'down' else 'output'}_blocks.{position}.{int(kind == 'attentions')}"
            if block is not None:
                yield f"{block}.{tail}", module


def _resnets(modules: Collection[str], prefix: str) -> int:
    """Count the resnets of the first level; all levels have the same number."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in modules if name.startswith(prefix)})


def _diffusers_names(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield ``(module, its path in diffusers)`` for every module of a U-Net by its original name.

    Levels are counted by their resamplers, so that a file without one of its blocks tells nothing.
    """
    blocks = {
        (match[1], int(match[2] or 0), match[3]): match for name in modules if (match := _ORIGINAL.fullmatch(name))
    }
    resamples = {
        (side, number)
        for name in modules
        if (match := _ORIGINAL.fullmatch(name))
        for side, number in ((match[1], int(match[2] or 0)),)
        if (match[4] == "op" and side == "input_blocks") or (match[4] == "conv" and side == "output_blocks")
    }
    places: dict[tuple[str, int], tuple[int, int]] = {}
    for side, first in (("input_blocks", 1), ("output_blocks", 0)):
        numbers = sorted({number for owner, number, _ in blocks if owner == side and number >= first})
        if numbers != list(range(first, first + len(numbers))):
            return
        level = position = 0
        for number in numbers:
            places[side, number] = level, position
            ends = (side, number) in resamples
            level, position = (level + 1, 0) if ends else (level, position + 1)
    originals = {original: diffusers for diffusers, original in _OUTSIDE.items() if "class_" not in diffusers}
    for module in modules:
        if module in originals:
            yield module, originals[module]
        elif match := _ORIGINAL.fullmatch(module):
            side, inner, rest = match[1], match[3], match[4]
            if side == "middle_block":
                if inner in _OF_MIDDLE and match[2] is None:
                    tail = _OF_RESNET.get(rest, rest) if inner != "1" else rest
                    yield module, f"mid_block.{_OF_MIDDLE[inner]}.{tail}"
                continue
            if (place := places.get((side, int(match[2] or 0)))) is None:
                continue
            level, position = place
            at = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}"
            if side == "input_blocks" and rest == "op":
                yield module, f"{at}.downsamplers.0.conv"
            elif side == "output_blocks" and rest == "conv":
                yield module, f"{at}.upsamplers.0.conv"
            elif inner == "0":
                yield module, f"{at}.resnets.{position}.{_OF_RESNET.get(rest, rest)}"
            else:
                yield module, f"{at}.attentions.{position}.{rest}"


def _rules(names: Collection[str]) -> Collection[Rule]:
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
    if any(module.startswith(("input_blocks.", "output_blocks.", "middle_block.")) for module in modules):
        return [same(module, diffusers) for module, diffusers in _diffusers_names(modules)]
    return [same(original, module) for original, module in original_names(modules)]


NETWORK = Network("Stable Diffusion 1, 2 or XL", ("UNet2DConditionModel",), (_rules,))
