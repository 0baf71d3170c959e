# SPDX-License-Identifier: Apache-2.0
"""What makes the first hidden state, of token ids or of what stands in for them.

Shapes as in `surgery_formats.models.families.recipe`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery_formats.models.families.recipe_altup import LayerEmbeddings
from surgery_formats.models.families.recipe_audio import AudioStem
from surgery_formats.models.families.recipe_inserted import Coupling
from surgery_formats.models.families.recipe_parts import Norm, Projection
from surgery_formats.models.families.recipe_vision import Patches

__all__ = ["Embedding"]


@dataclass(frozen=True, slots=True)
class Embedding:
    """Maps token ids to the first hidden state ``(B, S, D)``.

    Attributes:
        tokens: Tensor ``(V, D)``; empty for an encoder of sound or of images.
        positions: Learned positions ``(P, D)``, or empty.
        sinusoid: Rows of a table of positions that no file holds, sines in the first half of a row, cosines in the second
            (arXiv:1706.03762, as Marian has them); 0 for none.
        position_rule: ``absolute``: past length plus index; ``mask``: ``cumsum(attention_mask) - 1`` (OPT); ``nonpad``:
            as ``mask``, over tokens other than `padding_token`, which has its own position (RoBERTa).
        position_offset: First row used (2 for OPT, ``padding_idx + 1`` for RoBERTa).
        padding_token: For ``nonpad``.
        types: Token types ``(types, D)``, or empty.
        scale: Factor on the rows.
        scale_rounded: Whether `scale` is part of the table, rounded to the stored type (Gemma: ``sqrt(D)``), so that
            embeddings from elsewhere are not scaled; Granite scales all inputs.
        norm: Norm of the sum (BERT), or None.
        projection: Projection of narrower rows to ``D``, or None.
        projected: What it projects: rows of ``tokens`` (OPT-350m), the ``sum`` of all rows (DeBERTa), or its ``norm``
            (ALBERT, ELECTRA).
        couplings: Networks of adapters on the first hidden state, in order.
        stem: What makes the first hidden state of a spectrogram instead of tokens (Whisper), or None.
        patches: What makes the first hidden state of an image instead of tokens (ViT), or None.
        per_layer: An embedding of every token for every layer besides (Gemma 3n), or None.
    """

    tokens: str
    positions: str = ""
    position_rule: Literal["absolute", "mask", "nonpad"] = "absolute"
    position_offset: int = 0
    padding_token: int = 0
    types: str = ""
    scale: float = 1.0
    scale_rounded: bool = False
    norm: Norm | None = None
    projection: Projection | None = None
    projected: Literal["tokens", "sum", "norm"] = "tokens"
    couplings: tuple[Coupling, ...] = ()
    sinusoid: int = 0
    stem: AudioStem | None = None
    patches: Patches | None = None
    per_layer: LayerEmbeddings | None = None
