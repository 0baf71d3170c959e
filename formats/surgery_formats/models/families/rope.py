# SPDX-License-Identifier: Apache-2.0
"""Rotary parameters of config.json, from transformers 4 and 5, in one form.

transformers 4 writes ``rope_theta`` beside ``rope_scaling`` (with ``type`` or ``rope_type``), transformers 5 a single
``rope_parameters``; some models have one per type of layer. The result has every default filled in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from surgery_formats.models.families.recipe import Rope
from surgery_formats.models.families.settings import ModelSettings, Sizes
from surgery_formats.text import show

__all__ = ["read_rope", "rope_of", "ropes_of"]

_NEEDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "factor", "original_max_position_embeddings"),
}
_MAY: Mapping[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "mscale", "mscale_all_dim"),
    "longrope": ("attention_factor",),
}
_LISTS = ("short_factor", "long_factor")
_KNOWN = frozenset(
    {"rope_type", "type", "rope_theta", "partial_rotary_factor", "beta_fast", "beta_slow", "truncate", "finetuned"}
    | {key for keys in (*_NEEDS.values(), *_MAY.values()) for key in keys}
)


def read_rope(
    settings: ModelSettings,
    sizes: Sizes,
    *,
    theta: float = 10000.0,
    partial: float | None = None,
    original: int | None = None,
    longrope_names: tuple[str, ...] = (),
    interleaved: bool = False,
    missing: Mapping[str, Any] = MappingProxyType({}),
) -> Rope:
    """Read the rotary positions of a model with the same ones in every layer.

    The family's defaults are `theta` of ``rope_theta`` and `partial` of ``partial_rotary_factor``, None if it rotates
    whole heads. `original` is its ``original_max_position_embeddings`` if it stores one beside the rotary parameters,
    `longrope_names` its former names for ``longrope``; `interleaved` is that of `Rope`;
    `missing` are its parameters if the file has none.

    Raises:
        FitError: parameters of an unknown kind, missing, or of a wrong type.
    """
    parameters = settings.mapping("rope_scaling") or settings.mapping("rope_parameters") or dict(missing)
    settings.mapping("rope_parameters")
    parameters.setdefault("rope_theta", settings.positive("rope_theta", default=theta))
    fraction = settings.raw("partial_rotary_factor")
    if fraction is not None:
        parameters.setdefault("partial_rotary_factor", settings.positive("partial_rotary_factor", default=1.0))
    if partial is not None:
        parameters.setdefault("partial_rotary_factor", partial)
    elif parameters.get("partial_rotary_factor", 1.0) not in (1, 1.0, None):
        raise settings.fault("partial_rotary_factor is set, but this family rotates whole heads")
    beside = settings.raw("original_max_position_embeddings")
    if beside is not None or original is not None:
        parameters["original_max_position_embeddings"] = settings.count(
            "original_max_position_embeddings", default=original or 1
        )
    if _kind(parameters) in longrope_names:
        parameters["rope_type"] = "longrope"
    rope = rope_of(settings, parameters, sizes)
    return replace(rope, interleaved=True) if interleaved else rope


def _kind(parameters: Mapping[str, Any]) -> Any:
    return parameters.get("rope_type") or parameters.get("type") or "default"


def rope_of(settings: ModelSettings, parameters: Mapping[str, Any], sizes: Sizes) -> Rope:
    """Fill in the defaults of one set of rotary parameters.

    Raises:
        FitError: as `read_rope`.
    """
    kind, head_dim, max_positions = _kind(parameters), sizes.head_dim, sizes.max_positions
    if not isinstance(kind, str) or kind not in _NEEDS:
        raise settings.fault(f"rope_type is '{show(kind, 40)}', supported are {', '.join(_NEEDS)}")
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise settings.fault("rope_parameters differ by layer type, which this family does not have")
    if unknown := sorted(key for key, value in parameters.items() if key not in _KNOWN and value is not None):
        raise settings.fault(f"the rotary parameter '{show(unknown[0], 40)}' is not supported")
    inner = ModelSettings({**parameters, "model_type": settings.raw("model_type")})
    dims = int(head_dim * inner.positive("partial_rotary_factor", default=1.0))
    if dims % 2 or not 0 < dims <= head_dim:
        raise settings.fault(f"{dims} of {head_dim} values per head would be rotated; the number must be even")
    values: dict[str, Any] = {"rope_type": kind, "rope_theta": inner.positive("rope_theta", default=10000.0)}
    if values["rope_theta"] <= 1:
        raise settings.fault("rope_theta must be above 1")
    if kind == "dynamic" and dims <= 2:
        raise settings.fault("rope_type 'dynamic' needs more than 2 rotated values per head")
    needs = _NEEDS[kind]
    if "original_max_position_embeddings" in needs:
        values["original_max_position_embeddings"] = inner.count(
            "original_max_position_embeddings", default=max_positions
        )
        if values["original_max_position_embeddings"] < 2:
            raise settings.fault("original_max_position_embeddings must be above 1")
    ratio = max_positions / values.get("original_max_position_embeddings", max_positions)
    for key in ("factor", "low_freq_factor", "high_freq_factor"):
        if key in needs:
            if inner.raw(key) is None and kind not in ("yarn", "longrope"):
                raise settings.fault(f"{key} is missing in the rotary parameters of type '{kind}'")
            values[key] = inner.positive(key, default=ratio)
    if kind == "llama3" and values["high_freq_factor"] == values["low_freq_factor"]:
        raise settings.fault("high_freq_factor must differ from low_freq_factor")
    for key in _LISTS:
        if key in needs:
            values[key] = _factors(settings, inner.raw(key), key, dims // 2)
    if kind == "yarn":
        values["beta_fast"] = inner.positive("beta_fast", default=32.0)
        values["beta_slow"] = inner.positive("beta_slow", default=1.0)
        values["truncate"] = inner.flag("truncate", default=True)
    for key in _MAY.get(kind, ()):
        if inner.raw(key) is not None:
            values[key] = inner.number(key, default=1.0)
    return Rope(dims, values, max_positions)


def ropes_of(settings: ModelSettings, sizes: Sizes, thetas: tuple[float, float]) -> tuple[Rope, Rope]:
    """Rotations of layers with and without a window, their bases `thetas` by default.

    In transformers 4, ``rope_scaling`` applies to the latter.

    Raises:
        FitError: as `read_rope`.
    """
    kinds = ("sliding_attention", "full_attention")
    nested = settings.mapping("rope_parameters") or {}
    if unknown := [key for key in nested if key not in kinds]:
        raise settings.fault(f"rope_parameters must be by layer type, but has '{show(unknown[0], 40)}'")
    ropes = []
    for kind, theta in zip(kinds, thetas, strict=True):
        values = nested.get(kind) or {}
        if not isinstance(values, Mapping):
            raise settings.fault(f"rope_parameters of {kind} must be an object")
        own = {"rope_theta": theta, **values}
        if kind == "full_attention":
            own |= settings.mapping("rope_scaling") or {}
        if own.get("partial_rotary_factor", 1.0) not in (1, None):
            raise settings.fault("partial_rotary_factor is set, but this family rotates whole heads")
        ropes.append(rope_of(settings, own, sizes))
    return ropes[0], ropes[1]


def _factors(settings: ModelSettings, value: Any, key: str, length: int) -> tuple[float, ...]:
    numbers = isinstance(value, list) and all(
        isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < 1e30 for x in value
    )
    if not numbers or len(value) != length:
        raise settings.fault(f"{key} must be a list of {length} numbers above 0")
    return tuple(float(x) for x in value)
