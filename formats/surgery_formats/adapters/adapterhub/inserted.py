# SPDX-License-Identifier: Apache-2.0
"""Bottlenecks, compacters and invertible adapters of AdapterHub's library as modules to insert (adapters 1.3.0).

``methods/modeling.py`` has the networks, ``methods/bottleneck.py`` where they stand. A compacter's matrices are sums of
Kronecker products (PHM, arXiv:2106.04647), made whole here, as the library does at every call. A scale is folded into the
second matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Literal

import numpy

from surgery_formats.adapters.adapterhub.bottleneck_config import (
    BottleneckSettings,
    bottleneck_settings,
    library_has_places,
)
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.inserted import InsertedModule
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.models.families.inserted import PlacedModule
from surgery_formats.models.families.recipe import Bottleneck, Coupling
from surgery_formats.updates import Factor, Unmerged

__all__ = ["inserted_modules"]

Parts = Mapping[str, Factor]

_PLACES: tuple[tuple[str, Literal["attention", "mlp"]], ...] = (
    (r"(?:.*\.)?(\d{1,6})\.(?:attention\.output|attention_adapters)", "attention"),
    (r"(?:.*\.)?(\d{1,6})\.(?:output|output_adapters)", "mlp"),
)
_SHARED, _BOTTLENECKS, _INVERTIBLE = "shared_parameters", "adapters", "invertible_adapters"


def inserted_modules(adapter: Adapter) -> tuple[InsertedModule, ...]:
    """The modules that an adapter inserts, in the order of the network; none for a LoRA.

    Raises:
        FitError: a module that no graph of ours can hold, or switches that the library itself cannot run.
        MalformedError: tensors and configuration contradict each other.
    """
    parts = {site: update for site, (update, *_) in adapter.updates.items() if isinstance(update, Unmerged)}
    by_container: dict[str, dict[Site, Unmerged]] = {}
    for site, update in parts.items():
        container = site.path.removesuffix(".weight").rpartition(".")[2]
        by_container.setdefault(container, {})[site] = update
    known = {_SHARED, _BOTTLENECKS, _INVERTIBLE}
    if not known & by_container.keys():
        return ()
    for container, updates in by_container.items():
        if container not in known:
            update = next(iter(updates.values()))
            raise FitError(
                f"{update.kind}: {update.why}; a graph takes the bottlenecks beside it alone",
                file=adapter.path,
                tensor=update.tensors[0].name,
                hint="`without=` leaves a part out",
            )
    library_has_places(adapter)
    shared_sites = frozenset(by_container.get(_SHARED, ()))
    shared = {name: factor for update in by_container.get(_SHARED, {}).values() for name, factor in update.held}
    couplings = [_coupling(adapter, site, update) for site, update in by_container.get(_INVERTIBLE, {}).items()]
    bottlenecks = [
        _bottleneck(adapter, *pair, shared, shared_sites) for pair in by_container.get(_BOTTLENECKS, {}).items()
    ]
    if not bottlenecks and not couplings:
        raise MalformedError("shared factors without a module that has them", file=adapter.path)
    return (*couplings, *sorted(bottlenecks, key=lambda module: (module.place.layer, module.place.behind)))


def _module(site: Site) -> str:
    return site.path.removesuffix(".weight").rpartition(".")[0]


def _bottleneck(
    adapter: Adapter, site: Site, update: Unmerged, shared: Parts, shared_sites: frozenset[Site]
) -> InsertedModule:
    module, held = _module(site), dict(update.held)
    matches = ((re.fullmatch(pattern, module), behind) for pattern, behind in _PLACES)
    found = next(((int(match[1]), behind) for match, behind in matches if match), None)
    if found is None:
        raise FitError(
            f"a bottleneck at '{module}', where a graph has no place for one",
            file=adapter.path,
            tensor=update.tensors[0].name,
        )
    layer, behind = found
    settings = bottleneck_settings(adapter, layer, "mh_adapter" if behind == "attention" else "output_adapter")
    form = settings.form
    number = 1 if form.norm_before else 0  # in front of the matrix there is the norm
    expected = {f"adapter_down.{number}.", "adapter_up."}
    expected |= {"adapter_norm_before.", "adapter_down.0."} if form.norm_before else set()
    expected |= {"adapter_norm_after."} if form.norm_after else set()
    expected |= {"gate."} if form.gated else set()
    names = {name for name in held if name.startswith(tuple(expected))}
    names |= {"scaling"} if settings.learned_scale else set()
    if odd := sorted(held.keys() - names):
        raise _odd(adapter, held[odd[0]], "is not of a module that its configuration describes")
    down, up = _matrices(adapter, held, shared, settings, number)
    rank = _rank(adapter, update, settings, down)
    network = Bottleneck(f"{module}.adapters", _width(adapter, update, settings, up), rank, form)
    values = partial(_values, adapter, network, held, settings, down, up, number)
    sites = frozenset({site}) | (shared_sites if settings.phm else frozenset())
    return InsertedModule(PlacedModule(network, behind, layer), sites, values)


def _odd(adapter: Adapter, factor: Factor, what: str) -> MalformedError:
    stored = factor.tensors[0]
    return MalformedError(what, file=adapter.path, tensor=stored.name)


def _part(adapter: Adapter, held: Parts, name: str) -> Factor:
    if name not in held:
        hint = (
            "the library loses what modules share when it saves a bare model"
            if name.startswith(("phm", "W_"))
            else None
        )
        raise MalformedError(f"a bottleneck without its '{name}'", file=adapter.path, hint=hint)
    return held[name]


def _matrices(
    adapter: Adapter, held: Parts, shared: Parts, settings: BottleneckSettings, number: int
) -> tuple[dict[str, Factor], dict[str, Factor]]:
    """The tensors of the two projections, by the names of a layer of one kind or the other."""
    found = []
    for at, position in ((f"adapter_down.{number}", "down"), ("adapter_up", "up")):
        if settings.phm is None:
            own = {leaf: _part(adapter, held, f"{at}.{leaf}") for leaf in ("weight", "bias")}
        else:
            own = {leaf: _part(adapter, held, f"{at}.{leaf}") for leaf in settings.phm.own}
            own |= {leaf: _part(adapter, shared, leaf.replace("W", f"W_{position}", 1)) for leaf in settings.phm.shared}
        found.append(own)
    return found[0], found[1]


def _rank(adapter: Adapter, update: Unmerged, settings: BottleneckSettings, down: Parts) -> int:
    if settings.phm is None:
        rows = down["weight"].shape[0]
    else:
        last = down["W_right" if "W_right" in down else "W"].tensors[0].shape
        rows = last[-1] * last[0] if len(last) == 3 else 0
    if rows < 1:
        raise _odd(adapter, update.held[0][1], "has no inner values")
    return int(rows)


def _width(adapter: Adapter, update: Unmerged, settings: BottleneckSettings, up: Parts) -> int:
    if settings.phm is None:
        return int(up["weight"].shape[0])
    last = up["W_right" if "W_right" in up else "W"].tensors[0].shape
    if len(last) != 3:
        raise _odd(adapter, update.held[0][1], "of a compacter has not three axes")
    return int(last[-1] * last[0])


def _values(
    adapter: Adapter,
    network: Bottleneck,
    held: Parts,
    settings: BottleneckSettings,
    down: Parts,
    up: Parts,
    number: int,
) -> dict[str, Array]:
    """The tensors of a bottleneck.

    Raises:
        MalformedError: a shape does not fit the others.
        FitError: a value is not finite.
    """
    at, width, rank = network.module, network.width, network.rank
    scale = _loaded(held["scaling"]) if settings.learned_scale else numpy.float32(settings.scale)
    made = {}
    for name, parts, inputs, outputs in (("down", down, width, rank), ("up", up, rank, width)):
        weight, bias = _projection(parts, outputs)
        times = scale if name == "up" else numpy.float32(1.0)
        made[f"{at}.{name}.weight"] = weight * times
        made[f"{at}.{name}.bias"] = bias * times
        if weight.shape != (inputs, outputs) or bias.shape != (outputs,):
            raise _odd(
                adapter, next(iter(parts.values())), f"makes a matrix of {list(weight.shape)}, not {[inputs, outputs]}"
            )
    if network.form.norm_before:
        made |= _leaves(adapter, held, f"adapter_down.{number - 1}", f"{at}.before", (width,))
    if network.form.norm_after:
        made |= _leaves(adapter, held, "adapter_norm_after", f"{at}.after", (width,))
    if network.form.gated:
        made |= _leaves(adapter, held, "gate", f"{at}.gate", (1, width))
        made[f"{at}.gate.weight"] = made[f"{at}.gate.weight"].T
    return made


def _leaves(adapter: Adapter, held: Parts, module: str, at: str, shape: tuple[int, ...]) -> dict[str, Array]:
    """Weight and bias of a module, checked."""
    found = {}
    for leaf, sizes in (("weight", shape), ("bias", shape[:1])):
        values = _loaded(_part(adapter, held, f"{module}.{leaf}"))
        if values.shape != sizes:
            raise _odd(adapter, held[f"{module}.{leaf}"], f"has the shape {list(values.shape)}, not {list(sizes)}")
        found[f"{at}.{leaf}"] = values
    return found


def _loaded(factor: Factor) -> Array:
    return numpy.asarray(factor.load(DType.F32)).reshape(factor.tensors[0].shape)


def _projection(parts: Parts, outputs: int) -> tuple[Array, Array]:
    """The matrix ``(inputs, outputs)`` and the bias of a layer, which a PHM layer may lack."""
    if "weight" in parts:
        return _loaded(parts["weight"]).T, _loaded(parts["bias"])
    inner = _product(parts, "W")
    rule = _product(parts, "phm_rule")
    terms = (numpy.kron(one, other) for one, other in zip(rule, inner, strict=True))
    bias = _loaded(parts["b"]) if "b" in parts else numpy.zeros(outputs, numpy.float32)
    return numpy.asarray(sum(terms), numpy.float32), bias


def _product(parts: Parts, name: str) -> Array:
    if name in parts:
        return _loaded(parts[name])
    return numpy.matmul(_loaded(parts[f"{name}_left"]), _loaded(parts[f"{name}_right"]))


def _coupling(adapter: Adapter, site: Site, update: Unmerged) -> InsertedModule:
    held = dict(update.held)
    settings = bottleneck_settings(adapter, None, "inv_adapter")
    wanted = {f"{name}.{number}.{leaf}" for name in "FG" for number in (0, 2) for leaf in ("weight", "bias")}
    if odd := sorted(held.keys() ^ wanted):
        raise MalformedError(f"an invertible adapter with, or without, '{odd[0]}'", file=adapter.path)
    halves = held["F.2.weight"].shape[0], held["G.2.weight"].shape[0]
    ranks = held["F.0.weight"].shape[0], held["G.0.weight"].shape[0]
    network = Coupling(_module(site) + ".invertible_adapters", sum(halves), ranks, settings.form.activation)
    place = PlacedModule(
        network, "embedding", inverted=str(adapter.config.get("model_class", "")).endswith("AdapterModel")
    )
    return InsertedModule(place, frozenset({site}), partial(_coupling_values, adapter, network, held))


def _coupling_values(adapter: Adapter, network: Coupling, held: Parts) -> dict[str, Array]:
    made: dict[str, Array] = {}
    for name, pair in (("F", network.first), ("G", network.second)):
        for number, projection in zip((0, 2), pair, strict=True):
            sizes = projection.outputs, projection.inputs
            at = projection.weight.removesuffix(".weight")
            made |= _leaves(adapter, held, f"{name}.{number}", at, sizes)
            made[projection.weight] = made[projection.weight].T
    return made
