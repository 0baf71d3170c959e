# SPDX-License-Identifier: Apache-2.0
"""What a program cannot honour in an adapter, merged into a copy of the base."""

from __future__ import annotations

import os
from collections.abc import Callable

from surgery.engine.inputs import StrPath, local_path
from surgery.progress import Callback
from surgery.verbs.merge import merge
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["rest_merger", "rest_name"]


def rest_merger(
    base: Checkpoint, output: StrPath, overwrite: bool, progress: Callback | None
) -> Callable[[Adapter], object]:
    """A function that merges an adapter into `base` and writes the model to `output`."""

    def merged(rest: Adapter) -> object:
        return merge(base, rest, output=output, overwrite=overwrite, progress=progress)

    return merged


def rest_name(output: StrPath | None) -> str:
    """What an adapter calls the base that `rest_merger` writes; empty for none."""
    return "" if output is None else os.path.basename(os.path.realpath(local_path(output, "merge_rest")))
