# SPDX-License-Identifier: Apache-2.0
"""Merging of dense deltas: TIES, DARE and magnitude pruning, as their papers define them.

Every function takes the deltas of one weight. Sources of the formulas:

    TIES            Yadav et al. 2023, arXiv:2306.01708: trim, elect sign, disjoint mean
    DARE            Yu et al. 2023, arXiv:2311.03099: drop with probability p, rescale by 1 / (1 - p)
    magnitude-prune trimming alone, then the weighted sum

The papers' one factor lambda on the merged delta is here a weight per adapter, multiplied in before signs are elected:
equal weights give the paper's result, and a negative weight takes an adapter away. Trimming is per weight, as every
merging tool does it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

__all__ = ["DENSE_METHODS", "disjoint_mean", "drop_and_rescale", "merge_deltas", "trim"]

DENSE_METHODS = ("ties", "dare-ties", "dare-linear", "magnitude-prune")
_TRIMMED = ("ties", "magnitude-prune")
_CHUNK = 1 << 20  # random numbers drawn at a time


def merge_deltas(
    deltas: Sequence[Callable[[], torch.Tensor]],
    weights: Sequence[float],
    *,
    method: str,
    density: float,
    seed: int,
    name: str,
    owners: Sequence[int],
) -> torch.Tensor:
    """One weight's deltas merged by `method`, one of `DENSE_METHODS`, in float64.

    Each of `deltas` gives a fresh float64 tensor of one common shape, and is called once, one after the other.
    `density` is the share of the values that is kept, in (0, 1]. Random drops depend on `seed`, the weight's name and
    the number of each delta's adapter, not on the order of work.
    """
    scaled: list[torch.Tensor] = []
    for make, weight, owner in zip(deltas, weights, owners, strict=True):
        delta = make()
        if method in _TRIMMED:
            trim(delta, density)
        else:
            drop_and_rescale(delta, density, generator(seed, name, owner))
        scaled.append(delta.mul_(weight))
    if method.endswith("ties"):
        return disjoint_mean(scaled)
    merged = scaled[0]
    for delta in scaled[1:]:
        merged += delta
    return merged


def trim(delta: torch.Tensor, density: float) -> None:
    """Zero all but the ``ceil(density * n)`` values of greatest magnitude, in place (TIES, step 1).

    Values as great as the least one kept are kept too, so that the result does not depend on an order.
    """
    kept = math.ceil(density * delta.numel())
    if kept >= delta.numel():
        return
    sizes = delta.abs()
    least = sizes.flatten().kthvalue(delta.numel() - kept + 1).values
    delta[sizes < least] = 0.0


def generator(seed: int, name: str, owner: int) -> np.random.Generator:
    """Random numbers of one adapter's one weight: Philox, keyed by what they are for."""
    key = hashlib.sha256(f"{seed}\0{owner}\0{name}".encode(errors="surrogatepass")).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))


def drop_and_rescale(delta: torch.Tensor, density: float, random: np.random.Generator) -> None:
    """Zero each value with probability ``1 - density`` and divide the others by `density`, in place (DARE).

    Numbers are drawn in the order of the elements, one per element.
    """
    if density == 1.0:
        return
    flat = delta.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        dropped = torch.from_numpy(random.random(part.numel())) >= density
        part[dropped] = 0.0
    delta.div_(density)


def disjoint_mean(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Elect each value's sign by total mass, and average the deltas that agree with it (TIES, steps 2 and 3).

    Values that are zero take no part in the mean; where the masses cancel exactly nothing is elected, and the result is
    zero.
    """
    total = torch.zeros_like(deltas[0])
    for delta in deltas:
        total += delta
    elected = total.sign()
    total.zero_()
    count = torch.zeros_like(total)
    for delta in deltas:
        agrees = delta.sign() == elected
        agrees &= delta != 0
        total += torch.where(agrees, delta, 0.0)
        count += agrees
    return total.div_(count.clamp_(min=1.0))
