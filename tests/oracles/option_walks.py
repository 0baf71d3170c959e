# SPDX-License-Identifier: Apache-2.0
"""What is tried of a kind of PEFT: on which layers, with which options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ALL", "CONV1D", "CONVOLUTIONS", "EXPERTS", "LINEAR", "Fields", "Options", "Walk", "biased", "products"]

LINEAR, CONV1D = "square,wide,tall", "c_attn,c_fc,mlp.c_proj"
EXPERTS = "mlp.experts.gate_up_proj,mlp.experts.down_proj"
CONVOLUTIONS = ("conv1", "conv2", "point", "grouped", "conv3")
ALL = (LINEAR, *CONVOLUTIONS, "embed", "attention", "norm", CONV1D)
"""Modules by their names, in `Layers`, in GPT-2 (which stores a weight as (in, out)), and parameters of Mixtral's experts."""
Fields = Mapping[str, Any]
Options = Mapping[str, Fields]


@dataclass(frozen=True)
class Walk:
    """What is tried of one kind.

    Attributes:
        fields: Of every case.
        options: Fields of each case besides.
        layers: Where PEFT has the kind.
        only: Cases of one layer: ``{layer: options}``.
        refused: Why a case is refused: by its option, or by its layer.
        half: Whether PEFT knows no float64 here.
        untried: Fields that no case sets, and why.
    """

    fields: Fields = field(default_factory=dict)
    options: Options = field(default_factory=dict)
    layers: tuple[str, ...] = (LINEAR,)
    only: Mapping[str, Options] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    half: frozenset[str] = frozenset()
    untried: frozenset[str] = frozenset()


def biased(name: str) -> Options:
    return {f"bias {name}": {"bias": f"{name}_only"}, "bias all": {"bias": "all"}}


def products(**values: tuple[Any, ...]) -> Options:
    """Every combination."""
    cases: dict[str, dict[str, Any]] = {"": {}}
    for key, tried in values.items():
        cases = {f"{name} {value}".strip(): {**case, key: value} for name, case in cases.items() for value in tried}
    return cases
