# SPDX-License-Identifier: Apache-2.0
"""A soft prompt made in memory, and how it is written: in the format that holds it, read back before it appears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from surgery.engine.adapter_card import with_card
from surgery.engine.adapter_output import WriteOptions, job_id, write_adapter
from surgery.prompts.prompt_result import PromptResult
from surgery.reports.markdown import markdown_rows
from surgery_formats.adapters.adapterhub.prompts import render_hub_prefix
from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.peft.prompt_adapter import TABLE, prompt_adapter
from surgery_formats.adapters.registry import format_to_write, read_adapter
from surgery_formats.adapters.soft_prompts import soft_prompt
from surgery_formats.adapters.textual_inversion.prompt import inversion_adapter
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.canonical.prompts import Prefix
from surgery_formats.dtypes import DType
from surgery_formats.errors import ProofError
from surgery_formats.files.raw import File
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.tensors.computed import computed

__all__ = ["MadePrompt", "write_prompt"]

_DONE = {"convert": "written as another kind", "combine": "combined", "transfer": "led onto another model"}


@dataclass(frozen=True)
class MadePrompt:
    """A soft prompt, not yet written.

    Attributes:
        format: Name of the format to write.
        kind: PEFT's.
        table: Float32, as `SoftPrompt.table`.
        dim: Numbers per token: of an embedding, or of all key heads of a layer.
        prefix: Layout of keys and values; None for embeddings.
        base_name: The base, as the files shall name it.
        token: What calls it, as a textual inversion.
        component: The text encoder it is for, as a textual inversion.
        base: The network it is for, where the format names its modules.
    """

    format: str
    kind: str
    table: np.ndarray
    dim: int
    prefix: Prefix | None = None
    base_name: str = ""
    token: str = ""
    component: str = ""
    base: Component | None = None

    @property
    def tokens(self) -> int:
        """How many."""
        return len(self.table)

    def render(self, path: Path, name: str) -> Rendering:
        """The files: of an adapter at `path` in messages, called `name` where its keys have one."""
        table = np.ascontiguousarray(self.table, np.float32)
        if self.format == "adapterhub" and self.base is not None:
            root = self.base.embedding.partition(".")[0]
            config = self.base.config
            facts = {"hidden_size": config.get("hidden_size"), "model_type": config.get("model_type")}
            layers = self.prefix.layers if self.prefix else 0
            return render_hub_prefix(table, layers, name, root, {**facts, "model_name": self.base_name})
        tensor = computed(TABLE, table.shape, (), lambda: table, DType.F32)
        if self.format == "peft":
            adapter = prompt_adapter(path, self.kind, tensor, self.tokens, self.dim, self.prefix, self.base_name)
        else:
            adapter = inversion_adapter(path, self.format, tensor, self.token or name, self.component)
        return format_to_write(self.format).render(adapter, None)


def write_prompt(
    made: MadePrompt,
    result: PromptResult,
    output: Path,
    sources: tuple[Adapter, ...],
    facts: Mapping[str, Any],
    *,
    overwrite: bool,
    also: tuple[Path, ...] = (),
    base: Checkpoint | None = None,
) -> PromptResult:
    """Write a prompt and read it back.

    Args:
        made: The prompt.
        result: What is known before it is written.
        output: Folder or file to make.
        sources: What it was made of.
        facts: That decide what it is.
        overwrite: Replace an existing output.
        also: What was read beside the sources; the output may not lie in it.
        base: What it is for, if that was given.

    Raises:
        FitError: a value that is not a number.
        OutputExistsError, ResourceError, ProofError: nothing is left behind.
    """
    target = format_to_write(made.format)
    rendering = made.render(sources[0].path, output.name.partition(".")[0] or "prompt")
    weighted = list(zip(sources, (weight for _, weight in result.sources), strict=True))
    rendering = with_card(
        rendering,
        target,
        weighted,
        base,
        _DONE[result.verb],
        markdown_rows(result.figures()),
        moved=result.verb == "transfer",
    )
    files: list[File] = [file for adapter in sources for file in adapter.files]
    manifest = result.as_manifest()

    def prove(path: Path) -> Mapping[str, Any]:
        written = soft_prompt(read_adapter(path)).table.read().reshape(made.table.shape)
        if not np.array_equal(np.asarray(written, np.float32), np.asarray(made.table, np.float32)):
            raise ProofError("its virtual tokens are not those that were meant", file=path)
        return {"prompt": manifest}

    job = job_id({**facts, "result": manifest}, files, rendering)
    options = WriteOptions(output, (*(adapter.path for adapter in sources), *also), overwrite=overwrite)
    write_adapter(rendering, target, job, prove, options)
    return replace(result, output=output)
