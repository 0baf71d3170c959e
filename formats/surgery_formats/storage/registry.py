# SPDX-License-Identifier: Apache-2.0
"""Kinds of storage by name, and the weights of a network that they claim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery_formats.errors import MalformedError, SurgeryError
from surgery_formats.plugins import with_plugins
from surgery_formats.storage.awq import AWQ
from surgery_formats.storage.base import Encoding, Storage, StorageKind
from surgery_formats.storage.bitsandbytes import BITSANDBYTES
from surgery_formats.storage.compressed_tensors import COMPRESSED_TENSORS
from surgery_formats.storage.fp8 import FP8
from surgery_formats.storage.gguf import GGUF_TENSORS
from surgery_formats.storage.gptq import GPTQ
from surgery_formats.storage.hqq import HQQ
from surgery_formats.storage.mlx_affine import MLX_AFFINE
from surgery_formats.storage.mlx_floats import MLX_FLOATS
from surgery_formats.storage.mxfp4 import MXFP4
from surgery_formats.storage.named_method import check_method
from surgery_formats.storage.nvfp4 import NVFP4
from surgery_formats.storage.torchao import TORCHAO
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["BUILT_IN", "ENTRY_POINTS", "claimed_weights", "storage_kinds"]

BUILT_IN: tuple[StorageKind, ...] = (
    BITSANDBYTES,
    HQQ,
    TORCHAO,
    FP8,
    MXFP4,
    NVFP4,
    COMPRESSED_TENSORS,
    GPTQ,
    AWQ,
    MLX_AFFINE,
    MLX_FLOATS,
    GGUF_TENSORS,
)
"""Beside `Plain`, which every tensor has that none of these claims."""
_MEMBERS = tuple(name for part in (Encoding, Storage) for name in vars(part) if not name.startswith("_"))
ENTRY_POINTS = "surgery.storages"  # a plugin's entry point is an object like those above


def storage_kinds() -> dict[str, StorageKind]:
    """Every kind of storage by name: the built-in ones, then plugins'.

    Raises:
        SurgeryError: see `surgery_formats.plugins.with_plugins`.
    """
    return with_plugins(ENTRY_POINTS, BUILT_IN, "storage")


def claimed_weights(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, Storage]:
    """A mapping from every stored tensor that is part of a weight to that weight.

    Raises:
        MalformedError: two weights claim a tensor or have one name, a weight has the name of another tensor, or none of
            its own, or the configuration names another method, see `check_method`.
        SurgeryError: a plugin's weight is not one, see `Storage`.
    """
    owners: dict[str, Storage] = {}
    named: dict[str, Storage] = {}
    for kind in storage_kinds().values():
        for weight in kind.claim(tensors, config):
            if (missing := next((name for name in _MEMBERS if not hasattr(weight, name)), None)) is not None:
                raise SurgeryError(
                    f"the storage '{show(kind.name)}' claims weights that are none: "
                    f"{type(weight).__name__} has no {missing}"
                )
            if not weight.sources:
                raise MalformedError(f"'{show(kind.name)}' claims '{show(weight.name)}' without a stored tensor of it")
            check_method(kind.name, weight, config)
            if named.setdefault(weight.name, weight) is not weight:
                raise MalformedError(
                    f"'{show(weight.name)}' is claimed twice, as {named[weight.name].kind} and as {weight.kind}",
                    file=weight.sources[0].path,
                    tensor=weight.sources[0].name,
                )
            for source in weight.sources:
                if owners.setdefault(source.name, weight) is not weight:
                    raise MalformedError(
                        f"belongs to '{show(weight.name)}' and to '{show(owners[source.name].name)}'",
                        file=source.path,
                        tensor=source.name,
                    )
    for weight in owners.values():
        if weight.name in tensors and owners.get(weight.name) is not weight:
            raise MalformedError(
                f"is there twice: as it is, and stored as {weight.kind}",
                file=tensors[weight.name].path,
                tensor=weight.name,
            )
    return owners
