# SPDX-License-Identifier: Apache-2.0
"""Updates of a module that AdapterHub's library wraps as a LoRA (adapters 1.3.0, ``methods/lora.py``).

``LoRALinear`` answers ``W x + b + alpha / r B A x``. With magnitudes it is ``m / ||W + B A|| (W x + b + alpha / r B A x)``, so
that the bias is stretched too, and the lengths are measured without the scale. (IA)^3 multiplies ``W x + b``.
``LoRAMergedLinear``, for the fused projection of GPT-2, has factors for each of q, k and v that is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy

from surgery_formats.adapters.adapterhub.config import HubConfig, LoRASettings
from surgery_formats.arrays import Array
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import IA3, DoRA, DoRABias, Factor, LoRA, OutputDoRA, Unmerged, Update

__all__ = ["FUSED", "LoRAModule", "updates_of"]

FUSED = ("c_attn", "in_proj")
"""Modules that hold queries, keys and values in one, by their last names: GPT-2 and DeBERTa."""
_KEEP = "load it with the library adapters, beside the base"


@dataclass(frozen=True, slots=True)
class LoRAModule:
    """One wrapped module.

    Attributes:
        path: Of the module.
        parts: Its tensors by the names behind the adapter's.
        shared: A and B of VeRA, which all modules share.
    """

    path: str
    parts: Mapping[str, StoredTensor]
    shared: Mapping[str, StoredTensor]

    @property
    def fused(self) -> bool:
        """Whether it is one projection for queries, keys and values."""
        return self.path.rpartition(".")[2] in FUSED

    def part(self, name: str) -> StoredTensor:
        """One of its tensors, a matrix.

        Raises:
            MalformedError: it is not there, or none.
        """
        stored = self.parts.get(name)
        if stored is None:
            other = next(iter(self.parts.values()))
            raise MalformedError(f"without its '{name}'", file=other.file.path, tensor=other.name)
        if len(stored.shape) != 2 or not stored.numel:
            raise MalformedError(f"of shape {list(stored.shape)}", file=stored.file.path, tensor=stored.name)
        return stored


def updates_of(module: LoRAModule, config: HubConfig) -> tuple[Update, Update | None]:
    """The update of the module's weight, and that of its bias.

    Raises:
        MalformedError, FitError: tensors that contradict each other or the configuration.
    """
    parts = module.parts
    if any(name.startswith("gate.") for name in parts):
        return _unmerged("gated LoRA", module, "a gate weighs it anew for every input"), None
    if any(name.startswith(("task_specific.", "weights")) for name in parts):
        return _unmerged("MTL-LoRA", module, "it mixes several matrices B for every task"), None
    if "vera_D" in parts:
        return _vera(module, config)
    if "lora_A" not in parts:
        return _vector(module, config)
    lora, method = _lora(module, config)
    if "m.weight" not in parts:
        return lora, None
    return _dora(lora, module.part("m.weight"), method)


def _dora(lora: LoRA, magnitude: StoredTensor, method: LoRASettings) -> tuple[Update, Update]:
    if magnitude.shape != (lora.shape[0], 1):
        raise _contradiction(magnitude, f"magnitudes for {lora.shape[0]} rows")
    lengths = Factor((magnitude,), magnitude.shape[:1])
    weight = DoRA(lora, lengths) if method.alpha == method.rank else OutputDoRA(lora, lengths)
    return weight, DoRABias(lora, lengths)


def _lora(module: LoRAModule, config: HubConfig) -> tuple[LoRA, LoRASettings]:
    a, b = module.part("lora_A"), module.part("lora_B")
    method = config.lora_of(b.shape[1], b.name)
    if method.multiplies:
        raise _contradiction(a, "factors of an (IA)^3, which is a vector")
    scale = method.alpha / method.rank
    if not module.fused:
        if a.shape[0] != b.shape[1]:
            raise _contradiction(a, f"its lora_B is {list(b.shape)}")
        return LoRA(Factor.of(a), Factor.of(b), scale, method.alpha), method
    count = len(method.matrices)
    if not count or a.shape[0] != count * method.rank or b.shape[0] % count:
        raise _contradiction(a, f"its lora_B is {list(b.shape)}, for {count} of q, k and v")
    size = b.shape[0] // count

    def spread(stored: Array) -> Array:
        whole = numpy.zeros((3, size, count, method.rank), stored.dtype)
        for number, name in enumerate(method.matrices):
            whole["qkv".index(name), :, number] = stored[number * size : (number + 1) * size]
        return whole.reshape(3 * size, count * method.rank)

    B = Factor((b,), (3 * size, a.shape[0]), spread)
    return LoRA(Factor.of(a), B, scale), method  # the rank is not the one that alpha counts against


def _vera(module: LoRAModule, config: HubConfig) -> tuple[Update, Update | None]:
    """``vera_B B vera_D A``, a LoRA of two products: the library trains both as matrices, with zeros that stay none."""
    if module.shared.keys() != {"lora_A", "lora_B"}:
        stored = module.part("vera_D")
        raise MalformedError("VeRA without its shared lora_A and lora_B", file=stored.file.path, tensor=stored.name)
    d, b = module.part("vera_D"), module.part("vera_B")
    A, B = module.shared["lora_A"], module.shared["lora_B"]
    if len(A.shape) != 2 or len(B.shape) != 2 or B.shape[1] != A.shape[0] or not A.numel or not B.numel:
        raise MalformedError(
            f"its shared factors are {list(A.shape)} and {list(B.shape)}", file=A.file.path, tensor=A.name
        )
    if d.shape != A.shape[:1] * 2 or b.shape != B.shape[:1] * 2:
        raise _contradiction(d, f"its shared factors are {list(A.shape)} and {list(B.shape)}")
    method = config.lora_of(A.shape[0], d.name)
    down = Factor.computed((Factor.of(d), Factor.of(A)), A.shape, lambda *stored: stored[0] @ stored[1])
    up = Factor.computed((Factor.of(b), Factor.of(B)), B.shape, lambda *stored: stored[0] @ stored[1])
    lora = LoRA(down, up, method.alpha / method.rank)
    if "m.weight" not in module.parts:
        return lora, None
    return _dora(lora, module.part("m.weight"), method)


def _vector(module: LoRAModule, config: HubConfig) -> tuple[Update, Update]:
    b = module.part("lora_B")
    method = config.lora_of(b.shape[1], b.name)
    if not method.multiplies:
        raise MalformedError("without its 'lora_A'", file=b.file.path, tensor=b.name)
    count = len(method.matrices) if module.fused else 1
    if b.shape[1] != 1 or not count or b.shape[0] % count:
        raise _contradiction(b, "a vector of (IA)^3")
    size, alpha = b.shape[0] // count, method.alpha

    def spread(stored: Array) -> Array:
        whole = numpy.ones((3, size), stored.dtype)
        for number, name in enumerate(method.matrices):
            whole["qkv".index(name)] = stored.reshape(count, size)[number]
        return alpha * whole

    if module.fused:
        vector = Factor((b,), (3 * size,), spread)
    else:
        vector = Factor((b,), (size,), None if alpha == 1 else lambda stored: alpha * stored)
    update = IA3(vector, per_row=True)
    return update, update


def _unmerged(kind: str, module: LoRAModule, why: str) -> Unmerged:
    held = tuple((name, Factor.of(stored)) for name, stored in sorted(module.parts.items()))
    return Unmerged(kind, held, why, _KEEP)


def _contradiction(stored: StoredTensor, what: str) -> FitError:
    return FitError(f"is {list(stored.shape)}: {what}", file=stored.file.path, tensor=stored.name)
