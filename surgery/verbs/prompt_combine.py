# SPDX-License-Identifier: Apache-2.0
"""Combine soft prompts: one behind the other, or added up."""

from __future__ import annotations

from surgery.engine.inputs import AdaptersLike, StrPath, as_weighted, output_path
from surgery.prompts.combination import combined
from surgery.prompts.made_prompt import write_prompt
from surgery.prompts.prompt_result import PromptResult
from surgery.reports.result import timed
from surgery_formats.adapters.soft_prompts import soft_prompt

__all__ = ["PromptResult", "prompt_combine"]

_BETWEEN = (
    "nothing says that what lies between prompts does what they do: measure it on texts, as `surgery prompt nearest` does by effect",
)


@timed
def prompt_combine(
    prompts: AdaptersLike,
    *,
    output: StrPath | None = None,
    method: str = "concatenate",
    overwrite: bool = False,
    dry_run: bool = False,
) -> PromptResult:
    """Write several soft prompts as one of PEFT's.

    Args:
        prompts: As `surgery.merge` takes adapters, with weights where they are added up.
        output: Folder to make. Its parent must exist.
        method: ``concatenate``: one behind the other, in this order; ``average``: by weights that are made to add up to 1;
            ``mix``: by the weights as they are.
        overwrite: Replace an existing output, atomically.
        dry_run: Say what would be made, write nothing.

    Raises:
        UsageError: an argument of a wrong type, or no output.
        InputError: an input cannot be read.
        FitError: prompts of different kinds or sizes, or weights that nothing is done with.
        OutputExistsError, ResourceError, ProofError: nothing is left behind.
    """
    folder = output_path(output, dry_run=dry_run)
    weighted = as_weighted(prompts, "prompts")
    found = [(entry.adapter, soft_prompt(entry.adapter), entry.weight) for entry in weighted]
    made, how = combined(found, method)
    sources = tuple((adapter.path, weight) for adapter, _, weight in found)
    names = {adapter.base_name for adapter, _, _ in found}
    apart = (
        ("they name different bases: what was trained for one model means nothing to another",)
        if len(names) > 1
        else ()
    )
    between = () if method == "concatenate" else _BETWEEN
    result = PromptResult(None, "combine", sources, made.kind, made.tokens, how, False, warnings=(*apart, *between))
    if folder is None:
        return result
    facts = {"verb": "prompt combine", "method": method, "weights": [weight for _, weight in sources]}
    return write_prompt(made, result, folder, tuple(adapter for adapter, _, _ in found), facts, overwrite=overwrite)
