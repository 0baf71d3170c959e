# SPDX-License-Identifier: Apache-2.0
"""Which kind of soft prompt can be another, exactly, and which cannot.

Rows before the input are one thing whatever they were trained as: prompt tuning, P-tuning and CPT differ in their files alone.
Rows become keys and values by what the model makes of them; nothing leads back. AdapterHub's prefixes become PEFT's by turning
their keys; its prompts go behind the embeddings, where PEFT has nothing. A textual inversion has the same rows, and stands
elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from surgery.prompts.made_prompt import MadePrompt
from surgery.prompts.rotation import turned_keys
from surgery.prompts.vocabulary import recipe_of
from surgery_formats.adapters.adapterhub.prompts import HUB_PREFIX, HUB_PROMPT
from surgery_formats.arrays import cast
from surgery_formats.binding.prompt_fit import check_prompt
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.canonical.prompts import Prefix, SoftPrompt
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.component import Component
from surgery_formats.models.families.recipe import Model
from surgery_formats.text import show

__all__ = ["TARGETS", "PromptConversion", "check_alone", "check_positions", "converted", "layout_for", "table_of"]

_ROWS = {"prompt": "PROMPT_TUNING", "p-tuning": "P_TUNING", "cpt": "CPT"}
_INVERSIONS = ("embedding", "learned-embeds")
TARGETS = (*_ROWS, "prefix", "adapterhub", *_INVERSIONS)
"""What a soft prompt can become: kinds of PEFT, AdapterHub's prefix, and the layouts of textual inversions."""
_SAME = "the same rows before the input"


@dataclass(frozen=True)
class PromptConversion:
    """A prompt of another kind.

    Attributes:
        made: The prompt.
        how: What was done.
        exact: Whether a model does with it what it did before.
        warnings: What the user should know.
    """

    made: MadePrompt
    how: str
    exact: bool = True
    warnings: tuple[str, ...] = ()


def table_of(prompt: SoftPrompt) -> np.ndarray:
    """The stored table in float32: rows, or keys and values ``(tokens, 2 * layers * width)``."""
    if prompt.prefix is None:
        rows: np.ndarray = cast(prompt.embeddings(), DType.F32)
        return rows
    pairs = [prompt.key_values(layer) for layer in range(prompt.prefix.layers)]
    table = np.stack([np.asarray(part, np.float32) for pair in pairs for part in pair])  # (2 L, heads, tokens, dim)
    flat: np.ndarray = table.transpose(2, 0, 1, 3).reshape(prompt.virtual_tokens, -1)
    return flat


def check_alone(adapter: Adapter, prompt: SoftPrompt) -> None:
    """Refuse what is more than virtual tokens before one network.

    Raises:
        FitError: weights trained beside them, or tokens for an encoder and its decoder.
    """
    if adapter.prompt is not None and adapter.updates:
        raise FitError(
            f"it also changes {len(adapter.updates)} weights of the model, which no other prompt has",
            file=adapter.path,
        )
    if prompt.submodules > 1:
        raise FitError("the soft prompt is for an encoder and its decoder", file=adapter.path)


def check_positions(adapter: Adapter, prompt: SoftPrompt) -> None:
    """Refuse a prompt of AdapterHub, beside which positions are others than PEFT's.

    Raises:
        FitError: it is one.
    """
    if prompt.kind in (HUB_PREFIX, HUB_PROMPT):
        raise FitError(
            "it is AdapterHub's, which counts positions otherwise", file=adapter.path, hint="convert it to PEFT's first"
        )


def converted(adapter: Adapter, prompt: SoftPrompt, to: str, base: Component | None) -> PromptConversion:
    """`prompt` as `to`, one of `TARGETS`.

    Args:
        adapter: It is of.
        prompt: What to convert.
        to: What to make.
        base: The model it was trained on; needed to make keys and values, or to turn them.

    Raises:
        FitError: nothing of that kind does the same; no base where one is needed, or another.
    """
    if to not in TARGETS:
        raise FitError(f"no kind of soft prompt '{show(to, 40)}'", hint=f"one of {', '.join(TARGETS)}")
    check_alone(adapter, prompt)
    if prompt.kind == HUB_PROMPT:
        raise FitError(
            "AdapterHub puts its prompt behind the embeddings, with their positions and norm, and tokens keep the "
            "positions that they had without it: nothing that is put before the input does the same",
            file=adapter.path,
        )
    if prompt.prefix is not None:
        return _of_prefix(adapter, prompt, prompt.prefix, to, base)
    rows = table_of(prompt)
    name = adapter.base_name
    if to in _INVERSIONS:
        of_inversion = adapter.kind == "TEXTUAL_INVERSION"
        token = str(adapter.config.get("token", "")) if of_inversion else ""
        site = next(iter(adapter.updates)).component if of_inversion else ""
        made = MadePrompt(to, "TEXTUAL_INVERSION", rows, prompt.dim, token=token, component=site)
        return PromptConversion(
            made, _SAME if of_inversion else "the same rows", of_inversion, () if of_inversion else _PLACE
        )
    if to == "adapterhub":
        raise FitError(
            "AdapterHub has no prompt before the input: its own goes behind the embeddings", file=adapter.path
        )
    if to == "prefix":
        return _as_prefix(adapter, prompt, _needed(base))
    made = MadePrompt("peft", _ROWS[to], rows, prompt.dim, base_name=name)
    warnings = (
        "PEFT goes on training it from here only as prompt tuning: what it was trained through is not in files",
    )
    if adapter.kind == "TEXTUAL_INVERSION":
        return PromptConversion(made, "the same rows", False, _PLACE)
    return PromptConversion(made, _SAME, True, warnings if to == "p-tuning" else ())


_PLACE = (
    "the rows are the same, their place is not: a textual inversion stands in the text where its token is written, a prompt "
    "before all of it",
)


def _needed(base: Component | None) -> tuple[Component, Model]:
    if base is None:
        raise FitError("the model decides what keys and values it makes of it", hint="give it with `base=`")
    model = recipe_of(base)
    if model is None:
        raise FitError("no recipe for this model, so that its keys and values are not known", file=base.folder)
    return base, model


def _as_prefix(adapter: Adapter, prompt: SoftPrompt, known: tuple[Component, Model]) -> PromptConversion:
    """What the model makes of the rows, computed once."""
    from surgery.onnx.export.prompt_past import Prompt, WeightLocation, computed_past
    from surgery.onnx.graph.build import GraphOptions
    from surgery.onnx.graph.target import TARGETS as GRAPHS

    base, model = known
    check_prompt(prompt, model)
    sizes = {(layer.attention.kv_heads, layer.attention.head_dim) for layer in model.layers}
    if not model.generates or len(sizes) != 1:
        raise FitError("only decoders whose layers have the same heads take a prefix", file=base.folder)
    ((heads, dim),) = sizes
    rows = Prompt("prompt", prompt.kind, prompt.virtual_tokens, adapter, table_of(prompt))
    options = GraphOptions(GRAPHS["cpu"], DType.F32)
    (past,) = computed_past([rows], base, model, options, WeightLocation(base.folder))
    stacked = np.concatenate(list(past.values()))  # (2 L, heads, tokens, dim)
    table = np.ascontiguousarray(stacked.transpose(2, 0, 1, 3)).reshape(prompt.virtual_tokens, -1)
    prefix = Prefix(len(model.layers), heads, dim)
    made = MadePrompt("peft", "PREFIX_TUNING", table, heads * dim, prefix, adapter.base_name)
    return PromptConversion(made, "the keys and values that the model makes of the rows")


def _of_prefix(
    adapter: Adapter, prompt: SoftPrompt, prefix: Prefix, to: str, base: Component | None
) -> PromptConversion:
    if to not in ("prefix", "adapterhub"):
        raise FitError(
            f"{prompt.kind} holds keys and values of every layer: no rows before the input make a model have these",
            file=adapter.path,
        )
    from_hub = prompt.kind == HUB_PREFIX
    if from_hub == (to == "adapterhub"):
        table, how = table_of(prompt), "the same keys and values"
        if base is not None:
            _, model = _needed(base)
            prefix = layout_for(prompt, prefix, model)
    else:
        base, model = _needed(base)
        prefix = layout_for(prompt, prefix, model)
        positions = prompt.virtual_tokens if from_hub else -prompt.virtual_tokens
        table = turned_keys(table_of(prompt), model, positions)
        how = f"the keys turned by {abs(positions)} positions, which the two programs count differently"
    if to == "adapterhub":
        base, _ = _needed(base)
        made = MadePrompt(to, HUB_PREFIX, table, prompt.dim, prefix, adapter.base_name, base=base)
    else:
        made = MadePrompt("peft", "PREFIX_TUNING", table, prompt.dim, prefix, adapter.base_name)
    return PromptConversion(made, how)


def layout_for(prompt: SoftPrompt, prefix: Prefix, model: Model) -> Prefix:
    """The layout, by the model's heads where the file does not tell them.

    Raises:
        FitError: another base.
    """
    if prompt.kind != HUB_PREFIX:
        check_prompt(prompt, model)
        return prefix
    sizes = {layer.attention.kv_heads * layer.attention.head_dim for layer in model.layers}
    if len(model.layers) != prefix.layers or sizes != {prompt.dim}:
        raise FitError(
            f"was made for {prefix.layers} layers with keys of {prompt.dim} values",
            file=prompt.table.path,
            hint="is this the base it was trained on?",
        )
    attention = model.layers[0].attention
    return Prefix(prefix.layers, attention.kv_heads, attention.head_dim)
