# SPDX-License-Identifier: Apache-2.0
"""The switches of a bottleneck in adapter_config.json (adapters 1.3.0, ``configuration/adapter_config.py``, ``BnConfig``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.models.families.recipe import Activation, BottleneckForm
from surgery_formats.text import show

__all__ = ["PHM", "BottleneckSettings", "bottleneck_settings", "library_has_places"]

Place = Literal["mh_adapter", "output_adapter", "inv_adapter"]

_ACTIVATIONS: Mapping[str, Activation] = {
    "relu": "relu",
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "leakyrelu": "leaky_relu",
    "leaky_relu": "leaky_relu",
    "quick_gelu": "quick_gelu",
    "linear": "linear",
}
_FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert", "gpt2", "llama", "mistral")
"""Families into whose layers the library puts modules of its own; into others it hangs hooks, at other places."""


@dataclass(frozen=True, slots=True)
class PHM:
    """The tensors of a PHM layer.

    Attributes:
        own: Those that a layer has.
        shared: Those that all layers share; a ``W`` is apart for the two projections.
    """

    own: tuple[str, ...]
    shared: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BottleneckSettings:
    """The switches that act at one place.

    Attributes:
        form: How the network computes.
        scale: Factor on its result, unless it is learned.
        learned_scale: Whether the factor, or one for each value, is a tensor.
        phm: The tensors of its projections, if they are PHM layers.
    """

    form: BottleneckForm
    scale: float
    learned_scale: bool
    phm: PHM | None


def library_has_places(adapter: Adapter) -> None:
    """Refuse an adapter of a family for which the places of modules are not known.

    Raises:
        FitError: such a family.
    """
    family = adapter.config.get("model_type")
    if family not in _FAMILIES:
        raise FitError(
            f"a graph takes inserted modules of {', '.join(_FAMILIES)}, not of '{show(family, 40)}'", file=adapter.path
        )


def bottleneck_settings(adapter: Adapter, layer: int | None, place: Place) -> BottleneckSettings:
    """The switches of the one method that has a module at a place, as the library finds it.

    Args:
        adapter: The adapter.
        layer: Number of the layer; None for the embedding.
        place: The switch that turns the place on.

    Raises:
        MalformedError: no such method, several, or a switch of a wrong type.
        FitError: switches that the library itself cannot run.
    """
    own = adapter.config.get("config")
    assert isinstance(own, Mapping)  # as it was read
    methods = own.get("configs", []) if own.get("architecture") == "union" else [own]
    found = [method for method in methods if method.get("architecture") is None and _is_on(method, layer, place)]
    if len(found) != 1:
        where = "behind the embeddings" if layer is None else f"in layer {layer}"
        what = "no method" if not found else "several methods"
        raise MalformedError(f"its configuration has {what} with '{place}' {where}", file=adapter.path)
    return _settings(found[0], adapter, place)


def _is_on(method: Mapping[str, Any], layer: int | None, place: Place) -> bool:
    if place == "inv_adapter":
        return bool(method.get("inv_adapter") or method.get("invertible_adapter"))
    out = method.get("leave_out") or []
    return method.get(place) is True and not (isinstance(out, list) and layer in out)


def _settings(method: Mapping[str, Any], adapter: Adapter, place: Place) -> BottleneckSettings:
    def switch(key: str, default: bool) -> bool:
        value = method.get(key, default)
        if not isinstance(value, bool):
            raise MalformedError(f"'{key}' is {show(repr(value), 40)}", file=adapter.path)
        return value

    name = str(method.get("non_linearity")).lower()
    if name not in _ACTIVATIONS:
        raise FitError(
            f"'non_linearity' is '{show(name, 40)}'; a graph has {', '.join(sorted(_ACTIVATIONS))}", file=adapter.path
        )
    if place == "inv_adapter":
        _check_coupling(method, adapter)
        return BottleneckSettings(BottleneckForm(_ACTIVATIONS[name]), 1.0, False, None)
    parallel = switch("is_parallel", False)
    sums = switch("original_ln_before", False) and not parallel
    form = BottleneckForm(
        activation=_ACTIVATIONS[name],
        parallel=parallel,
        sums_before=sums,
        residual="body" if parallel else _residual(method, adapter, sums=sums),
        norm_before=switch("ln_before", False),
        norm_after=switch("ln_after", False),
        residual_before_norm=switch("adapter_residual_before_ln", False) and not parallel,
        gated=switch("use_gating", False),
        finishes=switch("original_ln_after", True),
    )
    scale = method.get("scaling", 1.0)
    learned = scale in ("learned", "channel")
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
    if not learned and not is_number:
        raise MalformedError(f"'scaling' is {show(repr(scale), 40)}", file=adapter.path)
    phm = _phm(method) if switch("phm_layer", False) else None
    return BottleneckSettings(form, 1.0 if learned else float(scale), learned, phm)


def _residual(method: Mapping[str, Any], adapter: Adapter, *, sums: bool) -> Literal["body", "sum", "read"]:
    value = method.get("residual_before_ln", True)
    if value is True:
        return "body"
    if value is False:
        return "read"
    if value != "post_add":
        raise MalformedError(f"'residual_before_ln' is {show(repr(value), 40)}", file=adapter.path)
    if not sums or adapter.config.get("model_type") in ("gpt2", "llama", "mistral"):
        raise FitError(
            "'residual_before_ln' is 'post_add', for which the library has no residual where no norm follows the sum: "
            "its own forward fails",
            file=adapter.path,
        )
    return "sum"


def _check_coupling(method: Mapping[str, Any], adapter: Adapter) -> None:
    old = method.get("invertible_adapter")
    kind = method.get("inv_adapter") or (old.get("block_type") if isinstance(old, Mapping) else None)
    if kind == "glow":
        raise FitError(
            "an invertible adapter of the kind GLOW, which the library's own forward cannot run: it splits positions instead "
            "of values",
            file=adapter.path,
        )
    if kind != "nice":
        raise MalformedError(f"'inv_adapter' is {show(repr(kind), 40)}", file=adapter.path)


def _phm(method: Mapping[str, Any]) -> PHM:
    inner = ("W_left", "W_right") if method.get("factorized_phm_W", True) else ("W",)
    rule = ("phm_rule_left", "phm_rule_right") if method.get("factorized_phm_rule", False) else ("phm_rule",)
    shared_inner, shared_rule = method.get("shared_W_phm", False), method.get("shared_phm_rule", True)
    own = (*(() if shared_inner else inner), *(() if shared_rule else rule))
    shared = (*(inner if shared_inner else ()), *(rule if shared_rule else ()))
    return PHM((*own, *(("b",) if method.get("phm_bias", True) else ())), shared)
