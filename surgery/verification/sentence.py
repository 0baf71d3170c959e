# SPDX-License-Identifier: Apache-2.0
"""The modules of sentence-transformers on the reference, read from the model's own folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from surgery.onnx.graph.contract import Contract
from surgery.reference import Reference
from surgery.verification.replaced_weights import ReplacedWeights
from surgery_formats.models.families.tasks import FEATURES, SENTENCE
from surgery_formats.models.sentence_modules import read_sentence_modules

__all__ = ["own_task", "with_sentence_modules"]


def own_task(contract: Contract) -> str:
    """The task of the model itself, without what follows it."""
    return FEATURES if contract.task == SENTENCE else contract.task


def with_sentence_modules(reference: Reference, folder: Path) -> Reference:
    """The reference with the modules in `folder` behind it.

    Raises:
        InputError, FitError: see `read_sentence_modules`.
    """
    modules = read_sentence_modules(folder, reference.model.hidden)
    values = {
        name: torch.from_numpy(np.ascontiguousarray(tensor.read(), np.float32))
        for name, tensor in modules.tensors.items()
    }
    model = replace(reference.model, head=modules.head)
    return replace(reference, model=model, weights=ReplacedWeights(reference.weights, values))
