# SPDX-License-Identifier: Apache-2.0
"""A short convolution over the tokens of each row, as if its padding were not there."""

from __future__ import annotations

import torch

from surgery.reference.primitives import Load, project
from surgery_formats.models.families.recipe import Attention, ShortConvolution

__all__ = ["convolve"]


def convolve(
    values: torch.Tensor,
    attention: Attention,
    own: ShortConvolution,
    load: Load,
    real: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """``out(c * convolution(b * x))`` ``(B, S, D)``; and ``b * x`` of all tokens so far ``(B, 1, T, D)``, twice like a cache.

    `real` ``(B, T)`` tells which past and new tokens are no padding.
    """
    b, c, inner = project(values, attention.inputs[0], load).chunk(3, dim=-1)
    entered = (b * inner)[:, None]
    if past is not None:
        entered = torch.cat((past[0], entered), dim=2)
    taps = load(own.weight)[:, 0]  # (D, kernel)
    mixed = torch.zeros_like(entered[:, 0])
    for row, tokens in enumerate(real):
        kept = entered[row, 0, tokens]
        for back in range(min(own.kernel, len(kept))):  # the token `back` before
            shifted = torch.cat((torch.zeros_like(kept[:back]), kept[: len(kept) - back]))
            mixed[row, tokens] += shifted * taps[:, own.kernel - 1 - back]
    return project(c * mixed[:, -values.shape[1] :], attention.output, load), (entered, entered)
