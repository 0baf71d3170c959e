# SPDX-License-Identifier: Apache-2.0
"""Merging of dense deltas: TIES, DARE and magnitude pruning, as their papers define them.

Every function takes the deltas of one weight. Sources of the formulas:

    TIES            Yadav et al. 2023, arXiv:2306.01708: trim, elect sign, disjoint mean
    DARE            Yu et al. 2023, arXiv:2311.03099: drop with probability p, rescale by 1 / (1 - p)
    magnitude-prune trimming alone, then the weighted sum

The papers' one factor lambda on the merged delta is here a weight per adapter, multiplied in before signs are elected:
equal weights give the paper's result, and a negative weight takes an adapter away. Trimming is per weight, as every
merging tool does it.

``peft-ties`` and ``peft-dare-ties`` are what PEFT's ``ties_svd`` and ``dare_ties_svd`` compute: signs are elected by the
deltas before they get their weights, a tie of signs is positive, and trimming rounds the number of values down.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy

from surgery_formats.arrays import Array

__all__ = ["DENSE_METHODS", "MAJORITIES", "disjoint_mean", "drop_and_rescale", "elected", "merge_deltas", "trim"]

DENSE_METHODS = ("ties", "dare-ties", "dare-linear", "magnitude-prune", "peft-ties", "peft-dare-ties")
MAJORITIES = ("total", "frequency")
"""What elects a sign: the sum of the values, or the number of those that have it."""
_TRIMMED = ("ties", "magnitude-prune", "peft-ties")
_CHUNK = 1 << 20  # random numbers drawn at a time


def merge_deltas(
    deltas: Sequence[Callable[[], Array]],
    weights: Sequence[float],
    *,
    method: str,
    density: float,
    seed: int,
    name: str,
    owners: Sequence[int],
    majority: str = "total",
) -> Array:
    """One weight's deltas merged by `method`, one of `DENSE_METHODS`, in float64.

    Each of `deltas` gives a fresh float64 array of one common shape, and is called once, one after the other.
    `density` is the share of the values that is kept, in (0, 1]. Random drops depend on `seed`, the weight's name and
    the number of each delta's adapter, not on the order of work. `majority`, one of `MAJORITIES`, elects the signs of TIES.
    """
    as_peft = method.startswith("peft-")
    scaled: list[Array] = []
    for make, weight, owner in zip(deltas, weights, owners, strict=True):
        delta = make()
        if method in _TRIMMED:
            trim(delta, density, rounded_down=as_peft)
        else:
            drop_and_rescale(delta, density, generator(seed, name, owner))
        if not as_peft:
            delta *= weight
        scaled.append(delta)
    if as_peft:
        return disjoint_mean(scaled, elected(scaled, majority, undecided=1.0), weights)
    if method.endswith("ties"):
        return disjoint_mean(scaled, elected(scaled, majority))
    merged = scaled[0]
    for delta in scaled[1:]:
        merged += delta
    return merged


def trim(delta: Array, density: float, *, rounded_down: bool = False) -> None:
    """Zero all but the ``ceil(density * n)`` values of greatest magnitude, in place (TIES, step 1).

    Values as great as the least one kept are kept too, so that the result does not depend on an order.
    """
    dropped = delta.size - (math.floor if rounded_down else math.ceil)(density * delta.size)
    if dropped <= 0:
        return
    if dropped == delta.size:
        delta[...] = 0.0
        return
    sizes = abs(delta)
    delta[sizes < numpy.partition(sizes, dropped, axis=None)[dropped]] = 0.0


def generator(seed: int, name: str, owner: int) -> numpy.random.Generator:
    """Random numbers of one adapter's one weight: Philox, keyed by what they are for."""
    key = hashlib.sha256(f"{seed}\0{owner}\0{name}".encode(errors="surrogatepass")).digest()
    return numpy.random.Generator(numpy.random.Philox(key=int.from_bytes(key[:16], "little")))


def drop_and_rescale(delta: Array, density: float, random: numpy.random.Generator) -> None:
    """Zero each value with probability ``1 - density`` and divide the others by `density`, in place (DARE).

    Numbers are drawn in the order of the elements, one per element.
    """
    if density == 1.0:
        return
    for start in range(0, delta.size, _CHUNK):
        drawn = random.random(min(_CHUNK, delta.size - start))
        numpy.put(delta, numpy.flatnonzero(drawn >= density) + start, 0.0)
    delta /= density


def elected(deltas: Sequence[Array], majority: str, undecided: float = 0.0) -> Array:
    """The sign of each value that most mass, or most deltas, have (TIES, step 2); `undecided` where they cancel exactly."""
    total = numpy.zeros_like(deltas[0])
    for delta in deltas:
        total += delta if majority == "total" else numpy.sign(delta)
    signs = numpy.sign(total)
    signs[signs == 0] = undecided
    return signs


def disjoint_mean(deltas: Sequence[Array], signs: Array, weights: Sequence[float] | None = None) -> Array:
    """The mean of the deltas that have the elected sign (TIES, step 3), each times its weight.

    Values that are zero take no part in the mean; where nothing was elected, the result is zero.
    """
    total, count = numpy.zeros_like(signs), numpy.zeros_like(signs)
    for number, delta in enumerate(deltas):
        agrees = (numpy.sign(delta) == signs) & (delta != 0)
        if weights is not None:
            delta = delta * weights[number]
        total += numpy.where(agrees, delta, 0.0)
        count += agrees
    return total / count.clip(min=1.0)
