# SPDX-License-Identifier: Apache-2.0
"""Adapters without a file, as algebra and extraction make them: writers must accept them like any other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from itertools import count
from typing import TypeVar, cast

from surgery_formats.adapters.writing import factor_dtype
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.dtypes import DType
from surgery_formats.tensors.computed import computed
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates import Factor, Update

__all__ = ["adapter_of", "in_memory"]

T = TypeVar("T")


def adapter_of(updates: Mapping[Site, tuple[Update, ...]], like: Adapter) -> Adapter:
    """An adapter that does `updates`, of no format and with nothing of a configuration."""
    tensors: dict[Tensor, None] = {}
    for chain in updates.values():
        for update in chain:
            tensors |= dict.fromkeys(update.tensors)
    return replace(
        like,
        format="made in memory",
        kind="",
        updates=updates,
        tensors=tuple(tensors),
        ignored=(),
        prompt=None,
        config={},
        metadata={},
        stated_issues=(),
        examine=tuple,
        spelling={},
    )


def in_memory(adapter: Adapter, *, keep_terms: bool = False) -> Adapter:
    """`adapter` with every factor replaced by the same values under a name that means nothing.

    Args:
        adapter: Any.
        keep_terms: Whether factors that were computed from others stay so.
    """
    names = (f"tensor {number}" for number in count())
    known: dict[object, object] = {}
    return adapter_of(
        {s: tuple(_rebuilt(update, names, known, keep_terms) for update in c) for s, c in adapter.updates.items()},
        adapter,
    )


def _rebuilt(value: T, names: Iterator[str], known: dict[object, object], keep_terms: bool) -> T:
    """`value` with its factors rebuilt; the same factor twice becomes the same new one."""
    new: object = value
    if isinstance(value, Factor):
        if value in known:
            return cast(T, known[value])
        known[value] = new = _factor(value, names, known, keep_terms)
    elif isinstance(value, tuple):
        new = tuple(_rebuilt(item, names, known, keep_terms) for item in value)
    elif hasattr(value, "prepare"):
        update = cast(Update, value)
        parts = {field.name: getattr(update, field.name) for field in fields(update) if field.init}
        parts |= dict.fromkeys(parts.keys() & {"noted"}, ())  # where a scale was read is a matter of a file
        changed = {name: _rebuilt(part, names, known, keep_terms) for name, part in parts.items()}
        new = replace(update, **changed)
    return cast(T, new)


def _factor(factor: Factor, names: Iterator[str], known: dict[object, object], keep_terms: bool) -> Factor:
    dtype = factor_dtype([factor], folded=bool(factor.terms) or len(factor.tensors) > 1)
    shape = factor.tensors[0].shape if _is_whole(factor) else factor.shape
    tensor = computed(next(names), shape, factor.tensors, lambda: factor.load(DType.F64), dtype)
    terms = _rebuilt(factor.terms, names, known, keep_terms) if keep_terms else ()
    if terms:
        return Factor(tuple(t for term in terms for t in term.tensors), factor.shape, factor.view, terms)
    return Factor((tensor,), factor.shape)


def _is_whole(factor: Factor) -> bool:
    """Whether it is one stored tensor, whose own sizes are worth keeping: those of a replaced parameter."""
    return len(factor.tensors) == 1 and factor.view is None
