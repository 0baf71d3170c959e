# SPDX-License-Identifier: Apache-2.0
"""A checkpoint whose tensors are ranges of another's files, under other names: nothing of it is written yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery_formats.containers.base import Shard
from surgery_formats.containers.sharded import shard_names
from surgery_formats.errors import FitError
from surgery_formats.files.raw import FileRange, joined_file
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["Dropped", "Rebuilt", "copy_of", "one_network", "rebuilt_of", "with_configs", "with_shards"]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A tensor, or a part of one, that the result does not have, and why."""

    tensor: StoredTensor
    why: str


@dataclass(frozen=True)
class Rebuilt:
    """A checkpoint made of another.

    Attributes:
        base: The other.
        checkpoint: What was made of it; it can be merged into, exported, written.
        facts: By what: the options, and what became of them, as JSON has it.
        dropped: Tensors that are gone.
        origins: By name of a tensor: those of the base whose bytes it has.
        warnings: What the user should know.
        side_files: By name: side files that say something else now, in place of the base's; None for one that is left out.
    """

    base: Checkpoint
    checkpoint: Checkpoint
    facts: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[Dropped, ...] = ()
    origins: Mapping[str, tuple[StoredTensor, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    side_files: Mapping[str, bytes | None] = field(default_factory=dict)


def rebuilt_of(checkpoint: Checkpoint) -> Rebuilt:
    """The checkpoint as it is, for changes to begin with."""
    tensors = checkpoint.main.tensors if not checkpoint.is_pipeline else {}
    return Rebuilt(checkpoint, checkpoint, origins={name: (tensor,) for name, tensor in tensors.items()})


def one_network(checkpoint: Checkpoint) -> Component:
    """The network of a plain model whose files can be written anew.

    Raises:
        FitError: a pipeline, or files that carry the model's configuration.
    """
    component = checkpoint.main
    if component.self_contained:
        raise FitError(
            "its configuration lies in the weight file, which is not written anew with other layers or sizes",
            file=component.shards[0].path,
            hint="take the model's Hugging Face folder, and convert the result with llama.cpp",
        )
    return component


def copy_of(tensor: StoredTensor, name: str) -> StoredTensor:
    """The same bytes as a tensor of their own, and not a tie."""
    piece = FileRange(tensor.file, tensor.offset, tensor.nbytes)
    return replace(tensor, name=name, file=joined_file([piece], name), offset=0)


def with_shards(
    rebuilt: Rebuilt,
    shards: Sequence[tuple[Shard, Sequence[StoredTensor]]],
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    dropped: Sequence[Dropped] = (),
    origins: Mapping[str, tuple[StoredTensor, ...]],
    warnings: Sequence[str] = (),
) -> Rebuilt:
    """`rebuilt` with other tensors in its shards, and another configuration.

    Args:
        rebuilt: What has been made so far.
        shards: Each with the tensors that it has now; those without any are left out.
        config: config.json.
        facts: What was done now.
        dropped: What is gone now.
        origins: As `Rebuilt.origins`, of all tensors.
        warnings: More of them.
    """
    component = rebuilt.checkpoint.main
    left = [(shard, tensors) for shard, tensors in shards if tensors]
    names = [shard.path.name for shard, _ in left]
    if len(left) < len(shards):
        suffix = Path(names[0]).suffix
        names = shard_names(names[0], suffix, len(left))
    made = [
        replace(shard, path=shard.path.with_name(name), tensors=tuple(tensors), header_nbytes=0)
        for name, (shard, tensors) in zip(names, left, strict=True)
    ]
    told = {**rebuilt.facts, **facts}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    other = replace(
        component,
        shards=tuple(made),
        index=component.index if len(made) > 1 else None,
        index_name=component.index_name if len(made) > 1 else "",
        config=config,
        made=digest,
    )
    return Rebuilt(
        rebuilt.base,
        replace(rebuilt.checkpoint, components={"": other}),
        told,
        (*rebuilt.dropped, *dropped),
        origins,
        (*rebuilt.warnings, *warnings),
        rebuilt.side_files,
    )


def with_configs(
    rebuilt: Rebuilt, config: Mapping[str, Any], side_files: Mapping[str, bytes | None], warnings: Sequence[str]
) -> Rebuilt:
    """`rebuilt` with another config.json, and other side files, by name; None leaves one out."""
    component = rebuilt.checkpoint.main
    kept = tuple(entry for entry in rebuilt.checkpoint.side_files if side_files.get(entry[0], b"") is not None)
    return replace(
        rebuilt,
        checkpoint=replace(rebuilt.checkpoint, components={"": component.with_config(config)}, side_files=kept),
        side_files={**rebuilt.side_files, **side_files},
        warnings=(*rebuilt.warnings, *warnings),
    )
