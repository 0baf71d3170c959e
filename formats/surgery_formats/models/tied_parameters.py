# SPDX-License-Identifier: Apache-2.0
"""Two names, one storage: tied embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from surgery_formats.tensors.tensor import StoredTensor, Tensor

__all__ = ["Tie", "ties_by_place"]


@dataclass(frozen=True, slots=True)
class Tie:
    """The parameter `alias` is the parameter `source`.

    Attributes:
        alias: Name that need not be stored (``lm_head.weight``).
        source: Name whose bytes are the truth (``model.embed_tokens.weight``).
    """

    alias: str
    source: str


def ties_by_place(tensors: Mapping[str, Tensor]) -> tuple[Tie, ...]:
    """Ties visible in a file: two names of the same bytes (pickles keep shared storages)."""
    first: dict[object, str] = {}
    ties = []
    for name, tensor in tensors.items():
        if not isinstance(tensor, StoredTensor) or tensor.nbytes == 0:
            continue
        key = (tensor.place, tensor.shape, tensor.strides)
        source = first.setdefault(key, name)
        if source != name:
            ties.append(Tie(name, source))
    return tuple(ties)
