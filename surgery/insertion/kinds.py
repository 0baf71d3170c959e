# SPDX-License-Identifier: Apache-2.0
"""Adapters that nobody has trained yet, kind by kind, in canonical form: each leaves the base as it is.

The shapes, and the values that are not random, are those of PEFT 0.21.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy

from surgery.insertion.draws import Draws
from surgery.insertion.modules import LinearModule
from surgery.insertion.starts import TAKEN, FactorPair, Start
from surgery_formats.adapters.peft.fresh import (
    FreshTargets,
    ia3_config,
    lora_config,
    lycoris_config,
    oft_config,
    vera_config,
)
from surgery_formats.adapters.peft.kinds.lokr import factorised
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.computed import ComputedTensor, computed, zeros
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import listing
from surgery_formats.updates import IA3, OFT, ChangedBase, DoRA, Factor, LoHa, LoKr, LoRA, Seed, Update, VeRA

__all__ = ["KINDS", "Begun", "FreshRequest", "begun", "scale_of", "tensors_of"]

_ONLY_LINEAR = ("loha", "lokr", "oft")  # PEFT 0.21 refuses transformers' Conv1D for these
_VERA_INITIAL = 0.1  # of d; b begins with zeros


@dataclass(frozen=True)
class FreshRequest:
    """What was asked for.

    Attributes:
        kind: ``lora``, ``dora`` ...
        rank: Directions; the side of a block of an OFT.
        alpha: As configurations have it.
        start: How the factors of a LoRA begin.
        draws: Random numbers.
        modules: What the adapter is for.
        spelt: Names of all targets, and of any chosen ones, as the format matches them.
        base_name: Of the base.
        task: As the Hub names it, or empty.
        raw: Whether a part that is taken from the base stays in it, for PEFT to take away when it loads the adapter.
    """

    kind: str
    rank: int
    alpha: float
    start: Start
    draws: Draws
    modules: tuple[LinearModule, ...]
    spelt: Callable[[tuple[LinearModule, ...]], tuple[str, ...]]
    base_name: str
    task: str
    raw: bool

    @property
    def about(self) -> FreshTargets:
        """What every configuration says."""
        transposed = all(module.transposed for module in self.modules)
        return FreshTargets(self.base_name, self.task, self.spelt(self.modules), transposed)


@dataclass(frozen=True)
class Begun:
    """An adapter.

    Attributes:
        updates: By site.
        config: As PEFT has it.
        name: What PEFT calls the kind.
        optional: Sites that follow another one.
        frozen: Numbers of the adapter that are not trained, and not in its file: projections that are drawn.
        plain: Of a raw start: the same factors as LoRAs on a base from which their part was taken already.
    """

    updates: Mapping[Site, tuple[Update, ...]]
    config: dict[str, Any]
    name: str
    optional: frozenset[Site] = frozenset()
    frozen: int = 0
    plain: Mapping[Site, tuple[Update, ...]] = field(default_factory=dict)


def begun(request: FreshRequest) -> Begun:
    """The adapter that was asked for.

    Raises:
        FitError: PEFT has no such kind on a module, or the rank does not fit.
    """
    turned = [module.path for module in request.modules if module.transposed]
    if turned and request.kind in _ONLY_LINEAR:
        raise FitError(
            f"PEFT has no {request.kind} on layers that store their weight as (in, out): {listing(turned)}",
            hint="a LoRA, a DoRA, an (IA)^3 or a VeRA can be begun there",
        )
    if turned and request.raw and request.start.init == "olora":
        raise FitError(
            f"PEFT cannot take olora from layers that store their weight as (in, out): {listing(turned)}",
            hint="`residual=` writes the base without it",
        )
    return KINDS[request.kind](request)


def _site(module: LinearModule) -> Site:
    return Site(f"{module.path}.weight", module_kind="linear")


def _factor(
    name: str, shape: tuple[int, ...], make: Callable[[], Array], sources: tuple[StoredTensor, ...] = ()
) -> Factor:
    return Factor.of(computed(name, shape, sources, make))


def _zeros(name: str, shape: tuple[int, ...]) -> Factor:
    return Factor.of(zeros(name, DType.F32, shape))


def _constant(name: str, shape: tuple[int, ...], value: float) -> Factor:
    return _factor(name, shape, lambda: numpy.full(shape, value, numpy.float32))


def _sources(module: LinearModule) -> tuple[StoredTensor, ...]:
    return tuple(source for piece in module.pieces for source in piece.parameter.sources)


def _lora(request: FreshRequest, module: LinearModule, scale: float) -> LoRA:
    (rows, cols), rank, draws = module.shape, request.rank, request.draws
    a, b = f"{module.path}.lora_A", f"{module.path}.lora_B"
    if request.start.init == "default":
        A = _factor(a, (rank, cols), lambda: draws.uniform(a, (rank, cols), cols))
        return LoRA(A, _zeros(b, (rows, rank)), scale, request.alpha)
    pair, of_base = FactorPair(request.start, module), _sources(module)
    A, B = _factor(a, (rank, cols), pair.A, of_base), _factor(b, (rows, rank), pair.B, of_base)
    return LoRA(A, B, scale, request.alpha)


def _loras(request: FreshRequest) -> Begun:
    """LoRA, rsLoRA and DoRA."""
    rslora, dora = request.kind == "rslora", request.kind == "dora"
    taken = TAKEN.get(request.start.init) if request.raw else None
    updates: dict[Site, tuple[Update, ...]] = {}
    plain: dict[Site, tuple[Update, ...]] = {}
    for module in request.modules:
        lora, site = _lora(request, module, request.start.scale), _site(module)
        updates[site] = (DoRA(lora, _lengths(module)),) if dora else (lora,)
        if taken:
            updates[site], plain[site] = (ChangedBase(lora, taken),), (lora,)
    config = lora_config(request.about, request.rank, request.alpha, dora=dora, rslora=rslora, taken=taken)
    return Begun(updates, config, "LORA", plain=plain)


def _lengths(module: LinearModule) -> Factor:
    """Of the rows of the weight, which the magnitude begins with."""

    def make() -> Array:
        lengths: Array = numpy.linalg.norm(module.weight(), axis=1)
        if not lengths.all():
            raise FitError(
                f"a row of '{module.path}' is zero, and a DoRA divides by its length", hint="choose other `targets=`"
            )
        return lengths

    return _factor(f"{module.path}.magnitude", (module.shape[0],), make, _sources(module))


def _ia3(request: FreshRequest) -> Begun:
    """Outputs are stretched; of what leads an MLP back to the width of the model, the inputs.

    PEFT wants the names of the latter among its targets, and compares ends of paths whatever stands before them.
    """
    updates: dict[Site, tuple[Update, ...]] = {}
    optional: set[Site] = set()
    inward = tuple(m for m in request.modules if m.role == "mlp" and m.shape[1] > m.shape[0])
    for module in request.modules:
        rows, cols = module.shape
        per_row = module not in inward
        vector = _constant(f"{module.path}.ia3_l", (rows if per_row else cols,), 1.0)
        update = IA3(vector, per_row)
        updates[_site(module)] = (update,)
        if per_row and module.has_bias:
            bias = Site(f"{module.path}.bias", module_kind="linear")
            updates[bias] = (update,)
            optional.add(bias)
    outward = tuple(module for module in request.modules if module not in inward)
    names = request.spelt(inward) if inward else ()
    if any(module.path.endswith(names) for module in outward):
        names = tuple(module.path for module in inward)
    about = replace(request.about, modules=tuple(sorted({*names, *(request.spelt(outward) if outward else ())})))
    config = ia3_config(about, names)
    return Begun(updates, config, "IA3", frozenset(optional))


def _loha(request: FreshRequest) -> Begun:
    updates: dict[Site, tuple[Update, ...]] = {}
    rank, draws = request.rank, request.draws
    for module in request.modules:
        rows, cols = module.shape

        def side(name: str, shape: tuple[int, int], path: str = module.path) -> Factor:
            return _factor(f"{path}.{name}", shape, lambda: draws.uniform(f"{path}.{name}", shape, shape[1]))

        update = LoHa(
            side("hada_w1_a", (rows, rank)),
            side("hada_w1_b", (rank, cols)),
            side("hada_w2_a", (rows, rank)),
            _zeros(f"{module.path}.hada_w2_b", (rank, cols)),
            request.alpha / rank,
            request.alpha,
        )
        updates[_site(module)] = (update,)
    return Begun(updates, lycoris_config(request.about, "LOHA", rank, request.alpha), "LOHA")


def _lokr(request: FreshRequest) -> Begun:
    updates: dict[Site, tuple[Update, ...]] = {}
    rank, draws = request.rank, request.draws
    for module in request.modules:
        (left, down), (right, across) = (factorised(size, -1) for size in module.shape)

        def part(name: str, shape: tuple[int, int], path: str = module.path) -> Factor:
            return _factor(f"{path}.{name}", shape, lambda: draws.uniform(f"{path}.{name}", shape, shape[1]))

        if 2 * rank < max(down, across):
            sides = part("lokr_w2_a", (down, rank)), part("lokr_w2_b", (rank, across))
            D = Factor.computed(sides, (down, across), lambda a, b: a @ b)
        else:
            D = part("lokr_w2", (down, across))
        C = _zeros(f"{module.path}.lokr_w1", (left, right))
        updates[_site(module)] = (LoKr(C, D, request.alpha / rank, request.alpha, rank),)
    return Begun(updates, lycoris_config(request.about, "LOKR", rank, request.alpha), "LOKR")


def _oft(request: FreshRequest) -> Begun:
    block = request.rank
    uneven = [module.path for module in request.modules if module.shape[1] % block]
    if uneven or block < 2:
        raise FitError(
            f"blocks of {block} do not divide the inputs of {listing(uneven)}"
            if uneven
            else "a block of one number has nothing to rotate",
            hint="of an OFT the rank is the side of a block",
        )
    config, terms = oft_config(request.about, block)
    updates: dict[Site, tuple[Update, ...]] = {}
    for module in request.modules:
        cols = module.shape[1]
        angles = _zeros(f"{module.path}.oft_R", (cols // block, block * (block - 1) // 2))
        updates[replace(_site(module), module_kind="")] = (OFT(angles, block, terms, inputs=cols),)
    return Begun(updates, config, "OFT")


def _vera(request: FreshRequest) -> Begun:
    rank, key = request.rank, request.draws.seed
    updates: dict[Site, tuple[Update, ...]] = {}
    for module in request.modules:
        b = _zeros(f"{module.path}.vera_lambda_b", (module.shape[0],))
        d = _constant(f"{module.path}.vera_lambda_d", (rank,), _VERA_INITIAL)
        updates[_site(module)] = (VeRA(b, d, Seed(key)),)
    widest = [max(module.shape[axis] for module in request.modules) for axis in (0, 1)]
    return Begun(updates, vera_config(request.about, rank, key, _VERA_INITIAL), "VERA", frozen=rank * sum(widest))


KINDS: Mapping[str, Callable[[FreshRequest], Begun]] = {
    "lora": _loras,
    "dora": _loras,
    "rslora": _loras,
    "ia3": _ia3,
    "loha": _loha,
    "lokr": _lokr,
    "oft": _oft,
    "vera": _vera,
}
"""Kinds that act on linear modules."""


def scale_of(kind: str, rank: int, alpha: float) -> float:
    """What a LoRA's product is multiplied by."""
    return alpha / (math.sqrt(rank) if kind == "rslora" else rank)


def tensors_of(updates: Mapping[Site, tuple[Update, ...]]) -> tuple[ComputedTensor, ...]:
    """Every tensor of fresh updates, once."""
    found = (tensor for chain in updates.values() for update in chain for tensor in update.tensors)
    return tuple(dict.fromkeys(tensor for tensor in found if isinstance(tensor, ComputedTensor)))
