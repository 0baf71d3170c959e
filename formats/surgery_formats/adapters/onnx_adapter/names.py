# SPDX-License-Identifier: Apache-2.0
"""Names that exporters give the inputs of a graph through which the factors of a LoRA come in.

====================  ===========================================================================================
ours, Olive           ``model.layers.0.self_attn.q_proj.lora_A.weight``
genai builder         ``model.layers.0.attn.q_proj.lora_A.MatMul.weight``; Olive takes ``.MatMul`` out of it
torch.onnx of PEFT    ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight``
TensorRT Edge-LLM     ``model.layers.0.self_attn.q_proj.lora_A.weight``; ``model.`` is put before every name
====================  ===========================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, NamedTuple

from surgery_formats.errors import FitError

if TYPE_CHECKING:
    from surgery_formats.canonical.adapter import Adapter

__all__ = [
    "HEADS",
    "FactorName",
    "canonical_module",
    "check_apart",
    "factor_name",
    "factor_pairs",
    "is_of_head",
    "is_parameter",
    "match_modules",
]

HEADS = frozenset(("classifier", "score", "pre_classifier", "qa_outputs"))
"""Modules of heads, which an adapter may give a graph in full."""

_NAME = re.compile(r"(?P<module>.+?)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight", re.DOTALL)
_PREFIXES = ("base_model.model.", "_model.")
_CODES = "quant"  # ``lora_A.quant.weight``, ``.scale``, ``.zero_point``: factors as codes


class FactorName(NamedTuple):
    """What the name of an input says.

    Attributes:
        module: The module, without what exporters put in front.
        side: ``A`` or ``B``.
        infix: What stands between the side and ``weight``: ``MatMul``, the name of an adapter, or nothing.
    """

    module: str
    side: str
    infix: str


def is_parameter(name: str) -> bool:
    """Whether an input is called as a parameter of a model, and neither a factor nor a part of an inserted module."""
    *module, leaf = name.split(".")
    foreign = any(part.startswith(("lora_", "adapters", "invertible_adapters", _CODES)) for part in module)
    return bool(module) and leaf in ("weight", "bias") and not foreign


def is_of_head(name: str) -> bool:
    """Whether it is a parameter of a head."""
    return bool(HEADS & set(name.split(".")))


def factor_name(name: str) -> FactorName | None:
    """The parts of an input's name; None if it is no factor's."""
    match = _NAME.fullmatch(name)
    if match is None or match["adapter"] == _CODES:
        return None
    module = match["module"]
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    return FactorName(module, match["side"], match["adapter"] or "")


def factor_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names of both factors of each slot, in the order of the A's."""
    known = dict.fromkeys(names)
    pairs = []
    for name in known:
        found = factor_name(name)
        if found is not None and found.side == "A":
            head, _, tail = name.rpartition(".lora_A")
            if (partner := f"{head}.lora_B{tail}") in known:
                pairs.append((name, partner))
    return pairs


def canonical_module(module: str) -> str:
    """A module as transformers' code mostly calls it: the genai builder says ``attn`` for all attention."""
    return ".".join("self_attn" if part == "attn" else part for part in module.split("."))


def match_modules(slots: Collection[str], modules: Collection[str]) -> dict[str, str]:
    """Which slot each module of an adapter goes into, where that is certain; by module.

    Names are equal; or equal but for what stands in front of them; or they have the same numbers and the same last part,
    and no other of either does.
    """
    found = {module: module for module in modules if module in slots}
    for key in (_without_front, canonical_module, _numbers_and_end):
        left = [module for module in modules if module not in found]
        free = [slot for slot in slots if slot not in found.values()]
        by_key: dict[object, list[str]] = {}
        for slot in free:
            by_key.setdefault(key(slot), []).append(slot)
        keys = [key(module) for module in left]
        for module, own in zip(left, keys, strict=True):
            if keys.count(own) == 1 and len(by_key.get(own, ())) == 1:
                found[module] = by_key[own][0]
    return found


def _without_front(module: str) -> str:
    return module.removeprefix("model.")


def _numbers_and_end(module: str) -> tuple[tuple[str, ...], str]:
    parts = module.split(".")
    return tuple(part for part in parts if part.isdigit()), parts[-1]


def check_apart(adapter: Adapter) -> None:
    """Refuse factors of packed slots, which no weight has by itself: ``q_proj+k_proj+v_proj`` is no module of a model.

    Raises:
        FitError: there are some.
    """
    for site in adapter.updates:
        if adapter.shares_factors(site):
            raise FitError(
                "is of a packed slot: several weights share the factors",
                file=adapter.path,
                tensor=site.path,
                hint="convert the adapter that it was made from",
            )
