# SPDX-License-Identifier: Apache-2.0
"""From the canonical form to a PEFT folder.

Ranks and scales become ``r``, ``lora_alpha``, ``rank_pattern`` and ``alpha_pattern`` with anchored full paths as keys, unless the
adapter was a PEFT adapter whose own configuration still gives every module its rank and scale: then that stays as it was written.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from surgery_formats.adapters.experts import SWITCH, fused_of, taken_apart
from surgery_formats.adapters.format import NewTensor, Rendering
from surgery_formats.adapters.mlx.read import EMBEDDINGS
from surgery_formats.adapters.peft.config import PeftConfig, parse_config
from surgery_formats.adapters.peft.other_kinds import KINDS
from surgery_formats.adapters.peft.parameters import EXPERTS_ORDER_SINCE, innermost_first
from surgery_formats.adapters.writing import (
    ConversionLedger,
    commonest,
    copied,
    factor_dtype,
    made,
    places_of,
    surviving_metadata,
    whole_place,
)
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing
from surgery_formats.updates import DoRA, Factor, LoRA, Offset, Replacement, Stacked, TokenRows, Update

if TYPE_CHECKING:
    import torch

__all__ = ["render_peft"]

_PREFIX = "base_model.model."
_WRAPPED = ".base_layer.out_proj"
_NO_TARGET = (
    "dummy-target-modules"  # PEFT refuses an adapter without a target, but for this name (peft.utils.constants)
)
_SURVIVING = ("auto_mapping", "inference_mode", "lora_dropout", "revision", "task_type")  # say nothing about tensors


@dataclass
class _PeftWriter:
    """What has been written so far."""

    ledger: ConversionLedger = field(default_factory=ConversionLedger)
    tensors: dict[str, NewTensor] = field(default_factory=dict)
    settings: dict[str, tuple[int, float]] = field(default_factory=dict)  # module -> rank, alpha
    saved: set[str] = field(default_factory=set)
    rows: dict[str, list[int]] = field(default_factory=dict)  # module -> token ids
    bias: bool = False  # biases stored whole
    parameters: list[tuple[Site, Stacked]] = field(default_factory=list)
    biased: bool = False

    def add(self, tensor: NewTensor) -> None:
        """One tensor of the file."""
        if tensor.name in self.tensors:
            raise FitError("two updates have the same key in this format", tensor=tensor.name)
        self.tensors[tensor.name] = tensor


def render_peft(adapter: Adapter, base: Checkpoint | None) -> Rendering:
    """adapter_model.safetensors and adapter_config.json.

    Raises:
        FitError: flattened names and no base, or several parts of a pipeline, of which a PEFT folder can hold one.
    """
    if adapter.format == "peft" and adapter.kind in KINDS:
        return _as_stored(adapter)
    _check_sites(adapter, base)
    own = parse_config(adapter.config, adapter.path) if adapter.format == "peft" else None
    state = _PeftWriter()
    dora = any(isinstance(update, DoRA) for chain in adapter.updates.values() for update in chain)
    for site, chain in adapter.updates.items():
        for update in chain:
            if isinstance(update, LoRA | DoRA):
                _lora(site, update, base, own, state, dora=dora)
                _tied_head(site, update, adapter, base, state)
    for site, chain in adapter.updates.items():
        for update in chain:
            if not isinstance(update, LoRA | DoRA):
                _other(site, update, adapter, base, own, state)
    _parameters(state)
    if adapter.prompt is not None and own is not None:
        state.add(copied(adapter.prompt.table.name, adapter.prompt.table))
        state.ledger.keep_prompt(adapter.prompt.table)
    else:
        state.ledger.drop_prompt(adapter)
    config = _config(adapter, own, state, dora=dora)
    metadata = surviving_metadata(adapter) | {"format": "pt"}
    tensors = tuple(state.tensors[name] for name in sorted(state.tensors))
    small = {"adapter_config.json": _text(config)}
    held = state.ledger.held_in_order(adapter)
    return Rendering("adapter_model.safetensors", tensors, metadata, small, tuple(state.ledger.entries), held)


def _as_stored(adapter: Adapter) -> Rendering:
    """A kind of PEFT's own beside LoRA: the same tensors under the same configuration."""
    ledger = ConversionLedger()
    for site, chain in adapter.updates.items():
        for update in chain:
            ledger.keep(site, update, "exact", update.tensors[0].name)
    idle = {entry.tensor.name for entry in adapter.ignored}
    tensors = tuple(copied(tensor.name, tensor) for tensor in adapter.tensors if tensor.name not in idle)
    metadata = surviving_metadata(adapter) | {"format": "pt"}
    small = {"adapter_config.json": _text(dict(adapter.config))}
    return Rendering("adapter_model.safetensors", tensors, metadata, small, tuple(ledger.entries), ledger.held)


def _text(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _check_sites(adapter: Adapter, base: Checkpoint | None) -> None:
    components = sorted({site.component for site in adapter.updates})
    if len(components) > 1:
        raise FitError(
            f"a PEFT folder holds one model's adapter, this one has {listing(components)}",
            file=adapter.path,
            hint="choose one with --component",
        )
    if base is None and any(site.flat for site in adapter.updates):
        raise FitError(
            "its module names are flattened: only the base tells them apart",
            file=adapter.path,
            hint="give it with --base",
        )


def _lora(
    site: Site, update: LoRA | DoRA, base: Checkpoint | None, own: PeftConfig | None, state: _PeftWriter, *, dora: bool
) -> None:
    """One module's LoRA or DoRA."""
    lora = update.direction if isinstance(update, DoRA) else update
    why = ""
    if dora and isinstance(update, LoRA):
        why = "use_dora holds for every module of a file"
    module, shape = _module(site, lora, base, own)
    embedding = _is_embedding(module, lora, base)
    if isinstance(update, DoRA):
        size = lora.shape[1 if embedding else 0]
        if update.per_row == embedding or update.magnitude.shape[0] != size:
            why = f"its magnitudes belong to {'rows' if update.per_row else 'columns'}, this format's do not"
    if f"{_PREFIX}{module}.lora_A.weight" in state.tensors or f"{_PREFIX}{module}.lora_embedding_A" in state.tensors:
        why = "a second one on one module"
    if not site.path.endswith(".weight") and not (own and site.path.endswith("." + _leaf(site))):
        why = "this format names modules, not parameters"
    if why:
        state.ledger.drop(site, update, why)
        return
    for tensor in _factors(f"{_PREFIX}{module}", lora, shape, embedding=embedding):
        state.add(tensor)
    if isinstance(update, DoRA):
        ones = (1,) * (len(shape) - 2)
        magnitude = (1, shape[0], *ones) if ones else (update.magnitude.shape[0],)
        state.add(made(f"{_PREFIX}{module}.lora_magnitude_vector", update.magnitude, magnitude))
    clean = ".".join(segment for segment in module.split(".") if segment != "base_layer")
    alpha = lora.scale * lora.rank
    if module.endswith(_WRAPPED) and own is None:  # configured with its attention, and applied twice (`peft_read`)
        clean, alpha = module.removesuffix(_WRAPPED), alpha / 2
    state.settings[clean] = (lora.rank, alpha)
    folded = len(lora.A.tensors) + len(lora.B.tensors) > 2
    state.ledger.keep(site, update, "folded" if folded else "exact", f"{_PREFIX}{module}")


def _tied_head(site: Site, update: LoRA | DoRA, adapter: Adapter, base: Checkpoint | None, state: _PeftWriter) -> None:
    """A tied head that follows the embedding (mlx-lm) needs the same LoRA of its own here."""
    if base is None or base.is_pipeline or not adapter.keeps_ties or not isinstance(update, LoRA):
        return
    main = base.main
    found = whole_place(places_of(site, base, update.tensors))
    if main.tied and main.head and found and found[0] == main.embedding and Site(main.head) not in adapter.updates:
        module = main.head.removesuffix(".weight")
        for tensor in _factors(f"{_PREFIX}{module}", update, update.shape, embedding=False):
            state.add(tensor)
        state.settings[module] = (update.rank, update.scale * update.rank)


def _leaf(site: Site) -> str:
    return site.path.rpartition(".")[2]


def _module(site: Site, lora: LoRA, base: Checkpoint | None, own: PeftConfig | None) -> tuple[str, tuple[int, ...]]:
    """``(module path, shape of its weight)``: the path as written before, or the adapter's, or (flattened names) the base's."""
    stored = lora.A.tensors[0]
    out, inputs = lora.shape
    shape = (out, inputs) if len(stored.shape) < 3 or lora.A.view is not None else (out, *stored.shape[1:])
    path = site.path.removesuffix(".weight")
    if base is not None and (found := whole_place(places_of(site, base, lora.tensors))):
        shape = found[1] if len(found[1]) > 2 else (out, inputs)
        path = found[0].removesuffix(".weight") if site.flat else path
    if own is not None or f"{_WRAPPED}." in stored.name:  # keeps the nesting of wrapped modules
        path = re.split(r"(?:\.weight)?\.lora_(?:embedding_)?[AB]\b", stored.name.removeprefix(_PREFIX))[0]
    return path, shape


def _is_embedding(module: str, lora: LoRA, base: Checkpoint | None) -> bool:
    if any(".lora_embedding_" in tensor.name for tensor in lora.tensors):
        return True
    if any(re.search(r"\.lora_[AB]\b", tensor.name) for tensor in lora.tensors):
        return False
    if base is not None and not base.is_pipeline and base.main.embedding == f"{module}.weight":
        return True
    return module.rpartition(".")[2] in EMBEDDINGS


def _factors(key: str, lora: LoRA, shape: tuple[int, ...], *, embedding: bool) -> list[NewTensor]:
    rank = lora.rank
    if embedding:  # delta = (B A)^T
        return [
            made(f"{key}.lora_embedding_A", lora.B, (rank, lora.shape[0]), lambda t: t.T),
            made(f"{key}.lora_embedding_B", lora.A, (lora.shape[1], rank), lambda t: t.T),
        ]
    ones = (1,) * (len(shape) - 2)
    return [
        made(f"{key}.lora_A.weight", lora.A, (rank, *shape[1:])),
        made(f"{key}.lora_B.weight", lora.B, (shape[0], rank, *ones)),
    ]


def _other(
    site: Site, update: Update, adapter: Adapter, base: Checkpoint | None, own: PeftConfig | None, state: _PeftWriter
) -> None:
    """Everything that is not one module's LoRA."""
    if isinstance(update, Stacked):
        _stacked(site, update, base, state)
    elif isinstance(update, Offset):
        _bias(site, update, adapter, state)
    elif isinstance(update, Replacement):
        _whole(site, update, adapter, own, state)
    elif isinstance(update, TokenRows):
        module = site.path.removesuffix(".weight")
        wrapper = "" if own is not None and own.kind == "TRAINABLE_TOKENS" else ".token_adapter"
        state.add(made(f"{_PREFIX}{module}{wrapper}.trainable_tokens_delta", update.value, update.value.shape))
        state.rows[module] = list(update.indices)
        state.ledger.keep(site, update, "exact", "trainable tokens")
    else:
        state.ledger.drop(site, update, f"this format has no {update.kind}")


def _whole(site: Site, update: Replacement, adapter: Adapter, own: PeftConfig | None, state: _PeftWriter) -> None:
    """A parameter trained in full: its module is saved, or (a bias beside the base's weight) all biases are."""
    name, (module, _, leaf) = update.stored.name, site.path.rpartition(".")
    beside = adapter.updates.get(replace(site, path=f"{module}.weight"), ())
    key, detail = _PREFIX + site.path, "modules_to_save"
    if own is not None:
        key = name if name.startswith("base_model.") and ".modules_to_save." not in name else key
    elif leaf == "bias" and not any(isinstance(one, Replacement) for one in beside):
        key, detail = f"{_PREFIX}{module}{'.base_layer' if module in state.settings else ''}.bias", "bias"
        state.bias = True
    elif leaf == "weight" and module in state.settings:  # a vocabulary that was resized, beside its LoRA
        key, detail = f"{_PREFIX}{module}.base_layer.weight", "base_layer"
    else:
        state.saved.add(module)
    state.add(NewTensor(key, update.stored.dtype, update.stored.shape, update.stored.read))
    state.ledger.keep(site, update, "exact", detail)


def _bias(site: Site, update: Offset, adapter: Adapter, state: _PeftWriter) -> None:
    """``lora_bias``: an addition to the bias, scaled like the LoRA of its module."""
    weight = Site(site.path.removesuffix("bias") + "weight", site.component, site.flat)
    held = [one for one in state.ledger.held.get(weight, ()) if isinstance(one, LoRA)]
    if not site.path.endswith(".bias") or len(held) != 1:
        state.ledger.drop(site, update, "this format adds to a bias only where its module has a LoRA")
        return
    lora = held[0]
    entry = next(entry for entry in state.ledger.entries if entry.site == str(weight) and entry.outcome != "dropped")
    times = 1.0 if update.scale == lora.scale else update.scale / lora.scale
    state.add(made(f"{entry.detail}.lora_B.bias", update.value, update.value.shape, times=times))
    state.biased = True
    state.ledger.keep(site, update, "exact" if times == 1.0 else "folded", "lora_bias")


def _stacked(site: Site, update: Stacked, base: Checkpoint | None, state: _PeftWriter) -> None:
    """Experts: one LoRA each where they come from MLX's stacks, a LoRA on the 3-D parameter otherwise."""
    if SWITCH not in site.path:
        if not all(isinstance(one, LoRA) and one.rank == update.experts[0].rank for one in update.experts):
            state.ledger.drop(site, update, "its experts have several ranks")
            return
        state.parameters.append((site, update))
        return
    pieces = list(taken_apart(site.path, update, fused_of(site, base)))
    if not pieces:
        state.ledger.drop(site, update, "the names of its experts are not known")
        return
    for path, lora in pieces:
        module = path.removesuffix(".weight")
        for tensor in _factors(f"{_PREFIX}{module}", lora, lora.shape, embedding=False):
            state.add(tensor)
        state.settings[module] = (lora.rank, lora.scale * lora.rank)
    state.ledger.keep(site, update, "exact", f"{len(pieces)} modules")


def _parameters(state: _PeftWriter) -> None:
    """LoRAs on 3-D parameters (``target_parameters``): several on one module nest, the first registered innermost."""
    by_module: dict[str, list[tuple[Site, Stacked]]] = {}
    for site, update in state.parameters:
        by_module.setdefault(site.path.rpartition(".")[0], []).append((site, update))
    for module, found in by_module.items():
        order = innermost_first([_leaf(site) for site, _ in found], found[0][1].tensors[0].path)
        found.sort(key=lambda pair: order.index(_leaf(pair[0])))
        for depth, (site, update) in enumerate(reversed(found)):
            key = f"{_PREFIX}{module}{'.base_layer' * depth}"
            for tensor in _stack_factors(key, update):
                state.add(tensor)
            first = update.experts[0]
            assert isinstance(first, LoRA)
            state.settings[site.path] = (first.rank, first.scale * first.rank)
            state.ledger.keep(site, update, "exact", key)


def _stack_factors(key: str, update: Stacked) -> list[NewTensor]:
    """``A`` (E*rank, cols), ``B`` (rows, rank*E), expert e being ``B.reshape(rows, rank, E)[:, :, e]``."""
    loras = [one for one in update.experts if isinstance(one, LoRA)]
    if update.if_transposed and len(loras[0].A.tensors) == 1:  # PEFT's own tensors, in today's order
        a, b = loras[0].A.tensors[0], loras[0].B.tensors[0]
        return [copied(f"{key}.lora_A.weight", a), copied(f"{key}.lora_B.weight", b)]
    count, rank = len(loras), loras[0].rank
    out, inputs = loras[0].shape

    def load_a() -> torch.Tensor:
        import torch

        return torch.cat([lora.A.load(torch.float64) for lora in loras])

    def load_b() -> torch.Tensor:
        import torch

        return torch.stack([lora.B.load(torch.float64) for lora in loras], dim=-1).reshape(out, rank * count)

    def dtype(factors: list[Factor]) -> Any:
        return factor_dtype(factors, folded=False)

    return [
        NewTensor(f"{key}.lora_A.weight", dtype([lora.A for lora in loras]), (count * rank, inputs), load_a),
        NewTensor(f"{key}.lora_B.weight", dtype([lora.B for lora in loras]), (out, rank * count), load_b),
    ]


def _config(adapter: Adapter, own: PeftConfig | None, state: _PeftWriter, *, dora: bool) -> dict[str, Any]:
    stacked = [site.path for site, _ in state.parameters]
    if own is not None and _still_holds(own, state):
        kept = dict(adapter.config)
        if stacked and own.experts_old_order:
            kept["peft_version"] = EXPERTS_ORDER_SINCE
        return kept
    rank = commonest(rank for rank, _ in state.settings.values()) or 8
    alpha = commonest(alpha for _, alpha in state.settings.values()) or float(rank)
    ranks = {_anchored(module): r for module, (r, _) in state.settings.items() if r != rank}
    alphas = {_anchored(module): _number(a) for module, (_, a) in state.settings.items() if a != alpha}
    config: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": adapter.base_name or None,
        "bias": "all" if state.bias else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "revision": None,
        "task_type": None,
        **_survivors(adapter, own),
        "alpha_pattern": dict(sorted(alphas.items())),
        "lora_alpha": _number(alpha),
        "lora_bias": state.biased,
        "r": rank,
        "rank_pattern": dict(sorted(ranks.items())),
        "target_modules": sorted(module for module in state.settings if module not in stacked)
        or ([] if state.settings else _NO_TARGET),
        "use_dora": dora,
        "use_rslora": False,
    }
    if own is None:
        config["modules_to_save"] = sorted(state.saved) or None
        if state.rows:
            config["trainable_token_indices"] = state.rows
    if stacked:
        config |= {"peft_version": EXPERTS_ORDER_SINCE, "target_parameters": sorted(stacked)}
    return config


def _survivors(adapter: Adapter, own: PeftConfig | None) -> dict[str, Any]:
    """What a PEFT configuration still says: all of it, or (another format carried it) what no tensor is concerned with."""
    if own is not None:
        return dict(adapter.config)
    return {key: adapter.config[key] for key in _SURVIVING if "peft_type" in adapter.config and key in adapter.config}


def _still_holds(own: PeftConfig, state: _PeftWriter) -> bool:
    """Whether the configuration the adapter came with says what was written."""
    for module, (rank, alpha) in state.settings.items():
        wanted, scale = alpha / rank, own.scale_of(module, rank)
        if own.rank_of(module) != rank or abs(scale - wanted) > 1e-12 * abs(wanted):
            return False
    return True


def _anchored(module: str) -> str:
    r"""A pattern that only this path matches: PEFT matches ``(.*\\.)?(key)$``, an anchor inside pins the start."""
    return f"^{re.escape(module)}"


def _number(value: float) -> int | float:
    """Whole numbers without a point, as people write them."""
    return int(value) if value == int(value) else value
