# SPDX-License-Identifier: Apache-2.0
"""Which of two orders the columns of B have in a stack of experts: the bytes do not tell, the configuration may.

B of a stack is ``(out, rank * E)``. PEFT's expert e is ``B.reshape(out, rank, E)[:, :, e]``; in Unsloth until 2026-09-17 it
was ``B.reshape(out, E, rank)[:, e]``. Since then ``lora_B_layout`` says which (unsloth-zoo#1232, #1269).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery_formats.adapters.peft.read_config import PeftConfig
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["BY_EXPERT", "BY_RANK", "LAYOUT", "NO_STACKS", "by_expert", "marked", "of_unsloth"]

LAYOUT = "lora_B_layout"
BY_RANK = "rank_major"
BY_EXPERT = ("grouped_by_expert", "expert_major")
NO_STACKS: Mapping[str, Any] = {"target_parameters": None, LAYOUT: None}
"""Fields of a configuration that has no stacks of PEFT's."""


def by_expert(config: PeftConfig, count: int, rank: int, b: StoredTensor) -> bool:
    """Whether B of stacked experts holds the columns of each expert side by side, as Unsloth packed them.

    Args:
        config: Of the folder.
        count: Of experts.
        rank: Of each.
        b: For messages.

    Raises:
        MalformedError: a packing that is not known.
        FitError: Unsloth wrote it and does not say which packing it is.
    """
    stated = config.raw.get(LAYOUT)
    if stated not in (None, BY_RANK, *BY_EXPERT):
        raise MalformedError(
            f"'{LAYOUT}' is {show(repr(stated), 40)}, neither {BY_RANK} nor {BY_EXPERT[0]}", file=config.file
        )
    if stated is None and count > 1 and rank > 1 and of_unsloth(config.raw):
        raise FitError(
            f"was written by Unsloth, whose B {list(b.shape)} of {count} experts has two readings: PEFT's ({BY_RANK}), or, "
            f"trained before 2026-09-17, each expert's columns side by side ({BY_EXPERT[0]})",
            file=b.file.path,
            tensor=b.name,
            hint=f'state it in adapter_config.json: "{LAYOUT}": "{BY_EXPERT[0]}" if it was trained before, '
            f'"{BY_RANK}" if after',
        )
    return stated in BY_EXPERT


def of_unsloth(config: Mapping[str, Any]) -> bool:
    """Whether Unsloth wrote the folder."""
    mapping = config.get("auto_mapping")
    return isinstance(mapping, Mapping) and bool(mapping.get("unsloth_fixed"))


def marked(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of stacks that are packed as PEFT packs them: Unsloth's says so."""
    return {**config, LAYOUT: BY_RANK} if LAYOUT in config or of_unsloth(config) else config
