# SPDX-License-Identifier: Apache-2.0
"""Make adapter_config.json.

Ranks and scales become ``r``, alpha, ``rank_pattern`` and ``alpha_pattern`` with anchored full paths as keys. If the
adapter has a PEFT configuration that still gives every module its rank and scale, it stays as it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from surgery_formats.adapters.alphas import written_alpha
from surgery_formats.adapters.contents import contents_of
from surgery_formats.adapters.experts import SWITCH
from surgery_formats.adapters.peft.carried import TASK_TYPES, is_peft
from surgery_formats.adapters.peft.dialects.dialect import ExpertDialect
from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.packing import marked
from surgery_formats.adapters.writing import commonest
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.errors import FitError
from surgery_formats.updates import Update

__all__ = ["adapter_config", "inherited", "ranks_and_alphas", "setting_and_pattern", "targets"]

EXPERTS_ORDER_SINCE = "0.19.0"
"""The version of PEFT that gave expert factors today's order of axes (huggingface/peft#3165)."""
_NO_TARGET = (
    "dummy-target-modules"  # PEFT refuses an adapter without a target, but for this name (peft.utils.constants)
)
_ALWAYS = ("auto_mapping", "base_model_name_or_path", "modules_to_save", "revision", "task_type")
"""Fields that PEFT writes even where they are null."""
_SURVIVING = ("auto_mapping", "inference_mode", "lora_dropout", "revision", "task_type")
"""Fields that have nothing to do with tensors, and so survive another format."""
_INHERITED = (
    *_SURVIVING,
    "base_model_name_or_path",
    "ensure_weight_tying",
    "fan_in_fan_out",
)
"""Fields that have nothing to do with ranks, scales or targets, and so survive a combination."""
_BIAS = ("none", "lora_only", "all")  # each holds what the one before holds


def adapter_config(file: PeftFile, dialect: ExpertDialect | None = None) -> bytes:
    """The configuration of what was written, as a file; of experts in a dialect, with the fields that tell it."""
    adapter = file.adapter
    if file.kept():
        config = dict(adapter.config)
        if file.experts and file.own is not None and file.own.experts_old_order:
            config["peft_version"] = EXPERTS_ORDER_SINCE
    else:
        config = {
            "auto_mapping": None,
            "base_model_name_or_path": adapter.base_name or None,
            "inference_mode": True,
            "peft_type": file.kind,
            "revision": None,
            "task_type": TASK_TYPES.get(adapter.task),
            **file.defaults,
            **({"bias": "all" if file.whole_biases else "none"} if file.has_biases else {}),
            **_survivors(file),
            **({} if file.own else {"modules_to_save": sorted(file.saved) or None}),
            **file.fields,
        }
        if file.experts:
            config |= {"peft_version": EXPERTS_ORDER_SINCE, "target_parameters": sorted(file.experts)}
    if file.experts:
        config = marked(config)
    if dialect is not None:
        said = dialect.fields(file)
        config = {key: value for key, value in {**config, **said}.items() if value is not None or key in _ALWAYS}
    # One line where scales were chosen anew: token ids would take a line each, and an extraction may list 65,536.
    indent = None if file.scaling is not None and file.rows else 2
    return (json.dumps(config, indent=indent, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _survivors(file: PeftFile) -> Mapping[str, Any]:
    """The fields of a PEFT configuration that still hold.

    These are all of them, or, if another format carried the configuration, those that concern no tensor.
    """
    config = file.adapter.config
    if file.own is not None:
        return config
    return {key: config[key] for key in _SURVIVING if is_peft(config) and key in config}


def ranks_and_alphas(file: PeftFile, alpha: str = "lora_alpha") -> dict[str, Any]:
    """The fields that give every module its rank and alpha; `alpha` is the name of one of them."""
    ranks = [rank for rank, _ in file.settings.values()]
    stated = file.scaling.rank if file.scaling is not None else None
    rank = stated if stated in ranks and stated is not None else commonest(ranks) or 8
    if file.scaling is not None:
        common = file.scaling.alpha_of(rank)
    else:
        common = commonest(value for _, value in file.settings.values()) or float(rank)
    return {
        alpha: written_alpha(common),
        "alpha_pattern": {_anchored(path): written_alpha(a) for path, (_, a) in file.settings.items() if a != common},
        "r": rank,
        "rank_pattern": {_anchored(path): r for path, (r, _) in file.settings.items() if r != rank},
    }


def setting_and_pattern(values: Mapping[str, Any], *, anchored: bool = True) -> tuple[Any, dict[str, Any]]:
    """The commonest of `values`, which are by module path, and the pattern that gives the other modules theirs.

    Args:
        values: At least one.
        anchored: Whether PEFT matches its keys as `_anchored` has it; else as ends of paths behind a dot, or as whole paths.
    """
    setting = commonest(values.values())
    rest = {path: value for path, value in values.items() if value != setting}
    return setting, {_anchored(path): value for path, value in rest.items()} if anchored else rest


def targets(file: PeftFile) -> list[str] | str:
    """Value of ``target_modules``: modules with factors, by their full paths."""
    modules = sorted((file.settings.keys() | file.targets) - set(file.experts))
    return modules or ([] if file.settings else _NO_TARGET)


def inherited(adapters: Sequence[Adapter], updates: Mapping[Site, tuple[Update, ...]]) -> dict[str, Any]:
    """A configuration for an adapter made from several PEFT adapters; it names every module by its full path.

    It holds where all modules have one rank and the scale 1; else the writer changes what does not.

    Raises:
        FitError: none of the updates is low-rank.
    """
    configs = [adapter.config for adapter in adapters]
    pairs = [(site, contents_of(update)) for site, chain in updates.items() for update in chain]
    low = {site for site, held in pairs if held.lora}
    stacks = {site for site, held in pairs if held.stack}
    targeted = [f".{name}" for config in configs for name in config.get("target_parameters") or () if "." in name]
    parameters = {site for site in low if f".{site.path}".endswith(tuple(targeted))}
    low -= parameters
    if not low and not stacks and not parameters:
        raise FitError("none of the adapters holds a LoRA", file=adapters[0].path)
    rank = commonest(held.update.rank for _, held in pairs if held.update.rank is not None) or 8
    replaced = [f".{site.path}" for site, held in pairs if held.whole]
    listed = {name for config in configs for name in config.get("modules_to_save") or ()}
    biases = max(map(_bias_of, configs), key=_BIAS.index)
    rows = {site.path.removesuffix(".weight"): list(held.rows.indices) for site, held in pairs if held.rows}
    fields: dict[str, Any] = {
        **{key: value for key in _INHERITED if (value := _first(configs, key)) is not None},
        "alpha_pattern": {},
        "bias": biases if replaced else "none",
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_bias": any(held.offset for _, held in pairs),
        "modules_to_save": sorted(name for name in listed if any(f".{name}." in path for path in replaced)) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": sorted(site.path.removesuffix(".weight") for site in low),
        "trainable_token_indices": rows or None,
        "use_dora": any(held.dora for _, held in pairs),
        "use_rslora": False,
    }
    if stacks or parameters:
        named = sorted(site.path for site in stacks | parameters if SWITCH not in site.path)
        fields |= {"peft_version": EXPERTS_ORDER_SINCE, "target_parameters": named or None}
    return fields


def _bias_of(config: Mapping[str, Any]) -> str:
    """The field ``bias`` as LoRA has it: OFT and BOFT call their own modules' biases ``oft_only`` and ``boft_only``."""
    bias = str(config.get("bias", "none"))
    return "lora_only" if bias.endswith("_only") else bias


def _first(configs: Sequence[Mapping[str, Any]], key: str) -> Any:
    return next((config[key] for config in configs if config.get(key) is not None), None)


def _anchored(path: str) -> str:
    r"""A pattern that only this path matches: PEFT matches ``(.*\\.)?(key)$``, an anchor inside pins the start."""
    return f"^{re.escape(path)}"
