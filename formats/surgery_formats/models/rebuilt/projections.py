# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with its fused projections in parts, or the parts as one: ranges of files, and no arithmetic.

Phi-3 in parts is a Llama, or a Mistral where it has a window; Llama and Mistral fused are a Phi-3. Both ways are of
transformers 5.23, whose classes share the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from surgery_formats.errors import FitError
from surgery_formats.files.raw import FileRange, joined_file
from surgery_formats.models.component import Component
from surgery_formats.models.families.projections import PROJECTIONS, FusedProjection, heights_by_config
from surgery_formats.models.rebuilt.rebuilt import Rebuilt, one_network, with_shards
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["KINDS", "with_projections"]

KINDS: Mapping[str, FusedProjection] = dict(zip(("qkv", "gate-up"), PROJECTIONS, strict=True))
"""What projections are called on the command line."""
_LEAVES = ("weight", "bias")
_CLASSES = {"phi3": "Phi3", "llama": "Llama", "mistral": "Mistral"}
_PHI3: Mapping[str, Any] = {"rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000}
_LLAMA: Mapping[str, Any] = {"rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
"""Defaults of configurations that differ."""


def with_projections(rebuilt: Rebuilt, kinds: Sequence[str], *, fused: bool) -> Rebuilt:
    """`rebuilt` with these projections fused, or in parts.

    Args:
        rebuilt: What has been made so far.
        kinds: Of `KINDS`.
        fused: Whether the parts become one.

    Raises:
        FitError: no such projection, one that is stored as codes, or with other sizes than config.json says.
    """
    component = one_network(rebuilt.checkpoint)
    if component.is_quantised or component.unread is not None:
        raise FitError("its projections are stored as codes, whose rows are not cut or joined", file=component.folder)
    origins = dict(rebuilt.origins)
    shards = [list(shard.tensors) for shard in component.shards]
    for kind in kinds:
        if kind not in KINDS:
            raise FitError(f"no projection '{show(kind)}'", hint=" or ".join(KINDS))
        change = _fuse if fused else _split
        count = sum(change(component, KINDS[kind], tensors, shards, origins) for tensors in shards)
        if not count:
            projection = KINDS[kind]
            named = " and ".join(projection.parts) if fused else projection.whole
            raise FitError(
                f"has no {named}, so that nothing is {'joined' if fused else 'parted'}", file=component.folder
            )
    config, warnings = _config(component.config, tuple(kinds), fused=fused)
    facts = {"fused" if fused else "split": list(kinds)}
    made = list(zip(component.shards, shards, strict=True))
    return with_shards(rebuilt, made, config, facts, origins=origins, warnings=warnings)


def _split(
    component: Component,
    projection: FusedProjection,
    tensors: list[StoredTensor],
    shards: Sequence[list[StoredTensor]],
    origins: dict[str, tuple[StoredTensor, ...]],
) -> int:
    """Part the projections of one shard, in place; their number."""
    heights, count = heights_by_config(projection, component.config), 0
    for tensor in tuple(tensors):
        path, _, leaf = tensor.name.rpartition(".")
        if leaf not in _LEAVES or not f".{path}".endswith(f".{projection.whole}"):
            continue
        _check_rows(tensor)
        if heights is None or sum(heights) != tensor.shape[0]:
            said = "nothing" if heights is None else f"parts of {list(heights)} rows"
            raise FitError(
                f"has {tensor.shape[0]} rows, and config.json says {said}", file=tensor.path, tensor=tensor.name
            )
        row = tensor.nbytes // tensor.shape[0]
        starts = accumulate(heights, initial=0)
        parts = [
            replace(
                tensor,
                name=f"{path.removesuffix(projection.whole)}{part}.{leaf}",
                shape=(height, *tensor.shape[1:]),
                offset=tensor.offset + start * row,
                nbytes=height * row,
            )
            for part, height, start in zip(projection.parts, heights, starts, strict=False)
        ]
        at = tensors.index(tensor)
        tensors[at : at + 1] = parts
        origins |= dict.fromkeys((part.name for part in parts), origins.pop(tensor.name))
        count += 1
    return count


def _fuse(
    component: Component,
    projection: FusedProjection,
    tensors: list[StoredTensor],
    shards: Sequence[list[StoredTensor]],
    origins: dict[str, tuple[StoredTensor, ...]],
) -> int:
    """Join the parts whose first one is in this shard, in place; the number of what they become."""
    first, count = projection.parts[0], 0
    for tensor in tuple(tensors):
        path, _, leaf = tensor.name.rpartition(".")
        if leaf not in _LEAVES or not f".{path}".endswith(f".{first}"):
            continue
        stem = path.removesuffix(first)
        names = [f"{stem}{part}.{leaf}" for part in projection.parts]
        found = [next((one for other in shards for one in other if one.name == name), None) for name in names]
        parts = [part for part in found if part is not None]
        if len(parts) < len(names):
            missing = next(name for name, part in zip(names, found, strict=True) if part is None)
            raise FitError(f"is there, and '{show(missing)}' is not", file=tensor.path, tensor=tensor.name)
        if len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
            raise FitError("has another type or width than the parts beside it", file=tensor.path, tensor=tensor.name)
        for part in parts:
            _check_rows(part)
        name = f"{stem}{projection.whole}.{leaf}"
        file = joined_file([FileRange(part.file, part.offset, part.nbytes) for part in parts], name)
        shape = (sum(part.shape[0] for part in parts), *tensor.shape[1:])
        tensors[tensors.index(tensor)] = StoredTensor(name, tensor.dtype, shape, file, 0, file.size)
        for other in shards:
            other[:] = [one for one in other if one.name not in names]
        origins[name] = tuple(one for part in parts for one in origins.pop(part.name))
        count += 1
    return count


def _check_rows(tensor: StoredTensor) -> None:
    if tensor.strides is not None or tensor.dtype.bits % 8 or not tensor.shape or not tensor.shape[0]:
        raise FitError("its rows do not lie one behind the other", file=tensor.path, tensor=tensor.name)


def _config(config: Mapping[str, Any], kinds: tuple[str, ...], *, fused: bool) -> tuple[dict[str, Any], list[str]]:
    """The configuration of the class that has these projections, where there is one."""
    changed = dict(config)
    kind = config.get("model_type")
    if config and set(kinds) == set(KINDS):
        if not fused and kind == "phi3" and _whole_heads(config):
            return _renamed({**_PHI3, **changed}, "mistral" if config.get("sliding_window") else "llama"), []
        if fused and kind in ("llama", "mistral") and _like_phi3(config):
            return _renamed({**_LLAMA, **changed}, "phi3"), []
    what = "fused" if fused else "in parts"
    said = f"no class of transformers is known that has these projections of '{show(kind)}' {what}: config.json stays"
    return changed, [said] if config else []


def _whole_heads(config: Mapping[str, Any]) -> bool:
    rope = config.get("rope_parameters")
    nested = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    return all(factor in (None, 1, 1.0) for factor in (config.get("partial_rotary_factor"), nested))


def _like_phi3(config: Mapping[str, Any]) -> bool:
    """Whether Phi-3 can say all that this configuration says."""
    ropes = (config.get("rope_parameters"), config.get("rope_scaling"))
    types = {rope.get("rope_type", rope.get("type", "default")) for rope in ropes if isinstance(rope, Mapping)}
    return types <= {"default", "longrope"} and not (config.get("attention_bias") or config.get("mlp_bias"))


def _renamed(config: dict[str, Any], kind: str) -> dict[str, Any]:
    before = _CLASSES[str(config["model_type"])]
    config["model_type"] = kind
    for key in ("auto_map", "mlp_bias", "attention_bias", "pretraining_tp") if kind == "phi3" else ("auto_map",):
        config.pop(key, None)
    if isinstance(named := config.get("architectures"), list):
        config["architectures"] = [str(name).replace(before, _CLASSES[kind], 1) for name in named]
    rope = config.get("rope_parameters")
    if kind != "phi3" and isinstance(rope, dict):
        config["rope_parameters"] = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    if kind == "phi3":
        config.setdefault("original_max_position_embeddings", config.get("max_position_embeddings", 2048))
        config.setdefault("sliding_window", None if before == "Llama" else 4096)
    return config
