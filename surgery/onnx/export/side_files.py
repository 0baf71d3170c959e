# SPDX-License-Identifier: Apache-2.0
"""The files that lie beside graphs: tokenizer, configuration, modules of sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgery.engine.plan import SideFile
from surgery.onnx.export.assemble import Assembly
from surgery.onnx.export.genai_tokenizer import with_special_tokens
from surgery_formats.files.bounded_json import json_bytes
from surgery_formats.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from surgery.onnx.export.merged import MergedWeights

__all__ = ["side_files_of"]


def side_files_of(
    checkpoint: Checkpoint,
    merged: MergedWeights | None,
    assembly: Assembly,
    config: Mapping[str, Any] | None,
    taken: set[str],
    *,
    genai: bool,
) -> tuple[list[SideFile], list[str]]:
    """Tokenizer, configuration and the like, but for names that the export itself takes, and warnings.

    `config` replaces the base's; with `genai` the tokenizer's settings are those that onnxruntime-genai needs.
    """
    if merged is not None:
        side_files = list(merged.side_files)
    else:
        source = checkpoint.main.folder / "config.json"
        side_files = [SideFile(name, source=path) for name, path in checkpoint.side_files]
        side_files += [SideFile("config.json", source=source)] if source.exists() else []
    if assembly.headed or config is not None:
        data = json_bytes(dict(config or assembly.component.config))
        side_files = [side for side in side_files if side.name != "config.json"]
        side_files.append(SideFile("config.json", data=data))
    if assembly.sentence is not None:
        side_files += [SideFile(name, source=path) for name, path in assembly.sentence.modules.files.items()]
    kept = [side for side in side_files if side.name not in taken]
    return with_special_tokens(kept) if genai else (kept, [])
