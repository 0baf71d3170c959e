# SPDX-License-Identifier: Apache-2.0
"""Stacks as PEFT wraps parameters: all experts in one pair of matrices, ``experts.base_layer.lora_A`` inside ``experts.lora_A``.

PEFT since 0.19, for experts held ``(E, out, in)``
    A ``(E * r, in)``, B ``(out, r * E)``, of which expert e is ``B.reshape(out, r, E)[:, :, e]`` (peft#3165).
PEFT before 0.19
    A ``(E * r, out)``, B ``(in, r * E)``: the factors of the transposed change. For experts held ``(E, in, out)``, as
    gpt-oss has them, both versions write ``in`` and ``out`` as above.
Unsloth
    As PEFT since 0.19; until 2026-09-17 with B's columns by expert, ``B.reshape(out, E, r)[:, e]`` (see `packing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from surgery_formats.adapters.expert_layers import ExpertLayer, ExpertStack
from surgery_formats.adapters.format import NewTensor
from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.module import Module, ModuleUpdates
from surgery_formats.adapters.peft.packing import BY_EXPERT, BY_RANK, LAYOUT, of_unsloth
from surgery_formats.adapters.peft.parameters import parameter_lora, targeted_parameters
from surgery_formats.adapters.peft.read_config import PeftConfig
from surgery_formats.arrays import Array
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import Tensor

__all__ = ["PEFT_018", "PEFT_STACKS", "UNSLOTH", "UNSLOTH_GROUPED", "put_stacks", "read_stacks", "read_vllm"]


def read_stacks(module: Module) -> ModuleUpdates | None:
    """Stacks of all versions: the configuration's parameters, version and packing tell what they are."""
    a = module.parts["lora_A.weight"]
    parameters = targeted_parameters(module.wrapped, module.path, module.config, module.wrappers, a)
    if not parameters:
        return None
    site, update = parameter_lora(module.wrapped, module.path, module.parts, module.config, module.wrappers, parameters)
    return ModuleUpdates({site: (update,)})


def read_vllm(module: Module) -> ModuleUpdates | None:
    """Stacks of a folder whose configuration targets no parameters, so that PEFT did not write it: as vLLM reads them.

    Raises:
        FitError: the configuration states a version of PEFT that has another order of axes.
    """
    config, a = module.config, module.parts["lora_A.weight"]
    if config.target_parameters or not module.path.endswith(".experts") or module.wrappers[module.path] != 2:
        return None
    if config.raw.get("peft_version") is not None and config.experts_old_order:
        raise FitError(
            f"A {list(a.shape)} has two readings: PEFT's before 0.19, as its version says, or vLLM's, since it targets "
            "no parameters, as PEFT's folders do",
            file=a.file.path,
            tensor=a.name,
            hint='state it in adapter_config.json: "target_parameters" if PEFT wrote it, '
            '"peft_version": "0.19.0" if it was made for vLLM',
        )
    since = replace(config, experts_old_order=False)
    names = ["gate_up_proj", "down_proj"]
    site, update = parameter_lora(module.wrapped, module.path, module.parts, since, module.wrappers, names)
    return ModuleUpdates({site: (update,)})


def put_stacks(
    file: PeftFile, layer: ExpertLayer, stacks: Sequence[ExpertStack], *, swapped: bool = False, grouped: bool = False
) -> str:
    """The stacks of a layer, gate and up inside down.

    Args:
        file: To which they are added.
        layer: Whose they are.
        stacks: Gate and up, then down, or one of them.
        swapped: Whether A and B are those of the transposed change.
        grouped: Whether the columns of B are by expert.
    """
    said = []
    for depth, stack in enumerate(reversed(stacks)):
        rank, scale = file.rank_and_scale(stack)
        key = f"{file.prefix}{layer.module}{'.base_layer' * depth}"
        _put_stack(file, key, stack, swapped=swapped, grouped=grouped)
        path = f"{layer.module}.{stack.role}"
        file.settings[path] = (rank, file.alpha_of(rank, scale))
        file.experts.append(path)
        said.append(stack.evened(rank, scale))
    return ", ".join(filter(None, said))


def _put_stack(file: PeftFile, key: str, stack: ExpertStack, *, swapped: bool, grouped: bool) -> None:
    rank, scale = file.rank_and_scale(stack)
    count, (out, inputs) = stack.count, stack.shape

    def a() -> Array:
        return stack.a(rank)

    def b() -> Array:
        return stack.b(rank, scale)

    def load_a() -> Array:
        values = b().mT if swapped else a()  # (E, rank, columns)
        return values.reshape(count * rank, -1)

    def load_b() -> Array:
        values = a().mT if swapped else b()  # (E, rows, rank)
        return values.transpose((1, 0, 2) if grouped else (1, 2, 0)).reshape(-1, rank * count)

    of_a, of_b = stack.dtype("A", scale), stack.dtype("B", scale)
    if swapped:
        out, inputs, of_a, of_b = inputs, out, of_b, of_a
    file.add(NewTensor(f"{key}.lora_A.weight", of_a, (count * rank, inputs), load_a))
    file.add(NewTensor(f"{key}.lora_B.weight", of_b, (out, rank * count), load_b))


@dataclass(frozen=True, slots=True)
class _Stacks:
    """One version of the stacks.

    Attributes:
        version: Of PEFT, as the configuration states it.
        packing: How B's columns lie.
        unsloth: Whether Unsloth is named as the writer.
    """

    name: str
    title: str
    limits: str
    source: str
    version: Literal["0.18.1", "0.19.0"] = "0.19.0"
    packing: str = BY_RANK
    unsloth: bool = False
    uniform: bool = False

    def recognise(self, config: PeftConfig, tensors: Sequence[Tensor]) -> bool:
        """Folders with parameters of their own, by version and packing."""
        if not config.target_parameters:
            return False
        found = of_unsloth(config.raw), config.raw.get(LAYOUT) in BY_EXPERT, config.experts_old_order
        return found == (self.unsloth, self.packing != BY_RANK, self.version == "0.18.1")

    def put(self, file: PeftFile, layer: ExpertLayer) -> str:
        """Gate and up as one parameter, as the model's code has them."""
        swapped = self.version == "0.18.1" and not layer.transposed
        return put_stacks(file, layer, _ordered(layer), swapped=swapped, grouped=self.packing != BY_RANK)

    def named(self, module: str) -> str:
        """As it is."""
        return module

    def fields(self, file: PeftFile) -> Mapping[str, Any]:
        """The version and, of Unsloth, its mark and the packing."""
        mapping = file.adapter.config.get("auto_mapping")
        kept = dict(mapping) if isinstance(mapping, Mapping) else {}
        kept.pop("unsloth_fixed", None)
        if not self.unsloth:
            return {"peft_version": self.version, "auto_mapping": kept or None, LAYOUT: None}
        return {
            "peft_version": self.version,
            "auto_mapping": {**kept, "unsloth_fixed": True},
            LAYOUT: self.packing,
        }


def _ordered(layer: ExpertLayer) -> list[ExpertStack]:
    fused = layer.fused()
    return [fused[role] for role in ("gate_up_proj", "down_proj") if role in fused]


_LIMITS = (
    "one rank for all experts of a parameter: others are padded with zeros; gate and up share A: two A are stacked"
)
PEFT_STACKS = _Stacks(
    "peft",
    "PEFT since 0.19, target_parameters: A (E*r, in), B (out, r*E), columns of B by direction",
    _LIMITS,
    "peft 0.21.2 tuners/lora/layer.py, ParamWrapper",
)
PEFT_018 = replace(
    PEFT_STACKS,
    name="peft-0.18",
    title="PEFT 0.17 and 0.18, target_parameters: A (E*r, out), B (in, r*E); (E, in, out) experts as since 0.19",
    source="peft 0.18.1 tuners/lora/layer.py, ParamWrapper; peft#3165",
    version="0.18.1",
)
UNSLOTH = replace(
    PEFT_STACKS,
    name="unsloth",
    title="Unsloth since 2026-09-17: as PEFT since 0.19, marked lora_B_layout rank_major",
    source="unsloth-zoo#1232, #1269",
    unsloth=True,
)
UNSLOTH_GROUPED = replace(
    UNSLOTH,
    name="unsloth-grouped",
    title="Unsloth before 2026-09-17: B (out, E*r), columns by expert, marked lora_B_layout grouped_by_expert",
    packing=BY_EXPERT[0],
)
