# SPDX-License-Identifier: Apache-2.0
"""One LoRA for each expert and projection, as for any linear layer.

Per expert
    under the names that the weights have on the disk (``mlp.experts.3.up_proj``, ``block_sparse_moe.experts.3.w3``): what
    PEFT wrote with transformers 4, what Automodel and axolotl write, what vLLM reads for most models, SGLang for all.
Unsloth's gpt-oss
    ``mlp.experts.gate_up_projs.3``: its 4-bit gpt-oss holds each expert as a Linear (unsloth-zoo#885).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery_formats.adapters.expert_layers import ExpertLayer, ExpertStack
from surgery_formats.adapters.format import NewTensor
from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.packing import NO_STACKS
from surgery_formats.adapters.peft.read_config import PeftConfig
from surgery_formats.arrays import Array
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import Tensor

__all__ = ["LINEARS", "PER_EXPERT", "put_single"]

_SINGLE = re.compile(r"\.experts\.\d+\.\w+\.lora_")
_LINEARS = re.compile(r"\.experts\.(gate_up|down)_projs\.\d+\.lora_")


def put_single(
    file: PeftFile,
    stack: ExpertStack,
    names: Mapping[int, str],
    *,
    complete: bool = False,
    like: ExpertStack | None = None,
) -> str:
    """One module for every expert.

    Args:
        file: To which they are added.
        stack: The projection.
        names: Paths of its modules, without ``.weight``.
        complete: Whether every expert gets one, of the same rank, with zeros where it was not trained.
        like: Another projection, whose rank and scale the zeros get where none of `stack` was trained.
    """
    said = set[str]()
    for number, path in names.items():
        lora = stack.loras.get(number)
        if lora is None and not complete:
            continue
        if lora is None or (complete and lora.rank != stack.rank) or file.even is not None:
            rank, scale = file.rank_and_scale(stack if stack.loras or like is None else like)
            _put_zeros_or_padded(file, stack, number, path, rank, scale)
            said.add(stack.evened(rank, scale))
        else:
            rank, scale = lora.rank, lora.scale
            file.put(f"{file.prefix}{path}.lora_A.weight", lora.A)
            file.put(f"{file.prefix}{path}.lora_B.weight", lora.B)
        file.settings[path] = (rank, file.alpha_of(rank, scale))
    return ", ".join(sorted(filter(None, said)))


def _put_zeros_or_padded(file: PeftFile, stack: ExpertStack, number: int, path: str, rank: int, scale: float) -> None:
    out, inputs = stack.shape
    one = ExpertStack(stack.role, stack.shape, 1, {0: stack.loras[number]} if number in stack.loras else {})

    def load_a() -> Array:
        return one.a(rank)[0]

    def load_b() -> Array:
        return one.b(rank, scale)[0]

    file.add(NewTensor(f"{file.prefix}{path}.lora_A.weight", one.dtype("A", scale), (rank, inputs), load_a))
    file.add(NewTensor(f"{file.prefix}{path}.lora_B.weight", one.dtype("B", scale), (out, rank), load_b))


@dataclass(frozen=True, slots=True)
class _PerExpert:
    """Names of the disk."""

    name: str = "per-expert"
    title: str = (
        "Automodel, axolotl, PEFT with transformers 4: experts.E.gate_proj (or w1 ...) with A (r, in), B (out, r)"
    )
    limits: str = "nothing: shared factors are repeated, gate and up have a copy of their A each"
    source: str = "NeMo Automodel#1755, #3284; axolotl#3483; peft 0.18 with transformers 4.57"
    uniform: bool = False

    def recognise(self, config: PeftConfig, tensors: Sequence[Tensor]) -> bool:
        """Numbered experts."""
        return any(_SINGLE.search(tensor.name) for tensor in tensors)

    def put(self, file: PeftFile, layer: ExpertLayer) -> str:
        """A module for every expert that was trained."""
        return ", ".join(
            filter(
                None,
                [
                    put_single(file, stack, {e: layer.single(role, e) for e in range(stack.count)})
                    for role, stack in layer.split().items()
                ],
            )
        )

    def named(self, module: str) -> str:
        """As it is."""
        return module

    def fields(self, file: PeftFile) -> Mapping[str, Any]:
        """No parameters of their own."""
        return NO_STACKS


@dataclass(frozen=True, slots=True)
class _Linears:
    """The lists of Linears of Unsloth's gpt-oss."""

    name: str = "unsloth-linears"
    title: str = "Unsloth's 4-bit gpt-oss: experts.gate_up_projs.E, down_projs.E with A (r, in), B (out, r)"
    limits: str = "gpt-oss alone; gate and up share A: two A are stacked"
    source: str = "unsloth-zoo#885"
    uniform: bool = False

    def recognise(self, config: PeftConfig, tensors: Sequence[Tensor]) -> bool:
        """Numbered members of lists in plural."""
        return any(_LINEARS.search(tensor.name) for tensor in tensors)

    def put(self, file: PeftFile, layer: ExpertLayer) -> str:
        """A module for every expert that was trained.

        Raises:
            FitError: another model than gpt-oss.
        """
        if not layer.component.family.numbered:
            raise FitError(
                f"only gpt-oss has experts in lists of Linears, not {layer.component.config.get('model_type')}",
                file=file.adapter.path,
            )
        said = [
            put_single(file, stack, {e: f"{layer.module}.{role}s.{e}" for e in range(stack.count)})
            for role, stack in layer.fused().items()
        ]
        return ", ".join(filter(None, said))

    def named(self, module: str) -> str:
        """As it is."""
        return module

    def fields(self, file: PeftFile) -> Mapping[str, Any]:
        """No parameters of their own."""
        return NO_STACKS


PER_EXPERT = _PerExpert()
LINEARS = _Linears()
