# SPDX-License-Identifier: Apache-2.0
"""What becomes of tied embeddings when one side was trained.

The truth is what the adapter does while attached: a LoRA on the embedding leaves the head alone, though both are one tensor on disk. So
either both sides get the same update and stay tied (never added twice), or they part and the output stores both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from surgery_formats.binding.edits import Edit, Operation
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Component
from surgery_formats.storage.base import Storage, read_rows
from surgery_formats.updates import LoRA, TokenRows, Update

__all__ = ["same_values", "settle_tie"]

Edits = dict[tuple[str, str], Edit]


def settle_tie(
    edits: Mapping[tuple[str, str], Edit], component: Component, keeping: frozenset[int] = frozenset()
) -> tuple[Edits, bool]:
    """`edits` with the component's head and embedding settled.

    Args:
        edits: By ``(component, tensor)``.
        component: Of the base.
        keeping: Numbers of the adapters whose updates of the embedding are meant for a tied head too.

    Returns:
        The edits, and whether head and embedding part (``tie_word_embeddings`` becomes false).

    Raises:
        FitError: they would have to part, and this family's cannot.
    """
    settled = dict(edits)
    if not (component.tied and component.embedding and component.head):
        return settled, False
    embedding_key, head_key = (component.name, component.embedding), (component.name, component.head)
    embedding, head = settled.get(embedding_key), settled.get(head_key)
    stored_twice = component.head in component.parameters
    if embedding is None and head is None:
        return settled, False
    if (
        embedding is not None
        and (head is None or _same(embedding, head))
        and (head is not None or _head_follows(embedding, component, keeping))
    ):
        settled.pop(head_key, None)
        if stored_twice:  # the copy on disk must not contradict the embedding
            source = embedding.source if embedding.replaced else component.parameters[component.head].storage
            settled[head_key] = replace(embedding, name=component.head, source=source, why="tied to the embedding")
        return settled, False
    if component.family.inseparable:
        changed = head or embedding
        assert changed is not None
        raise FitError(
            f"only one of the tied '{component.head}' and '{component.embedding}' was trained: {component.family.inseparable}",
            tensor=changed.name,
            hint="keep this adapter unmerged",
        )
    if not stored_twice:
        base = component.parameters[component.embedding].storage
        if head is None and embedding is not None:
            grown = embedding.source.sizes != base.sizes  # then only the adapter has all its rows
            source = embedding.source if grown else base
            head = Edit(component.name, component.head, source, (), why="was tied to the embedding, keeps its values")
        if head is not None:
            settled[head_key] = replace(head, added=True)
    return settled, True


def _head_follows(embedding: Edit, component: Component, keeping: frozenset[int]) -> bool:
    """Trained token rows and a resized vocabulary are shared with a tied head (transformers ties them again on load)."""
    if embedding.operations:
        return all(
            isinstance(operation.update, TokenRows) or operation.adapter in keeping
            for operation in embedding.operations
        )
    if embedding.replaced is not None and embedding.replaced.adapter in keeping:
        return True
    return embedding.source.sizes[0] != component.parameters[component.embedding].sizes[0]


def _same(one: Edit, other: Edit) -> bool:
    """Whether two edits come to the same values (PEFT's ``ensure_weight_tying`` stores both)."""
    if len(one.operations) != len(other.operations) or bool(one.replaced) != bool(other.replaced):
        return False
    if one.replaced and not same_values(one.source, other.source):
        return False
    return all(_same_operation(a, b) for a, b in zip(one.operations, other.operations, strict=True))


def _same_operation(one: Operation, other: Operation) -> bool:
    return (one.view, one.adapter, one.share) == (other.view, other.adapter, other.share) and _same_update(
        one.update, other.update
    )


def _same_update(one: Update, other: Update) -> bool:
    import torch

    if isinstance(one, TokenRows) and isinstance(other, TokenRows):
        same = one.indices == other.indices and one.value.shape == other.value.shape
        return same and torch.equal(one.value.load(torch.float64), other.value.load(torch.float64))
    if (
        isinstance(one, LoRA)
        and isinstance(other, LoRA)
        and (one.shape, one.rank, one.scale) == (other.shape, other.rank, other.scale)
    ):
        return all(
            torch.equal(a.load(torch.float64), b.load(torch.float64)) for a, b in ((one.A, other.A), (one.B, other.B))
        )
    return False


def same_values(one: Storage, other: Storage, rows: int = 4096) -> bool:
    """Whether two weights have the same values, whatever their types; a few rows at a time."""
    if one.sizes != other.sizes:
        return False
    count = one.sizes[0] if one.sizes else 1
    step = max(1, min(rows, count))
    return all(
        bool((read_rows(one, at, at + step).double() == read_rows(other, at, at + step).double()).all())
        for at in range(0, count, step)
    )
