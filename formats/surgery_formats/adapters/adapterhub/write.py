# SPDX-License-Identifier: Apache-2.0
"""Write the canonical form to a folder of AdapterHub's library.

The library makes a LoRA of one rank and alpha for every module that its configuration switches on. So smaller ranks are padded with
zeros and other scales are multiplied into ``lora_B``. A module that was switched on and is not in the file does nothing there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery_formats.adapters.adapterhub.config import HubConfig, parse_hub_config
from surgery_formats.adapters.adapterhub.files import CONFIG_FILE, TENSOR_FILE
from surgery_formats.adapters.adapterhub.places import layer_of, place_of
from surgery_formats.adapters.adapterhub.read import INSERTED
from surgery_formats.adapters.alphas import written_alpha
from surgery_formats.adapters.contents import Contents, contents_of
from surgery_formats.adapters.format import NewTensor, Rendering
from surgery_formats.adapters.writing import (
    ConversionLedger,
    commonest,
    factor_tensor,
    surviving_metadata,
    zero_padded,
)
from surgery_formats.arrays import Array
from surgery_formats.binding.sizes import component_of
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.updates import IA3, DoRA, DoRABias, LoRA, OutputDoRA, Unmerged, Update

__all__ = ["render_adapterhub"]

_VERSION = "adapters.1.3.0"
_DEFAULTS = {
    "architecture": "lora",
    "dropout": 0.0,
    "dtype": None,
    "init_weights_seed": None,
    "selfattn_lora": True,
    "use_gating": False,
    "vera_b": None,
    "vera_d": None,
}


@dataclass(frozen=True, slots=True)
class _Method:
    """The method of all modules of a file.

    Attributes:
        multiplies: Whether it is (IA)^3.
        dora: Whether it is DoRA.
        scale: Of what is added.
    """

    multiplies: bool
    dora: bool
    scale: float

    @classmethod
    def of(cls, updates: Iterable[Contents]) -> _Method:
        """The one that holds most of what there is. A plain DoRA measures what it adds with its scale: that goes into B."""
        held = list(updates)
        measured = [one.update.scale for one in held if isinstance(one.update, OutputDoRA)]
        plain = [one for one in held if one.dora]
        loras = [one.lora.scale for one in held if one.lora]
        if plain or measured:
            return cls(False, True, 1.0 if len(plain) >= len(measured) else commonest(measured) or 1.0)
        return cls(not loras, False, commonest(loras) or 1.0)


@dataclass
class _File:
    """A folder under construction.

    Attributes:
        name: Of the adapter, which is in every key.
        rank: Of every module.
        scale: Of every module.
        tensors: By key.
        ledger: What became of every update.
    """

    name: str
    rank: int
    scale: float
    tensors: dict[str, NewTensor] = field(default_factory=dict)
    ledger: ConversionLedger = field(default_factory=ConversionLedger)

    def add(self, tensor: NewTensor) -> None:
        """Store a tensor."""
        self.tensors[tensor.name] = tensor

    def key(self, module: str, part: str, container: str = "loras") -> str:
        """The key of a part of the adapter in a module."""
        return ".".join(filter(None, (module, container, self.name, part)))


def render_adapterhub(adapter: Adapter, base: Checkpoint | None) -> Rendering:
    """adapter.safetensors and adapter_config.json.

    Raises:
        FitError: a part of a pipeline; or DoRA without a base, which alone tells whether its layers have biases.
    """
    if any(site.flat or site.component for site in adapter.updates):
        raise FitError("AdapterHub has models of transformers, and no parts of pipelines", file=adapter.path)
    own = _own_config(adapter)
    updates = [(site, _held(update)) for site, chain in adapter.updates.items() for update in chain]
    method = _Method.of(held for _, held in updates)
    faults = {site: _fault(site, held, method, adapter, base) for site, held in updates}
    written = [
        (_module(site), held)
        for site, held in updates
        if not faults[site] and not isinstance(held.update, Unmerged) and place_of(_module(site))
    ]
    ranks = [held.lora.rank for _, held in written if held.lora]
    config = {
        **_DEFAULTS,
        **_switches({module for module, _ in written}),
        "alpha": written_alpha(method.scale * max(ranks, default=1)),
        "composition_mode": "scale" if method.multiplies else "add",
        "init_weights": "ia3" if method.multiplies else "lora",
        "r": max(ranks, default=1),
        "use_dora": method.dora,
    }
    kept = own is not None and (not written or _as_it_was(own, config))
    file = _File(own.name if own else _name(adapter), config["r"], method.scale)
    for site, held in updates:
        if isinstance(held.update, Unmerged) and not faults[site] and not kept:
            faults[site] = "its configuration is no longer true of the rest"
        if why := faults[site]:
            file.ledger.drop(site, held.update, why)
        elif isinstance(held.update, Unmerged):
            _inserted(file, site, held.update)
        elif isinstance(held.update, IA3):
            _vector(file, site, held.update)
        elif held.lora:
            _lora(file, site, held, held.lora)
        else:
            file.ledger.keep(site, held.update, "exact", "with its weight")
    file.ledger.drop_prompt(adapter)
    whole = {
        **(adapter.config if own else {"model_name": adapter.base_name}),
        **({} if kept else {"config": config, "version": _VERSION}),
        "name": file.name,
    }
    text = json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n"
    return Rendering(
        TENSOR_FILE,
        tuple(file.tensors[key] for key in sorted(file.tensors)),
        surviving_metadata(adapter) | {"format": "pt"},
        {CONFIG_FILE: text.encode()},
        tuple(file.ledger.entries),
        file.ledger.held_in_order(adapter),
    )


def _held(update: Update) -> Contents:
    """What files hold of an update; a DoRA of this library's own too."""
    if isinstance(update, OutputDoRA):
        return Contents(update, lora=update.added)
    return contents_of(update)


def _module(site: Site) -> str:
    return site.path.rpartition(".")[0]


def _own_config(adapter: Adapter) -> HubConfig | None:
    return parse_hub_config(adapter.config, adapter.path / CONFIG_FILE) if adapter.format == "adapterhub" else None


def _name(adapter: Adapter) -> str:
    """A name of a module, in which torch allows no dot."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", adapter.path.stem).strip("-") or "adapter"


def _fault(site: Site, held: Contents, method: _Method, adapter: Adapter, base: Checkpoint | None) -> str:
    """Why the format cannot hold an update; empty if it can."""
    update, (module, _, leaf) = held.update, site.path.rpartition(".")
    if isinstance(update, Unmerged):
        return "" if adapter.format == "adapterhub" else f"this format has no {update.kind}"
    if site.module_kind == "experts":
        return "the library has no adapters on experts"
    if held.whole:
        return "heads lie in files of their own in this format (head_config.json), which are not written"
    if leaf == "bias" and isinstance(update, IA3 | DoRABias):
        beside = adapter.updates.get(Site(f"{module}.weight"), ())
        wanted = IA3 if isinstance(update, IA3) else DoRA | OutputDoRA
        follows = place_of(module) and any(isinstance(other, wanted) for other in beside)
        return "" if follows else "this format stretches a bias only together with its weight"
    if leaf != "weight" or not (held.lora or isinstance(update, IA3)):
        return f"this format has no {update.kind}"
    if not place_of(module):
        return "the library has no adapters on this module"
    if isinstance(update, IA3):
        if not method.multiplies:
            return "one file holds either LoRA or (IA)^3"
        return "" if update.per_row else "the library stretches what a module gives, not what it gets"
    directed = isinstance(update, OutputDoRA) or held.dora is not None
    if method.dora != directed or (isinstance(update, OutputDoRA) and update.scale != method.scale):
        return "one file holds either LoRA or DoRA, of one scale"
    if held.dora and not held.dora.per_row:
        return "its magnitudes belong to columns, this format's to rows"
    if directed and place_of(module) == "qkv":
        return "the library has no DoRA on a fused projection"
    return _bias_fault(module, adapter, base) if directed else ""


def _bias_fault(module: str, adapter: Adapter, base: Checkpoint | None) -> str:
    """Of a DoRA that leaves the bias of its layer as it is; the library's stretches it."""
    bias = Site(f"{module}.bias")
    if any(isinstance(update, DoRABias) for update in adapter.updates.get(bias, ())):
        return ""
    if base is None:
        raise FitError(
            "only the base tells whether the layers of this DoRA have biases, which the library stretches too",
            file=adapter.path,
            hint="give it with `base=`",
        )
    has = component_of(bias, base).names.resolve(bias.path)
    return "the library stretches the bias of its layer too, which was not trained so" if has else ""


def _lora(file: _File, site: Site, held: Contents, lora: LoRA) -> None:
    module, rank, scale = _module(site), file.rank, file.scale
    times = lora.scale / scale if lora.scale != scale else 1.0
    out, inputs = lora.shape
    count = 3 if place_of(module) == "qkv" else 1

    def down(values: Array) -> Array:
        import numpy

        padded = zero_padded(values, 0, rank)
        return padded if count == 1 else numpy.concatenate([padded] * count)

    file.add(factor_tensor(file.key(module, "lora_A"), lora.A, (count * rank, inputs), down))
    file.add(
        factor_tensor(file.key(module, "lora_B"), lora.B, (out, rank), lambda t: zero_padded(t, 1, rank), times=times)
    )
    if magnitude := held.update.factors().get("magnitude"):
        file.add(factor_tensor(file.key(module, "m.weight"), magnitude, (out, 1)))
    folded = [f"scale {lora.scale:g} / {scale:g}"] if times != 1.0 else []
    folded += [f"rank {lora.rank} padded to {rank}"] if lora.rank != rank else []
    folded += ["A for each of q, k and v"] if count > 1 else []
    folded += [held.folded] if held.folded else []
    file.ledger.keep(site, held.update, "folded" if folded else "exact", ", ".join(folded))


def _vector(file: _File, site: Site, update: IA3) -> None:
    module, _, leaf = site.path.rpartition(".")
    if leaf == "weight":
        file.add(factor_tensor(file.key(module, "lora_B"), update.vector, (update.vector.shape[0], 1)))
    file.ledger.keep(site, update, "exact", "")


def _inserted(file: _File, site: Site, update: Unmerged) -> None:
    """As it was read."""
    module, _, container = site.path.removesuffix(".weight").rpartition(".")
    if container not in INSERTED:  # a module of the network that has a LoRA of another kind
        module, container = site.path.removesuffix(".weight"), "loras"
    for part, factor in update.held:
        file.add(factor_tensor(file.key(module, part, container), factor, factor.shape))
    file.ledger.keep(site, update, "exact", "")


def _as_it_was(own: HubConfig, made: Mapping[str, Any]) -> bool:
    """Whether the adapter's own configuration is true of what was written."""
    stated = [method for method in own.methods if method.get("architecture") == "lora"]
    if len(stated) != 1 or stated[0].get("vera_d") is not None or own.issues:
        return False
    (lora,) = own.loras
    same = all(stated[0].get(key) or not made[key] for key in ("selfattn_lora", "intermediate_lora", "output_lora"))
    acts = (lora.rank, lora.alpha, lora.multiplies, lora.dora)
    matrices = set(made["attn_matrices"]) <= set(lora.matrices)
    return (
        bool(same)
        and matrices
        and acts == (made["r"], made["alpha"], made["composition_mode"] == "scale", made["use_dora"])
    )


def _switches(modules: set[str]) -> dict[str, Any]:
    places = {place for module in modules if (place := place_of(module))}
    layers = {layer for module in modules if (layer := layer_of(module)) is not None}
    one_stack = not any(module.startswith(("encoder.block", "decoder.block", "model.decoder")) for module in modules)
    matrices = [name for name in "qkv" if name in places or "qkv" in places]
    return {
        "attn_matrices": matrices,
        "selfattn_lora": bool(matrices),
        "intermediate_lora": "intermediate" in places,
        "leave_out": sorted(set(range(max(layers, default=0))) - layers) if one_stack else [],
        "output_lora": "output" in places,
    }
