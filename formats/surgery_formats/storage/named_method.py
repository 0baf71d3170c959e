# SPDX-License-Identifier: Apache-2.0
"""Whether the method that a config.json names is that of the weights: programs choose how to read them by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import Storage
from surgery_formats.storage.quantised import quantisation_of
from surgery_formats.storage.unread import method_of
from surgery_formats.text import show

__all__ = ["check_method"]

_FLOATS = ("fp8", "mxfp4", "nvfp4")
_STORAGES: Mapping[str, tuple[str, ...]] = {
    "auto-round": ("gptq", "awq", *_FLOATS),
    "awq": ("awq",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed-tensors",),
    "fbgemm_fp8": ("fp8",),
    "fp8": ("fp8", "mxfp4"),  # DeepSeek V4's experts
    "gptq": ("gptq",),
    "hqq": ("hqq",),
    "intel/auto-round": ("gptq", "awq", *_FLOATS),
    "metal": ("mlx",),
    "modelopt": _FLOATS,
    "mxfp4": ("mxfp4",),
    "quark": _FLOATS,
    "torchao": ("torchao",),
}
"""By quant_method: the storages of this package that hold what it makes."""
_BITS = {"load_in_4bit": 4, "load_in_8bit": 8}


def check_method(storage: str, weight: Storage, config: Mapping[str, Any]) -> None:
    """Refuse a weight of codes and scales that the model's program would not read as what it is.

    Where no method is named, or one that is not known here, tensors alone tell what they are. A weight without scales,
    as one that was cast to FP8, is of no method.

    Args:
        storage: Name of the `StorageKind` that claims it.
        weight: The weight.
        config: config.json of the network.

    Raises:
        MalformedError: another method is named.
    """
    named = quantisation_of(config)
    own = _STORAGES.get(str(named.get("quant_method")).lower())
    if len(weight.sources) < 2:
        return
    bits = [count for key, count in _BITS.items() if named.get(key) is True]
    foreign = own is not None and storage not in own and any(storage in each for each in _STORAGES.values())
    if foreign or (storage == "bitsandbytes" and bits and getattr(weight, "bits", None) not in bits):
        said = show(method_of(config), 60) + "".join(f", {key}" for key in _BITS if named.get(key) is True)
        raise MalformedError(
            f"is stored as {weight.kind} ({storage}), where the configuration says {said}",
            file=weight.sources[0].path,
            tensor=weight.name,
            hint="correct the quantization_config of config.json, or take it out",
        )
