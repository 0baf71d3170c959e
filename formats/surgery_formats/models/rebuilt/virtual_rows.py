# SPDX-License-Identifier: Apache-2.0
"""A checkpoint whose vocabulary has rows for virtual tokens, which are read and never said.

Only the token embedding gets the rows. The head's are the mean of all its others: their logit is the mean of the logits, and so
never the greatest, and their probability at most one in the size of the vocabulary. A head that is tied to the embedding has to
be parted from it for that.
"""

from __future__ import annotations

from dataclasses import replace

from surgery_formats.errors import FitError
from surgery_formats.files.raw import FileRange, joined_file, nameless_file
from surgery_formats.models.component import Component
from surgery_formats.models.rebuilt.rebuilt import Rebuilt, one_network, with_shards
from surgery_formats.models.rebuilt.vocabulary import mean_row, vocabulary_size, vocabulary_tensors, with_size
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["with_virtual_rows"]


def with_virtual_rows(rebuilt: Rebuilt, rows: bytes, count: int, first: int, *, keep_tie: bool = False) -> Rebuilt:
    """`rebuilt` with `count` rows from token `first` on: in place of rows that no token has, else behind all others.

    Args:
        rebuilt: What has been made so far.
        rows: Of the embedding, in its stored type.
        count: How many.
        first: Id of the first.
        keep_tie: Leave a tied head tied, so that the rows are the head's, too.

    Raises:
        FitError: rows that are stored as codes, or would leave a gap.
    """
    component = one_network(rebuilt.checkpoint)
    size = vocabulary_size(component)
    if not 0 <= first <= size:
        raise FitError(
            f"token {first} would leave a gap behind the {size} rows of the vocabulary", file=component.folder
        )
    names = vocabulary_tensors(component, size)
    if component.embedding not in names:
        raise FitError("its token embedding is stored as codes", file=component.folder, tensor=component.embedding)
    shares = {name for name in names if _is_embedding(name, component)} if keep_tie else {component.embedding}
    shards = []
    for shard in component.shards:
        tensors = []
        for tensor in shard.tensors:
            if tensor.name in names:
                data = rows if tensor.name in shares else mean_row(tensor) * count
                tensor = _with_rows(tensor, data, count, first)
            tensors.append(tensor)
        shards.append((shard, tensors))
    config = with_size(component.config, size, max(size, first + count))
    origins = dict(rebuilt.origins)
    parted = not keep_tie and component.tied and bool(component.head)
    if parted:
        embedding = component.tensors[component.embedding]
        if component.head not in component.tensors:
            head = _with_rows(replace(embedding, name=component.head), mean_row(embedding) * count, count, first)
            shards[-1][1].append(head)
            origins[component.head] = origins[component.embedding]
        inner = config.get("text_config")
        holder = inner if "tie_word_embeddings" not in config and isinstance(inner, dict) else config
        holder["tie_word_embeddings"] = False
    facts = {"virtual_tokens": {"first": first, "count": count, "before": size, "parted": parted}}
    return with_shards(rebuilt, shards, config, facts, origins=origins)


def _is_embedding(name: str, component: Component) -> bool:
    return name == component.embedding or component.aliases.get(name) == component.embedding


def _with_rows(tensor: StoredTensor, data: bytes, count: int, first: int) -> StoredTensor:
    """`tensor` with `data` for the rows from `first` on."""
    row = tensor.nbytes // tensor.shape[0]
    pieces = [FileRange(tensor.file, tensor.offset, first * row)] if first else []
    pieces.append(FileRange(nameless_file(data, tensor.path), 0, len(data)))
    if (behind := first + count) < tensor.shape[0]:
        pieces.append(FileRange(tensor.file, tensor.offset + behind * row, (tensor.shape[0] - behind) * row))
    height = max(tensor.shape[0], behind)
    return replace(
        tensor,
        shape=(height, *tensor.shape[1:]),
        file=joined_file(pieces, tensor.name),
        offset=0,
        nbytes=height * row,
    )
