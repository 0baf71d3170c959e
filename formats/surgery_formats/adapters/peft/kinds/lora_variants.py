# SPDX-License-Identifier: Apache-2.0
"""Variants of LORA: blocks on the diagonal, and LoRAs on a changed base (PEFT 0.21, ``tuners/lora/variants.py``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from surgery_formats.adapters.format import NewTensor
from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.kinds.kind import malformed
from surgery_formats.adapters.peft.read_config import PeftConfig
from surgery_formats.arrays import Array, namespace
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.tensors.tensor import StoredTensor, Tensor
from surgery_formats.updates import ChangedBase, Factor, LoRA, Part

__all__ = [
    "UNUSED",
    "base_fields",
    "blocks_of",
    "changed_base_issue",
    "diagonal",
    "not_plain",
    "on_changed_base",
    "put_diag",
    "taken",
]

UNUSED: Mapping[str, str] = {
    "lora_velora_embed": "VeLoRA compresses activations by it in training; what was trained is the LoRA",
    "lora_monteclora_sampler": "MonteCLoRA draws noise by it in training; what was trained is the LoRA",
}
"""Tensors of variants whose result is a plain LoRA."""
_TAKEN: Mapping[str, Part] = {"pissa": "principal", "olora": "first columns"}
_INIT: Mapping[Part, str] = {part: init for init, part in _TAKEN.items()}
_KASA = {"beta": 1e-4, "gamma": 1e-3}  # PEFT's defaults; they weigh terms of a loss


def blocks_of(module: str, config: PeftConfig) -> tuple[int, int]:
    """``(of A, of B)``: how many blocks each factor has on its diagonal; 1 for one that is stored whole.

    Raises:
        MalformedError: ``use_bdlora`` is none of PEFT's.
    """
    fields = config.raw.get("use_bdlora")
    if not fields:
        return 1, 1
    blocks = fields.get("nblocks", 1) if isinstance(fields, Mapping) else None
    if isinstance(blocks, bool) or not isinstance(blocks, int) or not 0 < blocks < 1 << 16:
        raise MalformedError("'use_bdlora' has no whole number 'nblocks'", file=config.file)
    named = [fields.get(f"target_modules_bd_{side}") or [] for side in "ab"]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in named):
        raise MalformedError("'use_bdlora' has a list of modules that is not one of names", file=config.file)
    a, b = (any(name in module for name in names) for names in named)
    if a and b:
        raise MalformedError(f"'use_bdlora' names '{module}' for both of its factors", file=config.file)
    return (blocks if a else 1), (blocks if b else 1)


def diagonal(stored: StoredTensor, blocks: int) -> Factor:
    """A factor that is stored as the blocks of its diagonal, one under the other.

    Raises:
        MalformedError: its rows are no multiple of the blocks.
    """
    if len(stored.shape) != 2 or stored.shape[0] % blocks:
        raise malformed(stored, f"not {blocks} blocks of a diagonal")
    (rows, cols), height = stored.shape, stored.shape[0] // blocks

    def spread(values: Array) -> Array:
        whole = namespace(values).zeros((rows, blocks * cols), dtype=values.dtype, device=values.device)
        for block in range(blocks):
            at = slice(block * height, (block + 1) * height)
            whole[at, block * cols : (block + 1) * cols] = values[at]
        return whole

    return Factor((stored,), (rows, blocks * cols), spread)


def taken(config: PeftConfig) -> Part | None:
    """The part of the base that was taken away before training; None for a LoRA on the base itself."""
    if config.raw.get("kasa_config"):
        return "minor"
    init = config.raw.get("init_lora_weights")
    return _TAKEN.get(init.lower()) if isinstance(init, str) else None


def on_changed_base(
    lora: LoRA, part: Part, diag: StoredTensor | None, config: PeftConfig, *, plain: bool
) -> ChangedBase:
    """A LoRA with the part of its base that it replaces.

    Raises:
        MalformedError: KaSA without its singular values.
        FitError: PEFT has no such LoRA on this kind of layer.
    """
    stored = lora.A.tensors[0]
    if not plain or config.dora:
        raise not_plain(stored)
    if part == "minor":
        if diag is None:
            raise MalformedError(
                "kasa_config is set, but this module has no 'lora_diag'", file=stored.path, tensor=stored.name
            )
        if diag.shape != (lora.rank,):
            raise malformed(diag, f"the LoRA has rank {lora.rank}")
        lora = replace(lora, B=Factor.computed((lora.B, Factor.of(diag)), lora.B.shape, lambda b, d: b * d))
    return ChangedBase(lora, part)


def not_plain(stored: Tensor) -> FitError:
    """A LoRA on a changed base where its meaning is not known."""
    return FitError(
        "a LoRA on a changed base is read for linear layers without DoRA only",
        file=stored.path,
        tensor=stored.name,
        hint="save it with PEFT's path_initial_model_for_weight_conversion, or merge it with PEFT",
    )


def put_diag(file: PeftFile, key: str, update: ChangedBase) -> LoRA:
    """Store the singular values of a KaSA, ones where they are multiplied into B; what remains is the LoRA."""
    lora = update.lora
    if update.taken != "minor":
        return lora
    if len(lora.B.terms) == 2:
        B, diag = lora.B.terms
        file.put(f"{key}.lora_diag", diag)
        return replace(lora, B=B)
    file.add(NewTensor(f"{key}.lora_diag", DType.F32, (lora.rank,), lambda: _ones(lora.rank)))
    return lora


def _ones(size: int) -> Array:
    import numpy

    return numpy.ones(size, numpy.float32)


def base_fields(part: Part | None) -> dict[str, Any]:
    """The fields of the configuration that say which part of the base was taken away."""
    if part == "minor":
        return {"kasa_config": _KASA}
    return {} if part is None else {"init_lora_weights": _INIT[part]}


def changed_base_issue(config: Mapping[str, Any]) -> Iterable[str]:
    """A warning for LoRAs that only act right on the very weights they were trained on."""
    init = config.get("init_lora_weights")
    name = "KaSA" if config.get("kasa_config") else {"pissa": "PiSSA", "olora": "OLoRA"}.get(str(init).lower(), "")
    if name:
        yield (
            f"raw {name}: a part of the base is taken away before it is added, "
            "so the base must have the very weights it was trained on"
        )
