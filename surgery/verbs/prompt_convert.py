# SPDX-License-Identifier: Apache-2.0
"""Convert a soft prompt to another kind, where that does the same."""

from __future__ import annotations

from surgery.engine.inputs import AdapterLike, CheckpointLike, StrPath, as_adapter, as_checkpoint, output_path
from surgery.prompts.conversion import converted
from surgery.prompts.made_prompt import write_prompt
from surgery.prompts.prompt_result import PromptResult
from surgery.prompts.vocabulary import component_for
from surgery.reports.result import timed
from surgery_formats.adapters.soft_prompts import soft_prompt, soft_prompts
from surgery_formats.models.identity import content_id

__all__ = ["PromptResult", "prompt_convert"]


@timed
def prompt_convert(
    prompt: AdapterLike,
    to: str,
    *,
    output: StrPath | None = None,
    base: CheckpointLike | None = None,
    component: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> PromptResult:
    """Write a soft prompt as one of another kind.

    Args:
        prompt: File or folder of an adapter with virtual tokens, or an opened Adapter.
        to: ``prompt``, ``p-tuning``, ``cpt`` or ``prefix`` of PEFT; ``adapterhub`` (a prefix); ``embedding`` or
            ``learned-embeds``, the layouts of textual inversions.
        output: Folder to make, or file of a textual inversion. Its parent must exist.
        base: The model it was trained on; needed to make a prefix of rows, and between PEFT's prefixes and AdapterHub's.
        component: Of virtual tokens for several text encoders, those to convert.
        overwrite: Replace an existing output, atomically.
        dry_run: Say what would be made, write nothing.

    Raises:
        UsageError: an argument of a wrong type, or no output.
        InputError: an input cannot be read.
        FitError: nothing of that kind does the same; no base where one is needed, or another.
        OutputExistsError, ResourceError, ProofError: nothing is left behind.
    """
    folder = output_path(output, dry_run=dry_run)
    adapter = as_adapter(prompt, "prompt")
    found = soft_prompt(adapter, component)
    where = component if component is not None else next(iter(soft_prompts(adapter)))
    checkpoint = None if base is None else as_checkpoint(base)
    conversion = converted(adapter, found, to, None if checkpoint is None else component_for(checkpoint, where))
    made = conversion.made
    result = PromptResult(
        None,
        "convert",
        ((adapter.path, 1.0),),
        made.kind,
        made.tokens,
        conversion.how,
        conversion.exact,
        warnings=(*conversion.warnings, *adapter.known_issues()),
    )
    if folder is None:
        return result
    facts = {"verb": "prompt convert", "to": to, "base": None if checkpoint is None else content_id(checkpoint)}
    also = () if checkpoint is None else (checkpoint.path,)
    return write_prompt(made, result, folder, (adapter,), facts, overwrite=overwrite, also=also, base=checkpoint)
