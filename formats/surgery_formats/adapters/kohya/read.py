# SPDX-License-Identifier: Apache-2.0
"""Read a LoRA file of kohya's sd-scripts (or A1111, LyCORIS, OneTrainer; docs/formats.md) into the canonical form.

A key is ``<prefix>_<module path, dots written as underscores>.<parameter>``. Only a base can tell which module that is,
so sites stay flat.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from surgery_formats.adapters.kohya.known_issues import stated_issues
from surgery_formats.adapters.kohya.prefixes import PREFIXES
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Adapter, Ignored, Site
from surgery_formats.containers.sharded import open_shards
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import listing
from surgery_formats.updates import DoRA, Factor, LoRA, Offset, Update

__all__ = ["read_kohya"]

_LORA = ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale")
_OFFSETS = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias"}
_NOT_READ = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "a1": "GLoRA",
    "a2": "GLoRA",
    "b1": "GLoRA",
    "b2": "GLoRA",
    "on_input": "(IA)^3",
    "q_layer": "T-LoRA",
    "p_layer": "T-LoRA",
    "lambda_layer": "T-LoRA",
    "bias_": "a sparse bias",
    "reshape_weight": "a weight that changes its shape",
}
_SCALAR_FORMATS = {DType.F16: "<e", DType.F32: "<f", DType.F64: "<d"}  # bfloat16 is the upper half of a float32


def read_kohya(path: Path) -> Adapter:
    """Read one file. Only headers and the alphas (scalars) are read.

    Raises:
        NotFoundError, MalformedError: not such a file, or a module that lacks a factor.
        FitError: a kind that is not read yet.
    """
    shards = open_shards(path)
    tensors = tuple(shards.tensors.values())
    modules: dict[tuple[str, str], dict[str, StoredTensor]] = {}
    for tensor in tensors:
        component, module, leaf = _split(tensor)
        if 0 in tensor.shape:
            raise MalformedError("is empty", file=path, tensor=tensor.name, hint="saved from a sharded model?")
        modules.setdefault((component, module), {})[leaf] = tensor
    updates: dict[Site, tuple[Update, ...]] = {}
    ignored: list[Ignored] = []
    for (component, module), parts in modules.items():
        for leaf, update in _module(parts):
            kernel = _kernel(parts)
            site = Site(f"{module}.{leaf}", component, True, "convolution" if kernel else "", kernel)
            updates[site] = (*updates.get(site, ()), update)
        if "alpha" in parts and "lora_down.weight" not in parts:
            ignored.append(Ignored(parts["alpha"], "an alpha without low-rank factors scales nothing"))
    metadata = dict(shards.shards[0].metadata)
    return Adapter(
        path=path,
        format="kohya",
        kind=_kind(updates),
        updates=dict(sorted(updates.items())),
        tensors=tensors,
        ignored=tuple(ignored),
        base_name=metadata.get("ss_sd_model_name", ""),
        metadata=metadata,
        stated_issues=tuple(stated_issues([update for chain in updates.values() for update in chain], metadata)),
    )


def _kernel(parts: Mapping[str, StoredTensor]) -> tuple[int, ...]:
    """Sizes of a convolution's kernel, which the core has where there is one."""
    stored = parts.get("lora_mid.weight") or parts.get("lora_down.weight") or parts.get("diff")
    return stored.shape[2:] if stored else ()


def _split(tensor: StoredTensor) -> tuple[str, str, str]:
    """``(component, flattened module, parameter)``."""
    prefix = next((prefix for prefix in PREFIXES if tensor.name.startswith(prefix)), None)
    if tensor.name.startswith("oft_unet_"):
        raise FitError("OFT is not read yet", file=tensor.file.path, tensor=tensor.name)
    if prefix is None:
        raise MalformedError(
            f"a key without one of the prefixes {listing(PREFIXES, 9)}", file=tensor.file.path, tensor=tensor.name
        )
    module, dot, leaf = tensor.name.removeprefix(prefix).partition(".")
    if not module or not dot or "lora_magnitude_vector" in module or module.endswith(("_lora_A", "_lora_B")):
        raise MalformedError(
            "not a key of this format",
            file=tensor.file.path,
            tensor=tensor.name,
            hint="a broken export mangles keys like this; convert the original file",
        )
    for mark, kind in _NOT_READ.items():
        if leaf == mark or leaf.startswith((f"{mark}.", mark if mark.endswith("_") else f"{mark}.")):
            raise FitError(f"{kind} is not read yet", file=tensor.file.path, tensor=tensor.name)
    if leaf not in _LORA and leaf not in _OFFSETS:
        raise FitError(f"the parameter '{leaf}' is not known", file=tensor.file.path, tensor=tensor.name)
    return PREFIXES[prefix], module, leaf


def _module(parts: Mapping[str, StoredTensor]) -> Iterable[tuple[str, Update]]:
    """``(weight or bias, update)`` for every update of one module."""
    have = [leaf for leaf in _LORA if leaf in parts and leaf != "alpha"]
    for leaf in have:
        lacking = [other for other in ("lora_down.weight", "lora_up.weight") if other not in parts]
        if lacking:
            tensor = parts[leaf]
            raise MalformedError(f"without its '{lacking[0]}'", file=tensor.file.path, tensor=tensor.name)
    if have:
        lora = _lora(parts)
        scale = parts.get("dora_scale")
        yield "weight", lora if scale is None else _dora(lora, scale, parts)
    for leaf, of in _OFFSETS.items():
        if leaf in parts:
            tensor = parts[leaf]
            vector = of == "bias" or len(tensor.shape) == 1
            yield of, Offset(Factor((tensor,), (tensor.numel,) if vector else tensor.matrix))


def _lora(parts: Mapping[str, StoredTensor]) -> LoRA:
    down, up, mid = parts["lora_down.weight"], parts["lora_up.weight"], parts.get("lora_mid.weight")
    if len(down.shape) < 2 or len(up.shape) < 2:
        tensor = down if len(down.shape) < 2 else up
        raise MalformedError(f"a factor of shape {list(tensor.shape)}", file=tensor.file.path, tensor=tensor.name)
    rank = down.shape[0]
    noted = (parts["alpha"],) if "alpha" in parts else ()
    alpha = _scalar(parts["alpha"]) if noted else float(rank)
    if up.matrix[1] != (rank if mid is None else mid.shape[0]):
        raise FitError(
            f"'lora_up' is {list(up.shape)}, but 'lora_down' has rank {rank}", file=up.file.path, tensor=up.name
        )
    if mid is None:
        a = Factor((down,), down.matrix)
    else:
        a = _with_core(mid, down)
        rank = mid.shape[0]
    # alpha counts against the rank of lora_down, also where a core sits between the factors
    return LoRA(a, Factor((up,), up.matrix), alpha / down.shape[0], alpha * rank / down.shape[0], noted)


def _with_core(mid: StoredTensor, down: StoredTensor) -> Factor:
    """The ``A`` of a convolution in CP form (LyCORIS ``lora_mid``).

    ``A[m, j, ...] = sum_n mid[m, n, ...] down[n, j]``.
    """
    inputs = down.matrix[1]
    if len(mid.shape) < 3 or mid.shape[1] != down.shape[0] or any(size != 1 for size in down.shape[2:]):
        raise FitError(
            f"'lora_mid' is {list(mid.shape)}, 'lora_down' {list(down.shape)}", file=mid.file.path, tensor=mid.name
        )

    def fold(core: Array, factor: Array) -> Array:
        import numpy

        return numpy.einsum("mn...,nj->mj...", core, factor.reshape(down.shape[0], inputs))

    return Factor((mid, down), (mid.shape[0], inputs * math.prod(mid.shape[2:])), fold)


def _dora(lora: LoRA, scale: StoredTensor, parts: Mapping[str, StoredTensor]) -> DoRA:
    """A DoRA whose axis follows from the shape of its magnitude: (out, 1, ...) or (1, in, ...)."""
    out, inputs = lora.shape[0], parts["lora_down.weight"].shape[1]
    sizes = scale.shape[:2]
    if sizes == (out, 1) and scale.numel == out:
        return DoRA(lora, Factor((scale,), (out,)))
    if sizes == (1, inputs) and scale.numel == inputs:
        return DoRA(lora, Factor((scale,), (inputs,)), per_row=False)
    raise FitError(
        f"'dora_scale' is {list(scale.shape)}, for a weight of {[out, inputs]}", file=scale.file.path, tensor=scale.name
    )


def _scalar(tensor: StoredTensor) -> float:
    """One number, read without torch (a header must be readable without it)."""
    if tensor.numel != 1 or tensor.dtype not in (*_SCALAR_FORMATS, DType.BF16, DType.I64, DType.I32):
        raise MalformedError(
            f"an alpha of shape {list(tensor.shape)}, {tensor.dtype.label}", file=tensor.file.path, tensor=tensor.name
        )
    raw = bytes(tensor.file.read(tensor.offset, tensor.dtype.bits // 8))
    if tensor.dtype in (DType.I64, DType.I32):
        value = float(int.from_bytes(raw, "little", signed=True))
    elif tensor.dtype is DType.BF16:
        value = struct.unpack("<f", b"\0\0" + raw)[0]
    else:
        value = struct.unpack(_SCALAR_FORMATS[tensor.dtype], raw)[0]
    if value == 0 or not math.isfinite(value):
        raise MalformedError(f"an alpha of {value}", file=tensor.file.path, tensor=tensor.name)
    return value


def _kind(updates: Mapping[Site, tuple[Update, ...]]) -> str:
    kinds = sorted({update.kind for chain in updates.values() for update in chain})
    return " + ".join(kinds)
