# SPDX-License-Identifier: Apache-2.0
"""A share of an update that is not linear in its factors: ``W' = W + w (U(W) - W)``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery_formats.tensors.views import Index
from surgery_formats.updates.base import Apply

if TYPE_CHECKING:
    import torch

__all__ = ["blend"]


def blend(whole: Apply, share: float) -> Apply:
    """`share` of the way from a block to the result of `whole`.

    Scaling only the B of a DoRA would still impose its magnitudes.
    """

    def apply(block: torch.Tensor, rows: Index, cols: Index) -> torch.Tensor:
        before = block.clone()
        return before.lerp_(whole(block, rows, cols), share)

    return apply
