# SPDX-License-Identifier: Apache-2.0
"""Every reader of adapters and every container: what is read is asked all that commands ask."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy

from surgery_formats.adapters.format import TakesAlpha
from surgery_formats.adapters.registry import formats, read_adapter
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.canonical.consumption import check_consumed
from surgery_formats.containers.registry import containers, open_weights
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.updates import Fit, Update, is_unsized
from surgery_formats.updates.weights import HeldWeight

from ..golden import seeds_of
from ..target import Case, Target

__all__ = ["read_all", "targets"]


def targets() -> list[Target]:
    """One for each."""
    formats_ = [Target(f"format:{n}", partial(_format, n), partial(_seeds, f"format:{n}")) for n in formats()]
    return [
        *formats_,
        *(Target(f"container:{n}", partial(_container, n), partial(_seeds, f"container:{n}")) for n in containers()),
    ]


def _seeds(name: str) -> Any:
    return seeds_of().get(name, ())


def _format(name: str, case: Case) -> str:
    choice = case.draw.random()
    if choice >= 0.9:
        return _model(case, choice)
    known = formats()[name]
    alpha = 2.0 if isinstance(known, TakesAlpha) and choice < 0.4 else None
    _use(read_adapter(case.path, alpha) if choice < 0.6 else known.read(case.path), case.draw)
    return "read"


def _container(name: str, case: Case) -> str:
    choice = case.draw.random()
    if choice >= 0.3:
        return _model(case, choice)
    for shards in containers()[name].open(case.path).values():
        read_all(shards.tensors.values())
    return "read"


def _model(case: Case, choice: float) -> str:
    """Whatever it is, as a base."""
    if choice < 0.4:
        for shards in open_weights(case.path).values():
            read_all(shards.tensors.values())
        return "read"
    for component in open_checkpoint(case.path).components.values():
        for weight in component.parameters.values():
            assert weight.shape
        component.names.resolve("model.layers.0.self_attn.q_proj.weight")
    return "read"


def read_all(tensors: Any) -> None:
    """Read what is small enough; each has the shape that was told."""
    for tensor in tensors:
        if tensor.numel <= 1 << 20:
            values = tensor.read()
            assert tuple(values.shape) == tensor.shape


def _use(adapter: Adapter, draw: random.Random) -> None:
    """What inspect, merge and convert ask of an adapter."""
    check_consumed(adapter)
    adapter.known_issues()
    assert adapter.parameters >= 0
    for site, chain in adapter.updates.items():
        assert str(site)
        for update in chain:
            _apply(update, draw)
    if adapter.prompt is not None:
        adapter.prompt.table.read()
    if draw.random() < 0.3:
        rendering = formats()[adapter.format].render(adapter, None)
        for tensor in rendering.tensors[:20]:
            assert tuple(tensor.load().shape) == tensor.shape


def _apply(update: Update, draw: random.Random) -> None:
    """An update applied to a weight of its sizes, if that is small."""
    rows, cols = (size or 12 for size in update.shape)
    assert update.kind
    update.low_rank()
    for factor in update.factors().values():
        if max(tensor.numel for tensor in factor.tensors) <= 1 << 16:
            assert tuple(factor.load(DType.F32).shape) == factor.shape
    if rows * cols > 1 << 16 or draw.random() < 0.5:
        return
    fitted = update.fitted(Fit((rows, cols), 1, (rows, cols))) if is_unsized(update) else update
    if fitted.shape != (rows, cols):  # which binding refuses
        return
    weight = numpy.ones((rows, cols))
    for first, part in fitted.parts():
        lines = range(part.shape[0]) if part.effect != "sets" else range(rows)
        block = slice(first, first + len(lines))
        part.prepare(HeldWeight(weight[block]))(weight[block].copy(), lines, range(cols))
