# SPDX-License-Identifier: Apache-2.0
"""What a dry run of a merge predicts: free disk, peak memory, and obstacles."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from surgery.engine.blocks import block_bytes
from surgery.engine.execute import most_workers
from surgery.engine.plan import Plan
from surgery_formats.files.places import exists
from surgery_formats.files.remote.path import is_remote
from surgery_formats.text import nbytes, show

__all__ = ["Preview", "obstacles", "preview"]

_WITH_NUMPY = 50_000_000  # of a process that computes something small, as measured; a dry run does not import numpy
_PATH = 500  # characters; a path is worth showing whole


@dataclass(frozen=True, slots=True)
class Preview:
    """What writing the output would need.

    Attributes:
        output: The output that was named, if any.
        free_nbytes: Free space on its disk; None if its parent folder is missing.
        beside_nbytes: The most that a LoRA beside the model takes; 0 without one.
        peak_nbytes: Peak memory: what this process has used so far, at least what numpy takes, plus the largest tensors
            computed at the same time.
    """

    output: Path | None
    free_nbytes: int | None
    beside_nbytes: int
    peak_nbytes: int


def preview(plan: Plan, output: Path | None, workers: int | None, beside_nbytes: int = 0) -> Preview:
    """Measure free disk and predict peak memory on this machine."""
    blocks = sorted((block_bytes(tensor) for tensor in plan.computed()), reverse=True)
    peak = _resident() + sum(blocks[: workers or most_workers()])
    return Preview(output, None if output is None else _free(output), beside_nbytes, peak)


def obstacles(plan: Plan, preview: Preview, *, overwrite: bool) -> Iterator[str]:
    """Warnings about what would stop the merge, as far as it can be known beforehand."""
    output = preview.output
    if output is None:
        return
    if preview.free_nbytes is None:
        yield f"there is no folder {show(output.absolute().parent, _PATH)} to write into"
    elif preview.free_nbytes < (needed := plan.nbytes + preview.beside_nbytes):
        yield f"{nbytes(needed)} will not fit into {nbytes(preview.free_nbytes)} of free disk"
    if exists(output, links=True) and not overwrite:
        yield f"{show(output, _PATH)} is already there; the merge needs another name, or --overwrite"
    if any(os.path.realpath(output) == os.path.realpath(root) for root in plan.roots):
        yield f"{show(output, _PATH)} is one of the inputs; the merge needs a folder outside them"


def _free(output: Path) -> int | None:
    if is_remote(output):  # a bucket has space
        return sys.maxsize
    try:
        return shutil.disk_usage(output.absolute().parent).free
    except OSError:
        return None  # no such folder


def _resident() -> int:
    if sys.platform == "win32":
        return _WITH_NUMPY
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(peak if sys.platform == "darwin" else peak * 1024, _WITH_NUMPY)
