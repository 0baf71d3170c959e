# SPDX-License-Identifier: Apache-2.0
"""Folders that look like PEFT's and hold experts in another way: Unsloth's packings, and Tinker's stacks.

Unsloth
    B of a stack is ``(out, r * E)`` as PEFT's. PEFT's expert e is ``B.reshape(out, r, E)[:, :, e]``, in Unsloth until
    2026-09-17 it was ``B.reshape(out, E, r)[:, e]``. Since then ``lora_B_layout`` says which (unsloth-zoo#1232, #1269).
Tinker
    ``mlp.experts.w1`` (gate), ``w3`` (up) and ``w2`` (down) have A ``(E, r, in)`` and B ``(E, out, r)``; a factor of size 1
    is shared by all experts. The head is called ``unembed_tokens`` (tinker-cookbook#533, #548).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from surgery_formats.adapters.peft.kinds.kind import Module, ModuleUpdates
from surgery_formats.adapters.peft.read_config import PeftConfig
from surgery_formats.canonical.adapter import Site
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show
from surgery_formats.updates import Factor, LoRA, Stacked

__all__ = ["LAYOUT", "by_expert", "experts_of_tinker", "marked", "named_by_peft"]

LAYOUT = "lora_B_layout"
_PEFTS = "rank_major"
_BY_EXPERT = ("grouped_by_expert", "expert_major")
_EXPERTS = re.compile(r"(.*\.)experts\.(w[123]|gate_proj|up_proj|down_proj)")
_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_TINKERS_HEAD = "unembed_tokens"


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
    if stated not in (None, _PEFTS, *_BY_EXPERT):
        raise MalformedError(
            f"'{LAYOUT}' is {show(repr(stated), 40)}, neither {_PEFTS} nor {_BY_EXPERT[0]}", file=config.file
        )
    if stated is None and count > 1 and rank > 1 and _of_unsloth(config.raw):
        raise FitError(
            f"was written by Unsloth, whose B {list(b.shape)} of {count} experts has two readings: PEFT's ({_PEFTS}), or, "
            f"trained before 2026-09-17, each expert's columns side by side ({_BY_EXPERT[0]})",
            file=b.file.path,
            tensor=b.name,
            hint=f'state it in adapter_config.json: "{LAYOUT}": "{_BY_EXPERT[0]}" if it was trained before, '
            f'"{_PEFTS}" if after',
        )
    return stated in _BY_EXPERT


def _of_unsloth(config: Mapping[str, Any]) -> bool:
    mapping = config.get("auto_mapping")
    return isinstance(mapping, Mapping) and bool(mapping.get("unsloth_fixed"))


def marked(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of stacks that are packed as PEFT packs them: Unsloth's says so."""
    return {**config, LAYOUT: _PEFTS} if LAYOUT in config or _of_unsloth(config) else config


def named_by_peft(path: str) -> str:
    """The path of a module as the models have it."""
    return "lm_head" if path.rpartition(".")[2] == _TINKERS_HEAD else path


def experts_of_tinker(module: Module) -> ModuleUpdates | None:
    """The experts of Tinker's 3-D factors, under MLX's name of such a stack; None if the module has no such factors.

    Raises:
        FitError: the factors do not belong together.
        MalformedError: they have another rank than the configuration.
    """
    a, b, named = module.parts["lora_A.weight"], module.parts["lora_B.weight"], _EXPERTS.fullmatch(module.path)
    if not named or len(a.shape) != 3 or len(b.shape) != 3:
        return None
    count, rank = max(a.shape[0], b.shape[0]), a.shape[1]
    if {a.shape[0], b.shape[0]} - {1, count} or a.shape[1] != b.shape[2] or 0 in (*a.shape, *b.shape):
        raise FitError(f"is {list(a.shape)}, its lora_B {list(b.shape)}", file=a.file.path, tensor=a.name)
    module.config.check_rank(module.path, rank, a)
    scale, alpha = module.config.scale_of(module.path, rank), module.config.alpha_of(module.path)

    def expert(e: int) -> LoRA:
        return LoRA(_factor(a, e), _factor(b, e), scale, alpha)

    site = Site(f"{named[1]}switch_mlp.{_PARTS.get(named[2], named[2])}.weight", module_kind="experts")
    return ModuleUpdates({site: (Stacked(tuple(map(expert, range(count)))),)})


def _factor(stack: StoredTensor, number: int) -> Factor:
    """The factor of one expert: its own, or the one that all share."""
    at = number if stack.shape[0] > 1 else 0
    return Factor((stack,), stack.shape[1:], lambda values: values.reshape(stack.shape)[at])
