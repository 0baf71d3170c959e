# SPDX-License-Identifier: Apache-2.0
"""Compare a graph's own soft prompt with that of its adapter."""

from __future__ import annotations

from pathlib import Path

import torch

from surgery.reference import Cache, Reference, prompt_cache
from surgery.verification.onnx import LogitDifference
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError, ProofError

__all__ = ["compare_prompt"]


def compare_prompt(
    graph: Path, adapter: Adapter, reference: Reference, past: Cache | None, front: torch.Tensor | None
) -> LogitDifference:
    """Compare the graph's default past, or its embeddings in front of an encoder, with the soft prompt of `adapter`.

    Raises:
        FitError: the graph has no soft prompt.
        ProofError: the number of virtual tokens differs.
    """
    prompt = adapter.prompt
    assert prompt is not None
    if past is None and front is None:
        raise FitError("the graph has no soft prompt to compare with", file=graph)
    if past is not None:
        computed = [part for layer in past.layers for part in layer]
        if prompt.prefix is None:
            expected = [part for layer in prompt_cache(reference, prompt.embeddings().float()).layers for part in layer]
        else:
            pairs = [prompt.key_values(layer) for layer in range(prompt.prefix.layers)]
            expected = [part.float()[None] for pair in pairs for part in pair]
    else:
        assert front is not None
        computed, expected = [front], [prompt.embeddings().float()]
    if [part.shape for part in computed] != [part.shape for part in expected]:
        raise ProofError(f"the graph's soft prompt and that of {adapter.path.name} differ in size", file=graph)
    pairs_of_parts = list(zip(computed, expected, strict=True))
    difference = max(float((a.double() - b.double()).abs().max()) for a, b in pairs_of_parts)
    return LogitDifference("soft prompt", difference, max(float(b.abs().max()) for _, b in pairs_of_parts))
