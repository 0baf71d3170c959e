# SPDX-License-Identifier: Apache-2.0
"""One pair of factors of three axes for each projection: A ``(E, r, in)``, B ``(E, out, r)``; a first axis of 1 is shared.

Tinker
    calls them ``experts.w1`` (gate), ``w3`` (up) and ``w2`` (down), shares the A of gate and up and the B of down, and
    calls the head ``unembed_tokens`` (tinker-cookbook#533, #548). vLLM reads them with ``enable_moe_shared_loras``.
SGLang
    reads both spellings and either size; it stacks gate and up itself, and has one alpha and one rank for a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery_formats.adapters.expert_layers import ExpertLayer, ExpertStack
from surgery_formats.adapters.format import NewTensor
from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.module import Module, ModuleUpdates
from surgery_formats.adapters.peft.packing import NO_STACKS
from surgery_formats.adapters.peft.read_config import PeftConfig
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Site
from surgery_formats.errors import FitError
from surgery_formats.models.expert_stacks import ExpertRole
from surgery_formats.tensors.tensor import StoredTensor, Tensor
from surgery_formats.updates import Factor, LoRA, Stacked

__all__ = ["SGLANG", "TINKER", "named_by_peft", "read_leaves"]

_EXPERTS = re.compile(r"(.*\.)experts\.(w[123]|gate_proj|up_proj|gate_up_proj|down_proj)")
_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_TINKERS_HEAD = "unembed_tokens"
_HEAD = "lm_head"


def named_by_peft(path: str) -> str:
    """The path of a module as the models have it."""
    return _HEAD if path.rpartition(".")[2] == _TINKERS_HEAD else path


def read_leaves(module: Module) -> ModuleUpdates | None:
    """Factors of three axes, under MLX's name of such a stack; None if the module has no such factors.

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


@dataclass(frozen=True, slots=True)
class _Leaves:
    """One program's names.

    Attributes:
        names: Of the projections.
        shares: Whether a factor that all experts have is stored once.
        head: Name of the head.
    """

    name: str
    title: str
    limits: str
    source: str
    names: Mapping[ExpertRole, str]
    shares: bool
    head: str
    uniform: bool = True

    def recognise(self, config: PeftConfig, tensors: Sequence[Tensor]) -> bool:
        """Factors of three axes under its names."""
        named = [match[2] for t in tensors if len(t.shape) == 3 and (match := _EXPERTS.search(_module(t.name)))]
        return bool(named) and all(name in self.names.values() for name in named)

    def put(self, file: PeftFile, layer: ExpertLayer) -> str:
        """Every projection by itself."""
        said = [self._put(file, layer, stack) for stack in layer.split().values()]
        return ", ".join(filter(None, said))

    def _put(self, file: PeftFile, layer: ExpertLayer, stack: ExpertStack) -> str:
        rank, scale = file.rank_and_scale(stack)
        counts = {side: 1 if self.shares and stack.shared(side) else stack.count for side in ("A", "B")}
        if set(counts.values()) == {1}:  # a reader could not tell how many experts there are
            counts["A"] = stack.count
        path = f"{layer.module}.{self.names[stack.role]}"

        def load_a() -> Array:
            return stack.a(rank)[: counts["A"]]

        def load_b() -> Array:
            return stack.b(rank, scale)[: counts["B"]]

        out, inputs = stack.shape
        file.add(
            NewTensor(
                f"{file.prefix}{path}.lora_A.weight", stack.dtype("A", scale), (counts["A"], rank, inputs), load_a
            )
        )
        file.add(
            NewTensor(f"{file.prefix}{path}.lora_B.weight", stack.dtype("B", scale), (counts["B"], out, rank), load_b)
        )
        file.settings[path] = (rank, file.alpha_of(rank, scale))
        return stack.evened(rank, scale)

    def named(self, module: str) -> str:
        """Tinker's name of the head."""
        stem, dot, leaf = module.rpartition(".")
        if leaf != _HEAD or self.head == _HEAD:
            return module
        return f"{stem}{dot}{self.head}" if dot else f"model.{self.head}"

    def fields(self, file: PeftFile) -> Mapping[str, Any]:
        """None: names and shapes tell it."""
        return NO_STACKS


def _module(key: str) -> str:
    return key.partition(".lora_")[0]


_LIMITS = "one rank and one alpha for a file: ranks are padded with zeros, scales multiplied into B"
TINKER = _Leaves(
    "tinker",
    "Tinker: experts.w1, w3, w2 with A (E or 1, r, in), B (E or 1, out, r); the head is unembed_tokens",
    _LIMITS,
    "tinker-cookbook 9dfcc3a weights/_merge.py, _adapter.py; vllm 0.33.0 lora/lora_weights.py, pack_moe_stacked",
    {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    shares=True,
    head=_TINKERS_HEAD,
)
SGLANG = _Leaves(
    "sglang",
    "SGLang: experts.gate_proj, up_proj, down_proj with A (E, r, in), B (E, out, r)",
    f"{_LIMITS}; factors that experts share are repeated for each",
    "sglang 0.5.23 srt/lora/lora.py, mem_pool.py",
    {role: role for role in ("gate_proj", "up_proj", "down_proj")},
    shares=False,
    head=_HEAD,
)
