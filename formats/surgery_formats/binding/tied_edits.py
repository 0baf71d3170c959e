# SPDX-License-Identifier: Apache-2.0
"""What happens to a tied head and embedding when an adapter changes one of them.

The merged model must do what the base does with the adapter attached. A LoRA on the embedding then leaves the head
alone, though both are one tensor on disk. So either both get the same update and stay tied, or the output stores them
as two tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from surgery_formats.arrays import cast
from surgery_formats.binding.edits import Edit
from surgery_formats.binding.operation import Operation
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.component import Component
from surgery_formats.storage.base import Storage, read_rows
from surgery_formats.updates import is_row_setting, same_update

__all__ = ["same_values", "settle_tie"]

Edits = dict[tuple[str, str], Edit]


def settle_tie(
    edits: Mapping[tuple[str, str], Edit], component: Component, keeping: frozenset[int] = frozenset()
) -> tuple[Edits, bool]:
    """Decide how the tied head and embedding of a component are edited.

    Args:
        edits: Edits by ``(component, tensor)``.
        component: A component of the base.
        keeping: Indices of the adapters whose updates of the embedding also apply to a tied head.

    Returns:
        The edits, and whether head and embedding become two tensors (``tie_word_embeddings`` becomes false).

    Raises:
        FitError: head and embedding would have to become two tensors, and the family does not allow it.
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
        and (head is None or _same_edit(embedding, head))
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
            f"only one of the tied '{component.head}' and '{component.embedding}' was trained: "
            f"{component.family.inseparable}",
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
    return _with_biases(settled, component), True


def _with_biases(settled: Edits, component: Component) -> Edits:
    """Biases that the class ties too: transformers looks for all of them as soon as the weights are parted."""
    for alias, source in component.aliases.items():
        if alias.endswith(".bias") and alias not in component.parameters:
            known = settled.get((component.name, source))
            base = component.parameters[source].storage
            bias = known or Edit(component.name, alias, base, (), why="was tied, keeps its values")
            settled = {(component.name, alias): replace(bias, name=alias, added=True), **settled}
    return settled


def _head_follows(embedding: Edit, component: Component, keeping: frozenset[int]) -> bool:
    """Whether a tied head gets the edit of the embedding too.

    It does for trained token rows and for a resized vocabulary: transformers ties the weights again on load.
    """
    if embedding.operations:
        return all(
            is_row_setting(operation.update) or operation.adapter in keeping for operation in embedding.operations
        )
    if embedding.replaced is not None and embedding.replaced.adapter in keeping:
        return True
    return embedding.source.sizes[0] != component.parameters[component.embedding].sizes[0]


def _same_edit(embedding: Edit, head: Edit) -> bool:
    """Whether the edits of embedding and head give the same values (PEFT's ``ensure_weight_tying`` stores both)."""
    if len(embedding.operations) != len(head.operations) or bool(embedding.replaced) != bool(head.replaced):
        return False
    if embedding.replaced and not same_values(embedding.source, head.source):
        return False
    return all(_same_operation(a, b) for a, b in zip(embedding.operations, head.operations, strict=True))


def _same_operation(first: Operation, second: Operation) -> bool:
    place = (first.view, first.adapter, first.share) == (second.view, second.adapter, second.share)
    return place and same_update(first.update, second.update)


def same_values(first: Storage, second: Storage, rows: int = 4096) -> bool:
    """Whether two weights have the same values, whatever types they are stored in; reads `rows` rows at a time."""
    if first.sizes != second.sizes:
        return False
    count = first.sizes[0] if first.sizes else 1
    step = max(1, min(rows, count))
    return all(
        bool((cast(read_rows(first, start, end), DType.F64) == cast(read_rows(second, start, end), DType.F64)).all())
        for start, end in ((start, start + step) for start in range(0, count, step))
    )
