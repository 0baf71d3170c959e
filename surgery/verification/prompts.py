# SPDX-License-Identifier: Apache-2.0
"""Is the soft prompt that a graph brings along what its adapter makes of the model?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from surgery.reference import Cache, Reference, prompt_cache
from surgery.verification.onnx import LogitDifference
from surgery_formats.errors import FitError, ProofError

if TYPE_CHECKING:
    from surgery_formats.canonical.adapter import Adapter

__all__ = ["compare_prompt"]


def compare_prompt(
    graph: Path, adapter: Adapter, reference: Reference, past: Cache | None, front: torch.Tensor | None
) -> LogitDifference:
    """The graph's default past, or its embeddings in front of an encoder, against those of `adapter`.

    Args:
        graph: Its file, for messages.
        adapter: With a soft prompt.
        reference: What the prompt was run through.
        past: Of the graph; None where it has none.
        front: Of the graph; None where it has none.

    Raises:
        FitError: the graph has no soft prompt of its own.
        ProofError: it has another number of virtual tokens.
    """
    prompt = adapter.prompt
    assert prompt is not None
    if past is None and front is None:
        raise FitError("the graph has no soft prompt of its own to compare with", file=graph)
    if past is not None:
        ours = [part for layer in past.layers for part in layer]
        if prompt.prefix is None:
            theirs = [part for layer in prompt_cache(reference, prompt.embeddings().float()).layers for part in layer]
        else:
            pairs = [prompt.key_values(layer) for layer in range(prompt.prefix.layers)]
            theirs = [part.float()[None] for pair in pairs for part in pair]
    else:
        assert front is not None
        ours, theirs = [front], [prompt.embeddings().float()]
    if [part.shape for part in ours] != [part.shape for part in theirs]:
        raise ProofError(f"the graph's soft prompt is of another size than that of {adapter.path.name}", file=graph)
    pairs_of = list(zip(ours, theirs, strict=True))
    difference = max(float((one.double() - other.double()).abs().max()) for one, other in pairs_of)
    return LogitDifference("soft prompt", difference, max(float(other.abs().max()) for _, other in pairs_of))
