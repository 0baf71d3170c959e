# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of a model as points of its input space: rows of the token embedding, read a block at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery_formats.adapters.adapterhub.prompts import HUB_PROMPT
from surgery_formats.arrays import cast
from surgery_formats.canonical.prompts import SoftPrompt
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.files.bounded_json import TOKENIZER_LIMIT, read_object
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.families.parameters import model_of
from surgery_formats.models.families.recipe import Model
from surgery_formats.storage.base import Storage, read_rows

__all__ = [
    "Vocabulary",
    "component_for",
    "input_vocabulary",
    "recipe_of",
    "spelling_of",
    "spelt_tokens",
    "vocabulary_of",
]

Rows = npt.NDArray[np.float32]
_BLOCK = 1 << 22  # elements of the embedding in memory
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Vocabulary:
    """Rows of a token embedding, as the first layer gets them.

    Attributes:
        storage: The embedding.
        scale: What the model multiplies its rows by, and no embedding from elsewhere: Gemma's root of the width.
        told: Whether `scale` comes from a recipe of the model; else it is taken to be 1.
    """

    storage: Storage
    scale: float
    told: bool = True

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.storage.sizes[0]

    @property
    def width(self) -> int:
        """Numbers per row."""
        return self.storage.sizes[1]

    def rows(self, start: int, stop: int) -> Rows:
        """Rows ``[start, stop)`` in float32."""
        values: Rows = cast(read_rows(self.storage, start, stop), DType.F32)
        return values if self.scale == 1 else values * np.float32(self.scale)

    def blocks(self, most: int) -> Iterator[tuple[int, Rows]]:
        """All rows in order, in blocks of at most `most`, each with the number of its first."""
        height = max(1, min(most, _BLOCK // self.width))
        for start in range(0, self.size, height):
            yield start, self.rows(start, min(start + height, self.size))

    def chosen(self, ids: Sequence[int]) -> Rows:
        """Some rows, in the order of `ids`."""
        found = {row: self.rows(row, row + 1)[0] for row in sorted(set(ids))}
        return np.stack([found[row] for row in ids])


def spelling_of(folder: Path) -> dict[int, str]:
    """Tokens as the tokenizer in `folder` spells them, by id; empty without a ``tokenizer.json``."""
    file = folder / TOKENIZER
    return spelt_tokens(read_object(file, TOKENIZER_LIMIT)) if file.is_file() else {}


def spelt_tokens(tokenizer: dict[str, Any]) -> dict[int, str]:
    """The tokens of a ``tokenizer.json``, by id, as its model spells them: with its marks for spaces and bytes."""
    model = tokenizer.get("model")
    listed = model.get("vocab") if isinstance(model, dict) else None
    found: dict[int, str] = {}
    if isinstance(listed, dict):
        found = {number: token for token, number in listed.items() if isinstance(number, int)}
    elif isinstance(listed, list):  # Unigram: pairs of a token and its score
        found = {n: pair[0] for n, pair in enumerate(listed) if isinstance(pair, list) and pair}
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int) and isinstance(token.get("content"), str):
            found[token["id"]] = token["content"]
    return {number: token if isinstance(token, str) else json.dumps(token) for number, token in found.items()}


def component_for(checkpoint: Checkpoint, name: str) -> Component:
    """The network of `checkpoint` that virtual tokens for its part `name` go before.

    Raises:
        FitError: it has no such part.
    """
    found = checkpoint.component(name)
    if found is None:
        raise FitError(f"the base has no '{name}'", file=checkpoint.path, hint="is this the base it was trained on?")
    return found


def recipe_of(component: Component) -> Model | None:
    """What the model computes; None where that is not known."""
    try:
        return model_of(component.config, component.parameters.keys())
    except FitError:
        return None


def vocabulary_of(component: Component, prompt: SoftPrompt) -> Vocabulary:
    """The vocabulary that virtual tokens of `prompt` lie among.

    Raises:
        FitError: keys and values, which lie among no tokens; no embedding, or one of another width.
    """
    file, tensor = prompt.table.path, prompt.table.name
    if prompt.prefix is not None:
        raise FitError(
            f"{prompt.kind} holds keys and values of every layer and no tokens: nothing of the vocabulary can be near them",
            file=file,
            tensor=tensor,
            hint="ask for what they do: `by=effect`",
        )
    if prompt.kind == HUB_PROMPT:
        raise FitError(
            "AdapterHub's prompts go behind the embeddings, with their positions and norm: tokens are not there",
            file=file,
            tensor=tensor,
        )
    found = input_vocabulary(component)
    if found.width != prompt.dim:
        raise FitError(
            f"its virtual tokens have {prompt.dim} values, but the base's tokens have {found.width}",
            file=file,
            tensor=tensor,
            hint="is this the base it was trained on?",
        )
    return found


def input_vocabulary(component: Component) -> Vocabulary:
    """The vocabulary of a model.

    Raises:
        FitError: no embedding, or codes that are not read.
    """
    component.check_read()
    if not component.embedding:
        raise FitError("the base's token embedding is not found", file=component.folder)
    storage = component.parameters[component.embedding].storage
    if len(storage.sizes) != 2:
        raise FitError("the base's token embedding is no matrix", file=component.folder, tensor=storage.name)
    model = recipe_of(component)
    if model is None or not model.embedding.scale_rounded:  # a scale that is not part of the table scales all inputs
        return Vocabulary(storage, 1.0, model is not None)
    return Vocabulary(storage, _rounded(model.embedding.scale, storage.dtype))


def _rounded(scale: float, dtype: DType) -> float:
    """`scale` in the type that the table is stored in, as the model has it."""
    return float(cast(np.asarray([scale], np.float64), dtype).astype(np.float64)[0]) if dtype.is_float else scale
