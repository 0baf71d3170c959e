# SPDX-License-Identifier: Apache-2.0
"""Show a soft prompt: its kind, sizes, norms and origin, and whether it fits a base."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from surgery.engine.inputs import AdapterLike, CheckpointLike, as_adapter, as_checkpoint
from surgery.prompts.conversion import layout_for
from surgery.prompts.show_result import PromptPart, PromptReport
from surgery.prompts.vocabulary import Vocabulary, component_for, recipe_of, vocabulary_of
from surgery.reports.result import timed
from surgery_formats.adapters.adapterhub.prompts import HUB_PROMPT
from surgery_formats.adapters.soft_prompts import history, soft_prompts
from surgery_formats.arrays import cast
from surgery_formats.binding.bind import warn_of_other_base
from surgery_formats.binding.prompt_fit import check_prompt
from surgery_formats.canonical.prompts import SoftPrompt
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["PromptReport", "prompt_show"]

_UNKNOWN = ("no recipe for this model tells its layers and heads: whether the prompt fits it is not known",)
_SAMPLE = 1024  # tokens whose norms are looked at


@timed
def prompt_show(prompt: AdapterLike, *, base: CheckpointLike | None = None) -> PromptReport:
    """Show what a soft prompt is.

    Args:
        prompt: File or folder of an adapter with virtual tokens, or an opened Adapter.
        base: The model it was trained on: whether it fits is checked, and norms are shown beside its tokens' own.

    Raises:
        InputError: the adapter or the base cannot be read.
        FitError: the adapter has no virtual tokens, or they do not fit the base.
    """
    adapter = as_adapter(prompt, "prompt")
    checkpoint = None if base is None else as_checkpoint(base)
    parts = tuple(_part(name, part, checkpoint) for name, part in soft_prompts(adapter).items())
    return PromptReport(
        adapter.path,
        adapter.format,
        adapter.kind,
        parts,
        adapter.parameters,
        sum(file.size for file in adapter.files),
        adapter.base_name,
        history(adapter),
        None if checkpoint is None else checkpoint.path,
        (
            *adapter.known_issues(),
            *([] if checkpoint is None else warn_of_other_base([adapter], checkpoint)),
            *(_UNKNOWN if checkpoint is not None and not all(part.fits for part in parts) else ()),
        ),
    )


def _part(name: str, prompt: SoftPrompt, checkpoint: Checkpoint | None) -> PromptPart:
    component = None if checkpoint is None else component_for(checkpoint, name)
    model = None if component is None else recipe_of(component)
    layout = prompt.prefix
    hub = prompt.kind == HUB_PROMPT
    if model is not None and layout is not None:
        layout = layout_for(prompt, layout, model)
    elif model is not None and not hub:
        check_prompt(prompt, model)
    elif model is not None and prompt.dim != model.hidden:
        raise FitError(
            f"its virtual tokens have {prompt.dim} values, but the model's states have {model.hidden}",
            file=prompt.table.path,
            tensor=prompt.table.name,
            hint="is this the base it was trained on?",
        )
    fits = model is not None or (component is not None and layout is None and not hub)  # a width needs no recipe
    part = PromptPart(
        name, prompt.virtual_tokens, prompt.dim, prompt.submodules, layout, prompt.table.dtype.label, fits=fits
    )
    if prompt.prefix is not None:
        pairs = [prompt.key_values(layer) for layer in range(prompt.prefix.layers // prompt.submodules)]
        keys, values = (_token_norms(np.stack([pair[which] for pair in pairs])) for which in (0, 1))
        return replace(part, norms=keys, value_norms=values)
    rows = np.concatenate([cast(prompt.embeddings(number), DType.F64) for number in range(prompt.submodules)])
    norms = np.linalg.norm(rows, axis=1)
    compared = None if hub else component
    median = None if compared is None else _median_norm(vocabulary_of(compared, prompt))
    return replace(part, norms=tuple(norms.tolist()), vocabulary_norm=median, alike=_most_alike(rows, norms))


def _token_norms(values: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Of ``(layers, heads, tokens, dim)`` the norm of each token."""
    squares = np.square(values, dtype=np.float64).sum((0, 1, 3))
    return tuple(np.sqrt(squares).tolist())


def _median_norm(vocabulary: Vocabulary) -> float:
    """Of the tokens of a vocabulary, or of many of them."""
    count = min(vocabulary.size, _SAMPLE)
    some = vocabulary.chosen([number * vocabulary.size // count for number in range(count)])
    return float(np.median(np.linalg.norm(some, axis=1)))


def _most_alike(rows: npt.NDArray[np.float64], norms: npt.NDArray[np.float64]) -> float | None:
    """The greatest cosine of two rows; None of one."""
    if len(rows) < 2 or not norms.all():
        return None
    cosines = rows @ rows.T / np.outer(norms, norms)
    return float(cosines[~np.eye(len(rows), dtype=bool)].max())
