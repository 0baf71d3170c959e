# SPDX-License-Identifier: Apache-2.0
"""What follows the last layer: a head for each task; that of sentences is in `recipe_sentence`.

Shapes as in `surgery_formats.models.families.recipe`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery_formats.models.families.recipe_inserted import Coupling
from surgery_formats.models.families.recipe_mlp import MLP
from surgery_formats.models.families.recipe_parts import (
    Activation,
    Norm,
    Projection,
    Shapes,
    norm_shapes,
    projection_shapes,
)
from surgery_formats.models.families.recipe_sentence import SentenceHead

__all__ = ["ClassifierHead", "Head", "HiddenHead", "LanguageHead", "PooledHead", "Probe", "SpanHead"]


@dataclass(frozen=True, slots=True)
class LanguageHead:
    """``logits (B, S, V)``, of the next token in a decoder, of a masked one in an encoder.

    Attributes:
        projection: Projection onto the vocabulary; if tied, its weight is the embedding's.
        before: Projection before it (OPT-350m, BERT), or None.
        softcap: ``c tanh(logits / c)`` (Gemma 2), or None.
        divisor: Divisor of the logits (Granite).
        inverted: Networks of adapters that are turned round in front of the projection, in order.
        activation: Of the result of `before` (BERT), or None.
        norm: Norm of it, or None.
        bias: Tensor ``(1, V)`` added to the logits (BART), or empty.
    """

    projection: Projection
    before: Projection | None = None
    softcap: float | None = None
    divisor: float = 1.0
    inverted: tuple[Coupling, ...] = ()
    activation: Activation | None = None
    norm: Norm | None = None
    bias: str = ""

    def shapes(self, hidden: int) -> Shapes:
        """Its tensors; a tied projection has the embedding's."""
        shapes = projection_shapes(self.projection, self.before) | norm_shapes(self.projection.inputs, self.norm)
        return shapes | ({self.bias: (1, self.projection.outputs)} if self.bias else {})


@dataclass(frozen=True, slots=True)
class ClassifierHead:
    """``logits (B, labels)`` of one token of each row, or ``(B, S, labels)`` of every token.

    Attributes:
        tokens: ``first``, ``every``, ``last``: the rightmost one whose id is not `padding_token`, or the ``mean`` of all that
            are no padding; of an image the mean of its ``patches``, or ``[first | that mean]`` (``first_and_patches``).
        steps: ``(projection, activation or None)`` in order. BERT's pooler is the first step.
        padding_token: For ``last``; without one rows have no padding, so there is only one row.
        choices: Whether rows are the choices of questions, ``(B, C, S)``, each with one score: ``logits (B, C)``.
        early: Number of steps that every token takes before their mean (EuroBERT).
        norm: Norm in front of the last step (ModernBERT), or None.
    """

    tokens: Literal["first", "every", "last", "mean", "patches", "first_and_patches"]
    steps: tuple[tuple[Projection, Activation | None], ...]
    padding_token: int | None = None
    choices: bool = False
    early: int = 0
    norm: Norm | None = None

    def shapes(self, hidden: int) -> Shapes:
        """Its tensors."""
        last, _ = self.steps[-1]
        return projection_shapes(*(step for step, _ in self.steps)) | norm_shapes(last.inputs, self.norm)


@dataclass(frozen=True, slots=True)
class SpanHead:
    """``start_logits (B, S)`` and ``end_logits (B, S)``: where an answer begins and where it ends.

    Attributes:
        projection: ``D`` to two values.
        before: Projection in front of it, and its activation (ModernBERT), or None.
        norm: Norm of their result, or None.
    """

    projection: Projection
    before: tuple[Projection, Activation] | None = None
    norm: Norm | None = None

    def shapes(self, hidden: int) -> Shapes:
        """Its tensors."""
        before = self.before[0] if self.before else None
        return projection_shapes(self.projection, before) | norm_shapes(self.projection.inputs, self.norm)


@dataclass(frozen=True, slots=True)
class HiddenHead:
    """``last_hidden_state (B, S, D)``, and ``pooler_output (B, D)`` if there is a pooler: a model without a head.

    Attributes:
        pooler: Projection of the first token, then tanh; or None.
    """

    pooler: Projection | None = None

    def shapes(self, hidden: int) -> Shapes:
        """Its tensors."""
        return projection_shapes(self.pooler)


@dataclass(frozen=True, slots=True)
class Probe:
    """Attention of one learned query to all tokens, with a residual MLP behind it (SigLIP, arXiv:2303.15343).

    Attributes:
        query: Tensor ``(1, 1, D)``.
        inputs: ``[q | k | v]`` of all.
        output: Projection of the result.
        heads: Number of heads.
        norm: Norm before the MLP.
        mlp: Its result is added to what it reads the norm of.
    """

    query: str
    inputs: Projection
    output: Projection
    heads: int
    norm: Norm
    mlp: MLP

    def shapes(self, hidden: int) -> Shapes:
        """Its tensors, in a model of `hidden` values."""
        shapes: Shapes = {self.query: (1, 1, hidden)}
        return shapes | projection_shapes(self.inputs, self.output) | norm_shapes(hidden, self.norm) | self.mlp.shapes()


@dataclass(frozen=True, slots=True)
class PooledHead:
    """``last_hidden_state (B, S, D)``, and one vector of each row: an encoder of images, or of texts about them.

    Attributes:
        output: Name of the vector's output: ``pooler_output``, ``image_embeds`` or ``text_embeds``.
        token: Whose state it is: the ``first``, the ``last``, padding or not, the first with the id `end` (``end``), or that
            with the greatest id (``greatest``: CLIP before its configuration named the right id).
        end: See `token`.
        norm: Norm of that state, or None.
        projection: Projection of it, or None.
        probe: What makes the vector instead of one token's state, or None.
    """

    output: str
    token: Literal["first", "last", "end", "greatest"] = "first"
    end: int = 0
    norm: Norm | None = None
    projection: Projection | None = None
    probe: Probe | None = None

    def shapes(self, hidden: int) -> Shapes:
        """Its tensors, in a model of `hidden` values."""
        shapes = projection_shapes(self.projection) | norm_shapes(hidden, self.norm)
        return shapes | (self.probe.shapes(hidden) if self.probe else {})


Head = LanguageHead | ClassifierHead | SpanHead | HiddenHead | SentenceHead | PooledHead
