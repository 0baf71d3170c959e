# SPDX-License-Identifier: Apache-2.0
"""Bake a soft prompt into a model's files: as tokens of its vocabulary, or as ready keys and values."""

from __future__ import annotations

import os
from pathlib import Path

from surgery.engine.execute import Run
from surgery.engine.input_checks import float_type
from surgery.engine.inputs import (
    AdapterLike,
    CheckpointLike,
    StrPath,
    as_adapter,
    as_checkpoint,
    output_path,
)
from surgery.progress import Callback
from surgery.prompts.bake_result import BakeResult
from surgery.reports.result import timed
from surgery_formats.adapters.soft_prompts import soft_prompt
from surgery_formats.errors import FitError, UsageError
from surgery_formats.text import show

__all__ = ["BakeResult", "prompt_bake"]


@timed
def prompt_bake(
    prompt: AdapterLike | None = None,
    base: CheckpointLike | None = None,
    *,
    output: StrPath | None = None,
    form: str = "tokens",
    text: str | None = None,
    name: str = "p",
    keep_tie: bool = False,
    dtype: str = "keep",
    workers: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> BakeResult:
    """Bake a soft prompt, so that programs that know nothing of it serve it.

    Args:
        prompt: File or folder of an adapter with virtual tokens, or an opened Adapter; None for a text.
        base: The model it was trained on, as a folder.
        output: Folder to make. Its parent must exist.
        form: ``tokens``: a copy of the model whose vocabulary has the virtual tokens, and whose tokenizer puts them before every
            text; or ``kv``: keys and values alone, as a cache for transformers and an ``.onnx_adapter``.
        text: As ``kv``, a text in place of a prompt.
        name: What the tokens are called: ``<p_0>``, ``<p_1>`` ...
        keep_tie: Leave a tied head tied. Its rows are then the virtual tokens', and a program that does not read
            generation_config.json may say one.
        dtype: Of keys and values: ``keep`` (the base's), ``fp32``, ``fp16``, ``bf16``.
        workers: Threads that compute; None is one per core, at most eight. Never changes the result.
        overwrite: Replace an existing output, atomically.
        dry_run: Say what would be written, write nothing.
        progress: Called with every step.

    Raises:
        UsageError: arguments of a wrong type, or that contradict each other; no output.
        InputError: an input cannot be read.
        FitError: the prompt does not fit the base, or the form.
        OutputExistsError, ResourceError, ProofError: see `surgery.engine.execute.execute`.
    """
    if form not in ("tokens", "kv"):
        raise UsageError(f"form is 'tokens' or 'kv', not '{show(form, 40)}'")
    if (prompt is None) == (text is None):
        raise UsageError("a prompt or a text is baked", hint="give one of them")
    if form == "tokens" and dtype != "keep":
        raise UsageError("rows of a vocabulary have its type", hint="leave out `dtype=`")
    if form == "kv" and (keep_tie or name != "p"):
        raise UsageError("keys and values have neither a head nor names", hint="leave out `keep_tie=` and `name=`")
    if not str(name).isidentifier():
        raise FitError(f"'{show(name, 40)}' is no name for tokens", hint="letters, digits and underscores: `name=p`")
    if base is None:
        raise UsageError("no model was named", hint="it stands behind the prompt: `base=`")
    _check_order(prompt, base)
    stored = float_type(dtype)
    folder = output_path(output, dry_run=dry_run)
    checkpoint = as_checkpoint(base)
    adapter = None if prompt is None else as_adapter(prompt, "prompt")
    if form == "tokens":
        if adapter is None:
            raise UsageError("a text is made of tokens that the vocabulary has", hint='bake it as `form="kv"`')
        from surgery.prompts.bake_tokens import plan_tokens, write_tokens

        planned = plan_tokens(adapter, soft_prompt(adapter), checkpoint, name, keep_tie=keep_tie)
        if folder is None:
            return planned.result
        return write_tokens(planned, folder, Run(workers=workers, overwrite=overwrite, progress=progress))
    from surgery.prompts.bake_kv import key_values, write_key_values  # onnxruntime

    found = key_values(adapter, text, checkpoint, stored)
    if folder is None:
        return found.result
    inputs: tuple[Path, ...] = (checkpoint.path, *(() if adapter is None else (adapter.path,)))
    return write_key_values(found, folder, overwrite=overwrite, inputs=inputs)


def _check_order(prompt: AdapterLike | None, base: CheckpointLike) -> None:
    """Refuse an adapter and a model in the place of each other.

    Raises:
        UsageError: they are.
    """
    from surgery_formats.adapters.registry import format_at

    if not isinstance(base, (str, os.PathLike)) or not isinstance(prompt, (str, os.PathLike)):
        return
    if format_at(Path(base)) is not None and format_at(Path(prompt)) is None:
        raise UsageError(
            f"'{show(os.fspath(base), 200)}' is an adapter, and stands where the model does",
            hint="the prompt is named first, then the model, as for `prompt nearest`",
        )
