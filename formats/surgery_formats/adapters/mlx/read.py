# SPDX-License-Identifier: Apache-2.0
"""Read an MLX-LM adapter folder (docs/formats.md) into the canonical form.

Factors are stored transposed, ``lora_a`` (in, rank) and ``lora_b`` (rank, out), and the scale is absolute: alpha is not
divided by the rank. Source: mlx-lm 0.32, ``tuner/lora.py`` and ``tuner/dora.py``. Older folders of mlx-vlm have ``A`` and ``B`` in
their place, and ``rank`` and ``alpha`` in the configuration (mlx-vlm 0.7.10, ``trainer/peft/lora.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery_formats.adapters.embeddings import is_embedding
from surgery_formats.adapters.mlx.files import TENSOR_FILE, open_mlx
from surgery_formats.canonical.adapter import Adapter, ModuleKind, Site
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.files.places import exists
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show
from surgery_formats.updates import DoRA, Factor, LoRA, Replacement, Stacked, Update

__all__ = ["read_mlx"]

_LEAVES = ("lora_a", "lora_b", "m")
_OF_VLM = {"A": "lora_a", "B": "lora_b"}  # mlx-vlm's own layer, ``trainer/peft/lora.py``, which it still loads
_DEFAULT_SCALE = 20.0  # mlx-lm's, before 2024-04 and in its examples


@dataclass(frozen=True, slots=True)
class _Config:
    """What decides what the tensors mean."""

    kind: str
    scale: float
    traps: tuple[str, ...]


def read_mlx(path: Path, scale: float | None = None) -> Adapter:
    """Read a folder with adapters.safetensors and adapter_config.json, or an adapters.npz.

    Args:
        path: Of a folder, or of an ``.npz`` file.
        scale: Of a file that does not state it.

    Raises:
        NotFoundError: a file is missing.
        MalformedError: the configuration or a key is not mlx-lm's.
        FitError: no scale is known, or another one is stated.
    """
    file, shard = open_mlx(path)
    settings = file.with_name("adapter_config.json")
    raw = read_object(settings) if exists(settings, links=True) else {}
    config = _parse(raw, settings, scale, None if file.name == TENSOR_FILE else file)
    modules: dict[str, dict[str, StoredTensor]] = {}
    updates: dict[Site, tuple[Update, ...]] = {}
    for tensor in shard.tensors:
        if not tensor.name:
            raise MalformedError("a tensor has no name", file=file)
        module, _, leaf = tensor.name.rpartition(".")
        leaf = _OF_VLM.get(leaf, leaf) if _is_vlm(raw) else leaf
        if config.kind == "full":
            updates[Site(tensor.name)] = (Replacement(Factor.of(tensor)),)
        elif leaf in _LEAVES and module:
            modules.setdefault(module, {})[leaf] = tensor
        else:
            raise MalformedError("neither lora_a, lora_b nor m", file=file, tensor=tensor.name)
    for module, parts in modules.items():
        update = _module(module, parts, config)
        stacked = len(parts["lora_a"].shape) == 3
        kind: ModuleKind = "experts" if stacked else "embedding" if is_embedding(module) else "linear"
        updates[Site(f"{module}.weight", module_kind=kind)] = (update,)
    return Adapter(
        path=path,
        format="mlx",
        kind=config.kind.upper(),
        updates=dict(sorted(updates.items())),
        tensors=shard.tensors,
        base_name=raw["model"] if isinstance(raw.get("model"), str) else "",
        base_id=shard.metadata.get("surgery.base", ""),
        config=raw,
        metadata=dict(shard.metadata),
        stated_issues=(*config.traps, *_tie_trap(modules)),
        keeps_ties=True,
    )


def _tie_trap(modules: Iterable[str]) -> Iterable[str]:
    if any(map(is_embedding, modules)):
        yield "it trains the embedding: where the base ties its head to it, mlx-lm lets the head follow"


def _parse(raw: Mapping[str, Any], file: Path, told: float | None, old: Path | None) -> _Config:
    """Read the configuration `file`; `old` are weights of the kind that have none, and had one scale or another."""
    kind = raw.get("fine_tune_type", "dora" if raw.get("use_dora") is True else "lora")
    if kind not in ("lora", "dora", "full"):
        raise FitError(f"the fine_tune_type {kind!r} is not known", file=file)
    parameters = raw.get("lora_parameters") or {}  # null for "full"
    if not isinstance(parameters, Mapping):
        raise MalformedError("'lora_parameters' is not an object", file=file)
    scale = _number(parameters.get("scale", raw.get("scale")), "scale", file)
    if told is not None and (scale not in (None, told) or kind == "full" or _is_vlm(raw)):
        raise FitError(f"a scale of {told:g} was given, and its configuration says otherwise", file=file)
    if _is_vlm(raw):
        return _of_vlm(raw, file)
    traps = []
    if told is not None and scale is None:
        scale = told
        traps.append(f"no scale in its files: {told:g} is the one that was given")
    elif scale is None and old is not None:
        raise FitError(
            "the scale of its LoRAs is not in its file",
            file=old,
            hint="give what its layers multiplied by with `alpha=`: 20 where nobody changed it, 2 in the first versions",
        )
    elif scale is None:
        scale = _DEFAULT_SCALE
        if kind != "full":
            traps.append(f"no scale in its configuration: mlx-lm's old default, {_DEFAULT_SCALE:g}, is used")
    alpha = _number(parameters.get("alpha"), "alpha", file)
    rank = _number(parameters.get("rank"), "rank", file)
    if alpha is not None and "lora_layers" in raw and "num_layers" not in raw and rank:
        # Up to 2024-03 mlx-lm multiplied alpha / rank in; later versions ignore a stray alpha and use num_layers.
        scale *= alpha / rank
        traps.append("alpha and scale are both given: read as mlx-lm did before 2024-04, scale * alpha / rank")
    elif alpha is not None:
        traps.append("alpha is given: mlx-lm ignores it, only scale counts")
    return _Config(kind, scale, tuple(traps))


def _is_vlm(raw: Mapping[str, Any]) -> bool:
    """Whether it is mlx-vlm's older configuration, of which nothing is mlx-lm's."""
    return "rank" in raw and "alpha" in raw and not raw.keys() & {"lora_parameters", "fine_tune_type", "lora_layers"}


def _of_vlm(raw: Mapping[str, Any], file: Path) -> _Config:
    alpha, rank = _number(raw["alpha"], "alpha", file), _number(raw["rank"], "rank", file)
    if alpha is None or not rank:
        raise MalformedError("'rank' and 'alpha' are no numbers above 0", file=file)
    older = "read as mlx-vlm 0.7.10 does, alpha / rank; where an older one trained it, alpha itself was the scale"
    return _Config("lora", alpha / rank, (older,) if rank != 1 else ())


def _number(value: object, name: str, file: Path) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
        raise MalformedError(f"'{name}' is {show(repr(value), 40)}, not a number of at most 1e30", file=file)
    return float(value)


def _module(module: str, parts: Mapping[str, StoredTensor], config: _Config) -> Update:
    for have, lack in (("lora_a", "lora_b"), ("lora_b", "lora_a"), ("m", "lora_a")):
        if have in parts and lack not in parts:
            tensor = parts[have]
            raise MalformedError(f"without its '{lack}'", file=tensor.file.path, tensor=tensor.name)
    a, b, m = parts["lora_a"], parts["lora_b"], parts.get("m")
    if (m is None) == (config.kind == "dora"):
        what = "a magnitude in an adapter that is not DoRA" if m else "no magnitude 'm' in a DoRA adapter"
        raise MalformedError(what, file=a.file.path, tensor=(m or a).name)
    if len(a.shape) == 3:
        return _switch(a, b, config.scale, m)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0] or not a.shape[1]:
        raise FitError(f"is {list(a.shape)}, its lora_b {list(b.shape)}", file=a.file.path, tensor=a.name)
    rank = a.shape[1]
    if is_embedding(module):
        lora = LoRA(Factor.of(b), Factor.of(a), config.scale)
    else:
        lora = LoRA(
            Factor((a,), (rank, a.shape[0]), lambda t: t.T),
            Factor((b,), (b.shape[1], rank), lambda t: t.T),
            config.scale,
        )
    if m is None:
        return lora
    if m.shape != (lora.shape[0],):
        raise FitError(f"{m.numel} magnitudes for {lora.shape[0]} rows", file=m.file.path, tensor=m.name)
    return DoRA(lora, Factor.of(m))


def _switch(a: StoredTensor, b: StoredTensor, scale: float, m: StoredTensor | None) -> Stacked:
    """All experts of a ``SwitchLinear``: ``lora_a`` (E, rank, in), ``lora_b`` (E, out, rank), not transposed."""
    if m is not None:
        raise MalformedError(
            "a magnitude for stacked experts, which mlx-lm does not have", file=m.file.path, tensor=m.name
        )
    if len(b.shape) != 3 or a.shape[0] != b.shape[0] or a.shape[1] != b.shape[2] or 0 in a.shape:
        raise FitError(f"is {list(a.shape)}, its lora_b {list(b.shape)}", file=a.file.path, tensor=a.name)
    experts = zip(_experts(a), _experts(b), strict=True)
    return Stacked(tuple(LoRA(Factor.of(down), Factor.of(up), scale) for down, up in experts))


def _experts(tensor: StoredTensor) -> Iterable[StoredTensor]:
    """The byte range of each expert as a tensor, so that using one does not read all."""
    step = tensor.nbytes // tensor.shape[0]
    for number in range(tensor.shape[0]):
        yield replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + number * step, nbytes=step)
