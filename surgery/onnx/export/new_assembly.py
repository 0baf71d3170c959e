# SPDX-License-Identifier: Apache-2.0
"""The assembly of a base and its adapters, each in its role: recipe, slots, prompts, inserted modules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.onnx.export.adapters import AdapterRoles
from surgery.onnx.export.assemble import Assembly, prompt_form
from surgery.onnx.export.inserted import baked_modules
from surgery.onnx.export.pairs import check_pair
from surgery.onnx.export.prompt_past import Prompt, of_adapter, unique
from surgery.onnx.export.tied_head import check_tied_head
from surgery.onnx.graph.build import GraphOptions
from surgery.onnx.graph.contract import TEXT
from surgery.onnx.graph.target import choose, io_type
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.families.parameters import model_of
from surgery_formats.models.families.recipe import Model

if TYPE_CHECKING:
    from surgery.onnx.export.merged import MergedWeights
    from surgery.onnx.export.slots import Swappable

__all__ = ["new_assembly"]


def new_assembly(
    checkpoint: Checkpoint,
    roles: AdapterRoles,
    merged: MergedWeights | None,
    task: str,
    target: str,
    dtype: str,
    max_length: int | None,
    texts: tuple[str, ...],
    form: str,
) -> Assembly:
    """The base, its recipe, and what adapters and texts add to the graphs.

    Args:
        checkpoint: The base.
        roles: The adapters.
        merged: The weights that are computed, or None.
        task: What the graph is for; empty for what the model was saved for.
        target: The operators, by name.
        dtype: The type of the graph, by name.
        max_length: Longest sequence; None for as long as the model was made for.
        texts: Texts to read in advance.
        form: Of soft prompts, as it is asked for.

    Raises:
        InputError: an adapter or the tokenizer cannot be read.
        FitError: an architecture without a recipe; an adapter that its role cannot hold; roles that exclude each other.
    """
    component = merged.component if merged else checkpoint.main
    overrides = merged.overrides if merged else {}
    io = io_type(target, dtype, checkpoint.main.dtype)
    model = merged.model if merged else model_of(component.config, frozenset(component.parameters), task)
    check_tied_head(checkpoint.main, model)
    slots, given = _slots(checkpoint, roles, model), component
    check_pair(model, texts=texts, modules=bool(roles.insert) or any(adapter.modules for adapter in slots))
    prompts = [of_adapter(named.name, named.adapter, model) for named in roles.prefix]
    for text in texts:
        if not model.generates:
            raise FitError("a text has nothing to be read into: this model has no cache")
        name = unique([prompt.name for prompt in prompts], "text")
        ids = _ids(checkpoint.main.folder, text)
        prompts.append(Prompt(name, TEXT, len(ids), ids=ids))
    coded = merged.coded if merged else {}
    operators = choose(target, io)
    if merged is not None and merged.across:
        operators = replace(operators, linear="matmul")
    options = GraphOptions(operators, io, max_length, overrides=overrides, coded=coded)
    form = prompt_form(form, tuple(prompts), model)
    baked = baked_modules(roles.insert)
    if baked is not None:
        options = replace(options, overrides={**overrides, **baked.overrides})
    if prompts and (baked is not None or any(adapter.modules for adapter in slots)):
        raise FitError("soft prompts beside modules that an adapter inserts: export them apart")
    if any(adapter.replaced for adapter in slots):
        from surgery.onnx.export.replaced import headed

        component, model = headed(component, model, [(slot.adapter, slot.replaced) for slot in slots], task)
    return Assembly(
        component, model, options, roles, slots, tuple(prompts), form, component.config != given.config, baked
    )


def _slots(checkpoint: Checkpoint, roles: AdapterRoles, model: Model) -> tuple[Swappable, ...]:
    if not roles.swap:
        return ()
    from surgery.onnx.export.slots import swappable

    return tuple(swappable(named, checkpoint, model) for named in roles.swap)


def _ids(folder: Path, text: str) -> tuple[int, ...]:
    from surgery.onnx.run.tokenizer import open_tokenizer

    ids = tuple(open_tokenizer(folder).encode(text))
    if not ids:
        raise FitError("the text to bake in is empty")
    return ids
