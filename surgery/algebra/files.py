# SPDX-License-Identifier: Apache-2.0
"""A combination as an `Adapter` for a format's writer: its updates, and whatever else of its sources' files still holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery.algebra.combined_update import CombinedUpdate
from surgery_formats.adapters.peft.parameters import EXPERTS_ORDER_SINCE
from surgery_formats.canonical.adapter import Adapter, WeightedAdapter
from surgery_formats.errors import FitError
from surgery_formats.updates import DoRA, LoRA, Offset, Replacement, Stacked, TokenRows

__all__ = ["as_adapter", "side_files"]

# Fields of PEFT's configuration that say nothing about ranks, scales or targets, and so outlive a combination.
_SURVIVING = (
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "fan_in_fan_out", "inference_mode", "lora_dropout", "revision",
    "task_type",
)  # fmt: skip
_BIAS = ("none", "lora_only", "all")  # each holds what the one before holds


def as_adapter(given: Sequence[WeightedAdapter], parts: Sequence[CombinedUpdate], target: str) -> Adapter:
    """The combination of `given`, which `parts` are, for the writer of the format `target`.

    Raises:
        FitError: PEFT adapters without a LoRA among them, which no one configuration describes.
    """
    first = given[0].adapter
    updates = {part.site: part.updates for part in parts}
    tensors = {tensor.name: tensor for chain in updates.values() for update in chain for tensor in update.tensors}
    same = all(one.adapter.format == target for one in given)
    config: dict[str, Any] = {}
    if same and target == "peft":
        config = _peft_config(given, parts)
    elif same:
        config = dict(first.config)
    return Adapter(
        path=first.path,
        # A format's own writer keeps what its configuration said; it is only asked to where all sources are of it.
        format=target if same and target != "kohya" else "combined",
        kind=first.kind,
        updates=updates,
        tensors=tuple(tensors.values()),
        new_modules=frozenset().union(*(one.adapter.new_modules for one in given)),
        base_name=next((one.adapter.base_name for one in given if one.adapter.base_name), ""),
        base_id=next((one.adapter.base_id for one in given if one.adapter.base_id), ""),
        config=config,
        metadata=_shared([one.adapter.metadata for one in given]),
        keeps_ties=first.keeps_ties,
    )


def _shared(metadata: Sequence[Any]) -> dict[str, str]:
    """Strings on which all agree: what one training wrote is not true of two."""
    return {key: value for key, value in metadata[0].items() if all(other.get(key) == value for other in metadata)}


def side_files(given: Sequence[WeightedAdapter]) -> dict[str, Path]:
    """Tokenizer files, the first adapter's where several have one of a name."""
    return {path.name: path for one in reversed(given) for path in one.adapter.side_files}


def _peft_config(given: Sequence[WeightedAdapter], parts: Sequence[CombinedUpdate]) -> dict[str, Any]:
    """A configuration that names every module by its full path, so that PEFT builds these LoRAs and no others."""
    configs = [one.adapter.config for one in given]
    updates = [(part.site, update) for part in parts for update in part.updates]
    loras = {site: update for site, update in updates if isinstance(update, LoRA | DoRA)}
    stacks = [site for site, update in updates if isinstance(update, Stacked)]
    if not loras and not stacks:
        raise FitError("none of the adapters holds a LoRA", file=given[0].adapter.path)
    ranks = Counter(_rank(update) for _, update in updates if isinstance(update, LoRA | DoRA | Stacked))
    rank = min(ranks, key=lambda one: (-ranks[one], one))
    replaced = [f".{site.path}" for site, update in updates if isinstance(update, Replacement)]
    listed = {name for config in configs for name in config.get("modules_to_save") or ()}
    saved = {name for name in listed if any(f".{name}." in path for path in replaced)}
    rows = {site.path.removesuffix(".weight"): list(u.indices) for site, u in updates if isinstance(u, TokenRows)}
    whole = any(isinstance(update, Replacement) for _, update in updates)
    made: dict[str, Any] = {
        **{key: value for key in _SURVIVING if (value := _first(configs, key)) is not None},
        "alpha_pattern": {},
        "bias": max((str(config.get("bias", "none")) for config in configs), key=_BIAS.index) if whole else "none",
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_bias": any(isinstance(update, Offset) for _, update in updates),
        "modules_to_save": sorted(saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": sorted(site.path.removesuffix(".weight") for site in loras),
        "trainable_token_indices": rows or None,
        "use_dora": any(isinstance(update, DoRA) for update in loras.values()),
        "use_rslora": False,
    }
    if stacks:
        made |= {"peft_version": EXPERTS_ORDER_SINCE, "target_parameters": sorted(site.path for site in stacks)}
    return made


def _rank(update: LoRA | DoRA | Stacked) -> int:
    one = update.experts[0] if isinstance(update, Stacked) else update
    assert isinstance(one, LoRA | DoRA)
    return one.rank


def _first(configs: Sequence[Any], key: str) -> Any:
    return next((config[key] for config in configs if config.get(key) is not None), None)
