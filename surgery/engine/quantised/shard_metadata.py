# SPDX-License-Identifier: Apache-2.0
"""What a weight file's own metadata says of quantised weights, made true for an output: torchao's and ComfyUI's."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace

from surgery_formats.containers.base import Shard
from surgery_formats.files.bounded_json import parse_object
from surgery_formats.storage.quantised import METADATA_NAMES, METADATA_PLAIN

__all__ = ["true_of"]

_LAYERS = "_quantization_metadata"  # ComfyUI's: {"layers": {"blocks.0.proj": {"format": "float8_e4m3fn"}}}
_CONFIG = "quantization_config"  # of ModelOpt, for ComfyUI


def true_of(shard: Shard, coded: Collection[str]) -> Shard:
    """A shard whose metadata says what the output holds.

    Args:
        shard: The base's.
        coded: Names of the weights that are written as codes.

    Raises:
        MalformedError: ComfyUI's metadata is not what it says, and some weights stay quantised.
    """
    if METADATA_NAMES in shard.metadata:
        shard = _of_torchao(shard, coded)
    if not {_LAYERS, _CONFIG} & shard.metadata.keys():
        return shard
    kept = {key: value for key, value in shard.metadata.items() if key not in (_LAYERS, _CONFIG)}
    if coded:
        kept |= {key: shard.metadata[key] for key in (_CONFIG,) if key in shard.metadata}
        if _LAYERS in shard.metadata:
            kept[_LAYERS] = _layers(shard, coded)
    return replace(shard, metadata=kept)


def _layers(shard: Shard, coded: Collection[str]) -> str:
    """Only those layers that stay quantised."""
    told = parse_object(shard.metadata[_LAYERS].encode(), file=shard.path)
    layers = told.get("layers")
    if not isinstance(layers, dict):
        return shard.metadata[_LAYERS]
    modules = {name.removesuffix(".weight") for name in coded}
    endings = {module[at:] for module in modules for at in _starts(module)}  # a layer may be named from a network on
    kept = {name: layer for name, layer in layers.items() if name in endings}
    return shard.metadata[_LAYERS] if kept == layers else json.dumps({**told, "layers": kept})


def _starts(module: str) -> list[int]:
    return [0, *(at + 1 for at, letter in enumerate(module) if letter == ".")]


def _of_torchao(shard: Shard, coded: Collection[str]) -> Shard:
    """A shard of which the metadata tells the classes of the weights that are quantised; nothing, if none is."""
    told = {key: METADATA_PLAIN if _is_class(value) else value for key, value in shard.metadata.items()}
    kept = {key: shard.metadata[key] for key in coded if key in told}
    if not coded:
        told = {key: value for key, value in told.items() if key != METADATA_NAMES and value != METADATA_PLAIN}
    return replace(shard, metadata=told | kept)


def _is_class(value: str) -> bool:
    return value.startswith(METADATA_PLAIN.partition(" ")[0])
