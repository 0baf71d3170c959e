# SPDX-License-Identifier: Apache-2.0
"""How graphs get their weights, given what is merged into these and where the output lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.onnx.export.assemble import Assembly
from surgery.onnx.export.place import Mode, choose_mode
from surgery_formats.errors import FitError
from surgery_formats.files.raw import File
from surgery_formats.models.component import Component

if TYPE_CHECKING:
    from surgery.onnx.export.merged import MergedWeights

__all__ = ["weights_mode"]


def weights_mode(
    asked: str,
    output: Path,
    base: Component,
    sources: Sequence[File],
    merged: MergedWeights | None,
    assembly: Assembly,
    *,
    full: bool,
) -> Mode:
    """Choose how the graphs get their weights.

    Args:
        asked: ``auto`` or a mode.
        output: The folder to write.
        base: The base.
        sources: Its weight files that graphs read.
        merged: The weights that are computed, or None.
        assembly: What the graphs are made of.
        full: Whether all weights are computed.

    Raises:
        FitError: what was asked for cannot be.
    """
    chosen = _mode(asked, output, base, sources, merged, full=full)
    if chosen == "embed" and merged is not None and not full and assembly.prompts:
        raise FitError(
            "keys and values of a prompt are computed over files in one folder, and merged weights are not in the base's",
            hint='`merge_to="full"`',
        )
    if chosen == "reference" and assembly.headed:
        raise _another_configuration(base)
    return chosen


def _mode(
    asked: str, output: Path, base: Component, sources: Sequence[File], merged: MergedWeights | None, *, full: bool
) -> Mode:
    if merged is None:
        return choose_mode(asked, output, base.folder, sources)
    if full:
        anew = bool(merged.coded) or merged.across
        if anew and asked not in ("auto", "copy", "embed"):
            raise FitError(
                "all weights of this graph are written anew, and no file of the base has them",
                hint='`weights="auto"`, or `weights="embed"` for one file',
            )
        if anew and choose_mode("auto", output, base.folder, ()) == "reference":
            raise FitError(
                "all weights of this graph are written anew, which needs a folder of its own",
                file=output,
                hint="write to another folder",
            )
        if asked not in ("auto", "copy", "embed"):
            raise FitError("a full merge writes its weights itself", hint='`weights="auto"`, or `merge_to="delta"`')
        if choose_mode("auto", output, base.folder, ()) == "reference":
            raise FitError("a full merge needs a folder of its own", file=output, hint='`merge_to="delta"`')
        return "embed" if asked == "embed" else "copy"
    chosen = choose_mode(asked, output, base.folder, sources)
    if chosen == "reference":
        _check_same_sides(merged, base)
    return chosen


def _check_same_sides(merged: MergedWeights, base: Component) -> None:
    """Refuse to write into the base's folder if configuration or tokenizer would differ.

    A tie of head and embedding is no difference: only the graph needs to know of it.
    """
    differing = {key: value for key, value in merged.component.config.items() if key != "tie_word_embeddings"}
    same = differing == {key: value for key, value in base.config.items() if key != "tie_word_embeddings"}
    tokenizers = [
        side.name for side in merged.side_files if side.source and not side.source.is_relative_to(base.folder)
    ]
    if not same or tokenizers:
        raise _another_configuration(base)


def _another_configuration(base: Component) -> FitError:
    return FitError(
        "the model with its adapters has another configuration or tokenizer than the base, whose folder this is",
        file=base.folder,
        hint="write to another folder: blocks are shared where the file system can",
    )
