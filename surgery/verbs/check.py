# SPDX-License-Identifier: Apache-2.0
"""Check: what programs that load adapters make of one, and the same adapter written so that one of them honours it."""

from __future__ import annotations

from surgery.consumers.check_result import CheckResult, ConsumerCheck
from surgery.consumers.consent import Consent, SavedChoice, check_greatest_rank
from surgery.consumers.facts import bound_facts
from surgery.consumers.registry import asked_version, consumer_named, consumers
from surgery.engine.chosen_part import placed
from surgery.engine.inputs import AdapterLike, CheckpointLike, StrPath, as_adapter, as_checkpoint, local_path
from surgery.progress import Callback
from surgery.rank import Rank
from surgery.reports.result import timed
from surgery.verbs.rest import rest_merger, rest_name
from surgery_formats.errors import FitError

__all__ = ["CheckResult", "check"]


@timed
def check(
    base: CheckpointLike,
    adapter: AdapterLike,
    *,
    consumer: str | None = None,
    fix: StrPath | None = None,
    saved: SavedChoice | None = None,
    rank: int | Rank | None = None,
    max_rank: int | None = None,
    merge_rest: StrPath | None = None,
    allow_loss: bool = False,
    overwrite: bool = False,
    progress: Callback | None = None,
) -> CheckResult:
    """Say of every part of an adapter what a program makes of it: honoured, scaled wrongly, ignored, or refused.

    The rules were read from the programs' own code, which need not be installed; no value of the adapter is read.

    Args:
        base: The model it was trained on.
        adapter: File or folder of any known format, or an opened Adapter.
        consumer: The program, as in ``vllm`` or ``sglang@0.5.23``; by default all are asked.
        fix: File or folder to make, in which the program honours all of the adapter, proved to do the same.
        saved: With `fix`, what becomes of modules trained in full that the program cannot hold: ``lora`` of their
            difference to the base, or ``drop``.
        rank: With `fix`, directions of LoRAs that stand for other kinds, as for `surgery.convert`; by default nothing
            may be lost.
        max_rank: The greatest rank that the program was started with, where it has a limit; by default its own default.
        merge_rest: With `fix`, folder or file to make: a copy of the base, into which is merged what the program cannot
            honour in the adapter. The two belong together.
        allow_loss: With `fix`, leave out what the program cannot honour in any form.
        overwrite: Replace an existing output, atomically.
        progress: Called with every step.

    Raises:
        UsageError: an argument of a wrong type.
        InputError: adapter or base cannot be read, or no such consumer.
        FitError: the adapter does not fit the base, or no rewriting is honoured.
        ProofError: what was written does something else, or is not honoured.
        OutputExistsError, ResourceError: see `surgery_formats.files`.
    """
    if consumer is None and fix is not None:
        raise FitError("an adapter is rewritten for one program", hint="name the program")
    if saved not in (None, "lora", "drop"):
        raise FitError("saved modules become 'lora' or 'drop'", hint="'drop' leaves them out")
    if fix is None and (saved or rank is not None or merge_rest is not None or allow_loss):
        raise FitError("what may become of parts is for a rewriting", hint="say where to write it with `fix=`")
    check_greatest_rank(max_rank)
    chosen = (
        [consumer_named(consumer)] if consumer is not None else [(one, one.version) for one in consumers().values()]
    )
    checkpoint, original = as_checkpoint(base), as_adapter(adapter)
    facts, warnings = bound_facts(placed(original, checkpoint, None)[0], checkpoint, max_rank)
    checks = tuple(ConsumerCheck.of(one, v, one.judge(facts, asked_version(v))) for one, v in chosen)
    newer = [one for one, v in chosen if asked_version(v) > asked_version(one.version)]
    notes = [f"the rules of {one.title} were read from version {one.version}, which is older" for one in newer]
    result = CheckResult(
        original.path,
        checkpoint.path,
        original.format,
        checks,
        consumer is not None,
        warnings=(*warnings, *notes),
    )
    if fix is None:
        return result
    from surgery.consumers.fix import write_for

    ((program, version),) = chosen
    consent = Consent(saved, allow_loss, merge_rest is not None, None if rank is None else Rank.of(rank), max_rank)
    output = local_path(fix, "fix")
    written = write_for(
        original,
        checkpoint,
        program,
        asked_version(version),
        consent,
        output=output,
        overwrite=overwrite,
        progress=progress,
        merge_rest=None if merge_rest is None else rest_merger(checkpoint, merge_rest, overwrite, progress),
        rest_name=rest_name(merge_rest),
    )
    return result.plus(written)
