# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with another vocabulary: rows of the embedding, the head and its bias left out, or added.

Rows that are added are the mean of all others: their logit is the mean of the logits, and so never the greatest, which a
row of zeros would often be.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, NothingChangedError
from surgery_formats.files.raw import FileRange, joined_file, nameless_file
from surgery_formats.models.component import Component
from surgery_formats.models.rebuilt.rebuilt import Dropped, Rebuilt, one_network, with_shards
from surgery_formats.storage.base import read_values
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.tensor import StoredTensor, as_bytes
from surgery_formats.text import listing

__all__ = ["mean_row", "vocabulary_size", "vocabulary_tensors", "with_rows", "with_size"]

_BLOCK = 1 << 20  # elements read at a time for the mean
_MOST = 1 << 24  # rows of an output


def vocabulary_size(component: Component) -> int:
    """Rows of the token embedding.

    Raises:
        FitError: no embedding is known.
    """
    if not component.embedding:
        raise FitError("its token embedding is not known", file=component.folder)
    return component.parameters[component.embedding].sizes[0]


def with_rows(rebuilt: Rebuilt, kept: Sequence[int] | range, added: int = 0) -> Rebuilt:
    """`rebuilt` with these rows of its vocabulary, in this order, and `added` ones behind them.

    Side files and ids of tokens in configurations stay: they are the caller's.

    Args:
        rebuilt: What has been made so far.
        kept: Ids.
        added: Rows of the mean.

    Raises:
        FitError: no embedding is known; its rows are codes; another tensor has as many rows and is not known.
        NothingChangedError: these are all, and none is added.
    """
    component = one_network(rebuilt.checkpoint)
    size = vocabulary_size(component)
    if not added and len(kept) == size and all(old == new for new, old in enumerate(kept)):
        raise NothingChangedError(
            f"nothing would change: the vocabulary has these {size} rows already", file=component.folder
        )
    if len(kept) + added > _MOST:
        raise FitError(f"{len(kept) + added} rows are more than {_MOST}")
    names = vocabulary_tensors(component, size)
    gone = size - len(kept)
    dropped: list[Dropped] = []
    made: dict[object, StoredTensor] = {}
    shards = []
    for shard in component.shards:
        tensors = []
        for tensor in shard.tensors:
            if tensor.name in names:
                first = made.setdefault(tensor.place, _cut(tensor, kept, added))  # tied tensors stay tied
                made[tensor.name] = replace(first, name=tensor.name)
                if gone:
                    dropped += [
                        Dropped(one, f"{gone} of its rows are left out") for one in rebuilt.origins[tensor.name]
                    ]
            tensors.append(made.get(tensor.name, tensor))
        shards.append((shard, tensors))
    facts: dict[str, dict[str, Any]] = {
        "vocabulary": {"before": size, "after": len(kept) + added, "kept": len(kept), "added": added}
    }
    if list(kept) != list(range(len(kept))):
        facts["vocabulary"]["ids"] = hashlib.sha256(repr(tuple(kept)).encode()).hexdigest()
    config = with_size(component.config, size, len(kept) + added)
    return with_shards(rebuilt, shards, config, facts, dropped=dropped, origins=rebuilt.origins)


def vocabulary_tensors(component: Component, size: int) -> set[str]:
    """Stored tensors with a row for each token.

    Raises:
        FitError: one that is stored as codes; or a tensor that has as many rows and is not known.
    """
    for name in (component.embedding, component.head):
        if name in component.parameters and component.parameters[name].storage.elements is None:
            raise FitError("its rows are stored as codes", file=component.folder, tensor=name)
    family = component.family
    known = {component.embedding, component.head, component.aliases.get(component.head, "")}
    known |= {f"{family.head}.bias", "cls.predictions.bias", "lm_head.bias", "final_logits_bias"}
    known |= {name for tie in component.family.ties for name in tie}
    names, others = set(), []
    for name, tensor in component.tensors.items():
        if not tensor.shape or tensor.shape[0] != size:
            continue
        if name in known or component.aliases.get(name) in known:
            names.add(name)
        elif size not in _other_sizes(component):
            others.append(name)
    if others:
        raise FitError(
            f"has as many rows as the vocabulary, and is not known: {listing(others)}", file=component.folder
        )
    for name in names:
        if component.owners[name].elements is None or component.tensors[name].strides is not None:
            raise FitError("its rows are stored as codes", file=component.folder, tensor=name)
    return names


def _other_sizes(component: Component) -> set[int]:
    """Numbers of the configuration that are not the vocabulary's."""
    config = {**component.config, **(inner if isinstance(inner := component.config.get("text_config"), dict) else {})}
    return {value for key, value in config.items() if type(value) is int and "vocab" not in key}


def _cut(tensor: StoredTensor, kept: Sequence[int] | range, added: int) -> StoredTensor:
    """The rows as ranges of the file, those that lie one behind the other as one."""
    row = tensor.nbytes // tensor.shape[0]
    runs: list[list[int]] = []
    for number in kept:
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    pieces = [FileRange(tensor.file, tensor.offset + first * row, (stop - first) * row) for first, stop in runs]
    if added:
        mean = mean_row(tensor)
        together = min(added, max(1, _BLOCK // max(row, 1)))
        means = nameless_file(mean * together, tensor.path)
        pieces += [FileRange(means, 0, means.size)] * (added // together)
        if rest := added % together:
            pieces.append(FileRange(means, 0, rest * row))
    rows = len(kept) + added
    if len(pieces) == 1:
        return replace(tensor, shape=(rows, *tensor.shape[1:]), offset=pieces[0].offset, nbytes=rows * row)
    return replace(
        tensor, shape=(rows, *tensor.shape[1:]), file=joined_file(pieces, tensor.name), offset=0, nbytes=rows * row
    )


def mean_row(tensor: StoredTensor) -> bytes:
    """The mean of all rows, rounded once to the stored type; reads the tensor."""
    from surgery_formats.arrays import cast

    if not tensor.dtype.is_float:
        raise FitError("its rows are no numbers", file=tensor.path, tensor=tensor.name)
    storage = Plain.of(tensor)
    rows, width = storage.shape
    step = max(1, _BLOCK // max(width, 1))
    total: Any = 0.0
    for start in range(0, rows, step):
        total = total + read_values(storage, start, min(start + step, rows), DType.F64).sum(axis=0)
    return bytes(as_bytes(cast(total / rows, tensor.dtype)))


def with_size(given: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """A copy of a configuration, that of its text model included, with a vocabulary of another size."""
    config = copy.deepcopy(dict(given))
    inner = config.get("text_config")
    holders = [config, inner] if isinstance(inner, dict) else [config]
    for holder in holders:
        if holder.get("vocab_size") == before:
            holder["vocab_size"] = after
    return config
