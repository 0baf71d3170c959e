# SPDX-License-Identifier: Apache-2.0
"""A checkpoint, and adapters attached to it, computed by the reference.

What is attached is in float32 from the adapter's numbers to the logits: no weight is rounded to the base's type, as in a
merge. A model's own weights are used as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from surgery.engine.inputs import AdaptersLike
from surgery.engine.merge.merge_plan import plan_merge
from surgery.evaluation.predictor import no_decoder
from surgery.onnx.export.adapters import AdapterRoles, sort_adapters
from surgery.reference import Cache, Reference, forward, open_reference
from surgery_formats.arrays import as_torch
from surgery_formats.binding.bind import bind
from surgery_formats.binding.prompt_fit import check_prompt
from surgery_formats.canonical.prompts import SoftPrompt
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["ReferencePredictor", "open_reference_predictor"]


@dataclass(frozen=True)
class ReferencePredictor:
    """See `surgery.evaluation.predictor.Predictor`.

    Attributes:
        path: The checkpoint.
        adapters: What was attached.
        folder: Where tokenizer and configuration are.
        warnings: Of the adapters.
        reference: The model, with what changes its weights.
        virtual: ``(n, D)``: a soft prompt's embeddings, or None.
        past: A soft prompt's keys and values for one row, or None.
    """

    path: Path
    adapters: tuple[str, ...]
    folder: Path
    warnings: tuple[str, ...]
    reference: Reference
    virtual: torch.Tensor | None = None
    past: Cache | None = None

    @property
    def computed_by(self) -> str:
        """Always the reference."""
        return "reference"

    @property
    def vocabulary(self) -> int:
        """Rows of the token table."""
        return self.reference.model.vocabulary

    @property
    def room(self) -> int:
        """The model's positions without those of a soft prompt."""
        taken = 0 if self.virtual is None else len(self.virtual)
        return self.reference.model.max_positions - (taken if self.past is None else self.past.real.shape[1])

    def logits(self, rows: npt.NDArray[np.int64], done: Callable[[float], None]) -> npt.NDArray[Any]:
        """``(B, S, V)`` in float32 after every token of `rows`, layer by layer."""
        layers = len(self.reference.model.layers)
        past = None if self.past is None else self.past.expand(len(rows))
        output = forward(
            self.reference,
            torch.from_numpy(rows),
            past=past,
            virtual=self.virtual,
            done=lambda layer: done(layer / layers),
        )
        found: npt.NDArray[Any] = output.logits[:, -rows.shape[1] :].numpy()
        return found


def open_reference_predictor(checkpoint: Checkpoint, adapters: AdaptersLike) -> ReferencePredictor:
    """Open a checkpoint with adapters attached to it.

    Raises:
        FitError: no decoder, no recipe for it, an adapter that does not fit, or one that inserts modules.
        InputError: something cannot be read.
    """
    roles = sort_adapters(adapters)
    if roles.insert:
        raise FitError(
            "inserts modules, which the reference of a checkpoint has not",
            file=roles.insert[0].adapter.path,
            hint="`surgery export-onnx` puts them into a graph: evaluate that",
        )
    if len(roles.prefix) > 1:
        raise FitError("a model has one soft prompt, which is the first", file=roles.prefix[1].adapter.path)
    binding = bind(roles.merged, checkpoint, new_biases=True) if roles.merged else None
    reference = open_reference(checkpoint.main, None if binding is None else plan_merge(binding, dtype=DType.F32))
    model = reference.model
    if not model.generates or model.encoder is not None or model.embedding.patches is not None:
        raise no_decoder(checkpoint.path)
    virtual, past = None, None
    if roles.prefix and (prompt := roles.prefix[0].adapter.prompt) is not None:
        check_prompt(prompt, model)
        virtual, past = _in_front(prompt)
    return ReferencePredictor(
        checkpoint.path,
        tuple(_attached(roles)),
        checkpoint.main.folder,
        () if binding is None else tuple(binding.warnings),
        reference,
        virtual,
        past,
    )


def _attached(roles: AdapterRoles) -> list[str]:
    named = [*roles.merge, *roles.prefix]
    return [f"{one.adapter.path}{'' if one.weight == 1 else f'={one.weight:g}'}" for one in named]


def _in_front(prompt: SoftPrompt) -> tuple[torch.Tensor | None, Cache | None]:
    if prompt.prefix is None:
        return as_torch(prompt.embeddings()).float(), None
    pairs = [prompt.key_values(layer) for layer in range(prompt.prefix.layers)]
    layers = tuple((as_torch(key)[None].float(), as_torch(value)[None].float()) for key, value in pairs)
    return None, Cache(layers, torch.ones(1, layers[0][0].shape[2], dtype=torch.bool))
