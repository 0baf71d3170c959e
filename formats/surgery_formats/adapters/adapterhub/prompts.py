# SPDX-License-Identifier: Apache-2.0
"""Prefixes and prompts of AdapterHub's library as soft prompts, and a prefix as its file.

Its tokens keep the positions that they had without a prefix, where PEFT's come behind it; its prompts go behind the embeddings,
with their positions and norm. The kinds say so: `HUB_PREFIX`, `HUB_PROMPT`.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from surgery_formats.adapters.adapterhub.files import CONFIG_FILE, TENSOR_FILE
from surgery_formats.adapters.format import Entry, NewTensor, Rendering
from surgery_formats.arrays import Array, cast
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.canonical.prompts import Prefix, SoftPrompt
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.computed import computed
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.text import show
from surgery_formats.updates import Unmerged

__all__ = ["HUB_PREFIX", "HUB_PROMPT", "hub_prompt", "render_hub_prefix"]

HUB_PREFIX, HUB_PROMPT = "HUB_PREFIX", "HUB_PROMPT"
_FLAT, _TOKENS, _FIRST, _SECOND = "control_trans", "wte.weight", "control_trans.0", "control_trans.2"
_LAYERS = (
    "surgery.layers"  # in the header of what is written here: the library repeats its table for each layer, to tell
)
_LAYER = re.compile(r"\.(\d+)\.[^.]*\.prefix_tuning\.")


def hub_prompt(adapter: Adapter) -> SoftPrompt | None:
    """The prefix or the prompt of an adapter; None where it has neither.

    Of a prefix the heads of a layer are not told by its file: they are taken for one.

    Raises:
        FitError: gates, layers that are left out, other parts beside it, or another activation than tanh and ReLU.
    """
    found = {site.path: u for site, chain in adapter.updates.items() for u in chain if isinstance(u, Unmerged)}
    prompts = [u for u in found.values() if u.kind == "prompt"]
    prefixes = {path: u for path, u in found.items() if u.kind == "prefix"}
    if not prompts and not prefixes:
        return None
    config = adapter.config.get("config")
    settings = config if isinstance(config, dict) else {}
    if len(adapter.updates) > len(prompts) + len(prefixes) or (prompts and prefixes) or len(prompts) > 1:
        raise FitError("it has other parts beside its virtual tokens", file=adapter.path)
    if prompts:
        ((_, rows),) = prompts[0].held
        (table,) = rows.tensors
        if len(table.shape) != 2:
            raise FitError(f"{list(table.shape)}, not rows of an embedding", file=adapter.path, tensor=table.name)
        return SoftPrompt(HUB_PROMPT, table, table.shape[0], table.shape[-1]).check()
    if settings.get("use_gating") or settings.get("leave_out"):
        raise FitError("its prefix has gates, or is not on every layer", file=adapter.path)
    numbers = {int(match[1]) for tensor in adapter.tensors if (match := _LAYER.search(f".{tensor.name}"))}
    told = adapter.metadata.get(_LAYERS, "")
    layers = len(numbers) or (int(told) if told.isdecimal() and len(told) < 6 else 0)
    whole = min(prefixes.items(), key=lambda item: len(item[0]))[1]
    parts = {name.partition(".")[2]: factor.tensors[0] for name, factor in whole.held}
    if {name.partition(".")[0] for name, _ in whole.held} != {"self_prefix"} or not layers:
        raise FitError("its prefix is not that of a decoder's own attention", file=adapter.path)
    length = settings.get("prefix_length")
    table = _table(parts, length if type(length) is int else 0, str(settings.get("non_linearity", "tanh")), adapter)
    if table.shape[1] % (2 * layers):
        raise FitError(f"{table.shape[1]} numbers per token for {layers} layers", file=adapter.path)
    width = table.shape[1] // (2 * layers)
    return SoftPrompt(HUB_PREFIX, table, table.shape[0], width, 1, Prefix(layers, 1, width)).check()


def _table(parts: dict[str, Tensor], tokens: int, activation: str, adapter: Adapter) -> Tensor:
    """``(tokens, 2 * layers * width)``: as stored, or as the projection makes it."""
    if (flat := parts.get(_FLAT)) is not None:
        if tokens < 1 or flat.numel % tokens:
            raise FitError(f"{flat.numel} numbers for {tokens} tokens", file=adapter.path, tensor=flat.name)
        shape = tokens, flat.numel // tokens
        return computed(flat.name, shape, (flat,), lambda: flat.read().reshape(shape), flat.dtype)
    names = (_TOKENS, f"{_FIRST}.weight", f"{_FIRST}.bias", f"{_SECOND}.weight", f"{_SECOND}.bias")
    if parts.keys() != set(names) or activation not in ("tanh", "relu"):
        raise FitError(f"its prefix goes through '{show(activation, 40)}', which is not read", file=adapter.path)
    tensors = [parts[name] for name in names]
    sizes = [tensor.shape for tensor in tensors]
    inner, width = (sizes[3][1], sizes[3][0]) if len(sizes[3]) == 2 else (0, 0)
    if (
        sizes[1:] != [(inner, sizes[0][-1] if sizes[0] else 0), (inner,), (width, inner), (width,)]
        or len(sizes[0]) != 2
    ):
        raise FitError("the sizes of what its prefix goes through do not fit", file=adapter.path)

    def make() -> Array:
        rows, first, first_bias, second, second_bias = (cast(tensor.read(), DType.F32) for tensor in tensors)
        inner = rows @ first.T + first_bias
        inner = np.tanh(inner) if activation == "tanh" else np.maximum(inner, 0)
        return inner @ second.T + second_bias

    shape = tensors[0].shape[0], tensors[3].shape[0]
    return computed(_FLAT, shape, tensors, make)


def render_hub_prefix(table: Array, layers: int, name: str, root: str, model: dict[str, Any]) -> Rendering:
    """A flat prefix as a folder of the library.

    Args:
        table: ``(tokens, 2 * layers * width)``.
        layers: How many the model has.
        name: Of the adapter.
        root: The module that holds the library's pool: ``model``.
        model: What the configuration says of the base.
    """
    key = f"{root}.prefix_tuning.prefix_tunings.{name}.self_prefix.{_FLAT}"
    config = {
        "architecture": "prefix_tuning",
        "bottleneck_size": 512,
        "cross_prefix": True,
        "dropout": 0.0,
        "encoder_prefix": True,
        "flat": True,
        "init_weights_seed": None,
        "leave_out": [],
        "non_linearity": "tanh",
        "prefix_length": len(table),
        "shared_gating": True,
        "use_gating": False,
    }
    whole = {"config": config, "name": name, "version": "adapters.1.3.0", **model}
    text = json.dumps(whole, indent=2, sort_keys=True) + "\n"
    flat = np.ascontiguousarray(table, np.float32).reshape(-1)
    return Rendering(
        TENSOR_FILE,
        (NewTensor(key, DType.F32, flat.shape, lambda: flat),),
        {"format": "pt", _LAYERS: str(layers)},
        {CONFIG_FILE: text.encode()},
        (Entry(key, "exact", "virtual tokens"),),
    )
