# SPDX-License-Identifier: Apache-2.0
"""What rows before the input are worth on texts: the loss without them, and with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from surgery.reference import forward, open_reference
from surgery_formats.models.component import Component

__all__ = ["losses"]


def losses(component: Component, rows: np.ndarray, texts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Mean negative log-likelihood of the texts, in nats per token: without the rows, and with them.

    Raises:
        FitError: no recipe for the model, or an id beyond its vocabulary.
    """
    reference = open_reference(component)
    totals, count = [0.0, 0.0], 0
    for text in texts:
        ids = torch.tensor([list(text)])
        count += len(text) - 1
        for number, virtual in enumerate((None, torch.from_numpy(np.ascontiguousarray(rows, np.float32)))):
            logits = forward(reference, ids, virtual=virtual).logits[0, -len(text) :].double()
            chosen = torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])
            totals[number] -= float(chosen.sum())
    return totals[0] / count, totals[1] / count
