# SPDX-License-Identifier: Apache-2.0
"""Layers: a checkpoint with other layers, projections or rows, made of ranges of its files; an adapter may be moved with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from surgery.engine.card import CARD, model_name
from surgery.engine.execute import Run, execute
from surgery.engine.input_checks import float_type
from surgery.engine.inputs import (
    AdapterLike,
    CheckpointLike,
    StrPath,
    as_adapter,
    as_checkpoint,
    as_list,
    check_counts,
    local_path,
    output_path,
)
from surgery.engine.ledger import Ledger
from surgery.engine.rebuild.layers_result import LayersResult
from surgery.engine.rebuild.rebuild_plan import plan_rebuilt
from surgery.engine.rebuild.rebuilt_card import rebuilt_card
from surgery.engine.rebuild.vocabulary_choice import with_vocabulary
from surgery.progress import Callback
from surgery.reports.markdown import markdown_rows
from surgery.reports.result import timed
from surgery_formats.errors import NothingChangedError, UsageError
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.files.output.several import several_outputs
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.rebuilt.layers import with_layers
from surgery_formats.models.rebuilt.order import chosen_order, with_repeated, without
from surgery_formats.models.rebuilt.projections import with_projections
from surgery_formats.models.rebuilt.rebuilt import Rebuilt, one_network, rebuilt_of
from surgery_formats.models.rebuilt.stack import layer_stack

__all__ = ["LayersResult", "layers", "rebuild"]

_ORDERS: Mapping[str, Callable[[str, int], tuple[int, ...]]] = {
    "keep": chosen_order,
    "repeat": with_repeated,
    "drop": without,
}


@timed
def layers(
    base: CheckpointLike,
    *,
    output: StrPath | None = None,
    keep: str | None = None,
    repeat: str | None = None,
    drop: str | None = None,
    vocab: str | None = None,
    split: str | Sequence[str] = (),
    fuse: str | Sequence[str] = (),
    dtype: str = "keep",
    adapter: AdapterLike | None = None,
    adapter_output: StrPath | None = None,
    shard_size: int | None = None,
    workers: int | None = None,
    verify_copies: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> LayersResult:
    """Write a model with other layers. What stays is copied by the kernel; config.json is made true.

    Args:
        base: Hugging Face folder or weight file, or an opened Checkpoint.
        output: Folder to make. Its parent must exist.
        keep: Layers of the result in their order, such as ``0-19,24-31``; one that is named twice is there twice.
        repeat: Ranges that are there once more, behind themselves: ``8-15``; ``8-15x3`` is there three times.
        drop: Layers to leave out.
        vocab: ``trim`` (rows to the tokenizer's size), ``trim=FILE`` (only the tokens of a list of ids, and those that the
            tokenizer needs besides; it is made anew) or ``pad=64`` (rows to a multiple).
        split: Fused projections to part: ``qkv``, ``gate-up``.
        fuse: Projections to join.
        dtype: ``keep``, or a type for every floating-point tensor (``bf16``, ``fp16``, ``fp32``).
        adapter: An adapter of `base`, to be moved with its layers.
        adapter_output: Where to write it.
        shard_size: Most bytes per weight file; None keeps the base's shards.
        workers: Threads that compute; None is one per core, at most eight. Never changes the result.
        verify_copies: Compare copied ranges byte by byte too, and note the sha256 of every file.
        overwrite: Replace an existing output, atomically.
        dry_run: Plan only.
        progress: Called with every step.

    Raises:
        UsageError: arguments of a wrong type, or that contradict each other; no output.
        InputError: an input cannot be read.
        FitError: layers that are not there; a network of which config.json would no longer be true.
        NothingChangedError: the result would be the base.
        OutputExistsError, ResourceError, ProofError: see `surgery.engine.execute.execute`.
    """
    check_counts(workers=workers, shard_size=shard_size)
    folder = output_path(output, dry_run=dry_run)
    if (adapter is None) != (adapter_output is None) and not dry_run:
        lacking = "adapter" if adapter is None else "adapter_output"
        raise UsageError("an adapter and where to write it are given together", hint=f"give `{lacking}=` too")
    checkpoint = as_checkpoint(base)
    stored = float_type(dtype, "weights")
    rebuilt = rebuild(checkpoint, keep=keep, repeat=repeat, drop=drop, vocab=vocab, split=split, fuse=fuse)
    if not rebuilt.facts and stored is None and not _has_adapters(checkpoint):
        raise NothingChangedError(
            "nothing to change was named",
            file=checkpoint.path,
            hint="`keep=`, `drop=`, `repeat=`, `vocab=`, `split=`, `fuse=` or `dtype=`",
        )
    plan = plan_rebuilt(rebuilt, stored, shard_size)
    before, after = (_parameters(one) for one in (checkpoint, rebuilt.checkpoint))
    result = LayersResult(None, Ledger(plan), rebuilt.facts, (before, after), None, plan.warnings)
    move = None
    if adapter is not None:
        from surgery.algebra.moved_adapter import plan_move

        moved = as_adapter(adapter)
        move, plan = plan_move(moved, rebuilt), replace(plan, roots=(*plan.roots, moved.path))
        result = replace(result, adapter=move.account(None))
    if folder is None:
        return result
    run = Run(workers, None, "cpu", verify_copies, overwrite, progress)

    def finish(ledger: Ledger) -> Mapping[str, bytes]:
        title = f"{model_name(checkpoint)} with {'other parts' if rebuilt.facts else 'another type'}"
        return {CARD: rebuilt_card(checkpoint, title, ledger, markdown_rows(result.figures()), warnings=plan.warnings)}

    if move is None or adapter_output is None:
        return replace(result, output=folder, ledger=execute(plan, folder, run, finish))
    beside = local_path(adapter_output, "adapter_output")
    warnings: list[str] = []

    def last(staged: OutputFolder) -> None:  # before the model appears, so that neither is there without the other
        warnings.extend(move.write(beside, checkpoint.path, overwrite=overwrite, progress=progress).warnings)

    with several_outputs():
        ledger = execute(plan, folder, run, finish, last=last)
    told = (*plan.warnings, *warnings)
    return replace(result, output=folder, ledger=ledger, adapter=move.account(beside), warnings=told)


def _has_adapters(checkpoint: Checkpoint) -> bool:
    """Whether adapters lie in the folder of a model: the model alone is something else."""
    folder = checkpoint.path
    return folder.is_dir() and any((*folder.glob("adapter_config.json"), *folder.glob("*/adapter_config.json")))


def rebuild(
    checkpoint: Checkpoint,
    *,
    keep: str | None = None,
    repeat: str | None = None,
    drop: str | None = None,
    vocab: str | None = None,
    split: str | Sequence[str] = (),
    fuse: str | Sequence[str] = (),
) -> Rebuilt:
    """What the options make of a checkpoint, before anything is written.

    Raises:
        UsageError, FitError, NothingChangedError: as `layers`.
    """
    chosen = {name: text for name, text in (("keep", keep), ("repeat", repeat), ("drop", drop)) if text is not None}
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} say the same in two ways", hint="keep says all of it: 0-7,8-15,8-15")
    if split and fuse:
        raise UsageError("split and fuse are given together", hint="one after the other")
    rebuilt = rebuilt_of(checkpoint)
    for name, text in chosen.items():
        count = layer_stack(one_network(checkpoint)).count
        order = _ORDERS[name](text, count)
        if order == tuple(range(count)):
            raise NothingChangedError(
                f"nothing would change: these are all {count} layers, in their order", file=checkpoint.path
            )
        rebuilt = with_layers(rebuilt, order)
    if split or fuse:
        rebuilt = with_projections(rebuilt, tuple(as_list(split or fuse)), fused=bool(fuse))
    if vocab is not None:
        rebuilt = with_vocabulary(rebuilt, vocab)
    return rebuilt


def _parameters(checkpoint: Checkpoint) -> int:
    from surgery_formats.models.module_tree import module_graph

    return module_graph(checkpoint.main).parameters
