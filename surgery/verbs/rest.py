# SPDX-License-Identifier: Apache-2.0
"""What a program cannot honour in an adapter, merged into a copy of the base."""

from __future__ import annotations

from collections.abc import Callable

from surgery.engine.inputs import StrPath
from surgery.progress import Callback
from surgery.verbs.merge import merge
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["rest_merger"]


def rest_merger(
    base: Checkpoint, output: StrPath, overwrite: bool, progress: Callback | None
) -> Callable[[Adapter], object]:
    """A function that merges an adapter into `base` and writes the model to `output`."""

    def merged(rest: Adapter) -> object:
        return merge(base, rest, output=output, overwrite=overwrite, progress=progress)

    return merged
