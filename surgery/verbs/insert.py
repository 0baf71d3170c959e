# SPDX-License-Identifier: Apache-2.0
"""Insert: what was trained, as it is, into a model; or what is to be trained, fresh, beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.arguments import wrong_type
from surgery.engine.calibration_file import open_calibration
from surgery.engine.execute import Run
from surgery.engine.inputs import (
    AdaptersLike,
    CheckpointLike,
    StrPath,
    as_checkpoint,
    as_path,
    as_weighted,
    check_counts,
    local_path,
    output_path,
)
from surgery.insertion.delta import DeltaResult, insert_delta
from surgery.insertion.fresh_result import FreshResult
from surgery.insertion.starts import Init
from surgery.progress import Callback
from surgery.reports.result import timed
from surgery_formats.errors import FitError, UsageError
from surgery_formats.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from surgery.insertion.unmerged import UnmergedResult
    from surgery.onnx.insert.adapters import GraphInsertion
    from surgery_formats.canonical.adapter import Adapter

__all__ = ["DeltaResult", "FreshResult", "insert"]

_RANK = 16
_INSERTED = ("bottleneck", "prompt", "prefix")
_WITHOUT: Mapping[str, tuple[str, ...]] = {
    "rank": ("ia3",),
    "alpha": ("ia3", "oft", "vera", *_INSERTED),
    "targets": _INSERTED,
}
"""Kinds that have no use for an argument."""


@timed
def insert(
    model: CheckpointLike,
    what: AdaptersLike | None = None,
    *,
    base: CheckpointLike | None = None,
    output: StrPath | None = None,
    required: bool = False,
    gated: bool = False,
    unmerged: bool = False,
    new: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    targets: str | None = None,
    init: Init = "default",
    text: str | None = None,
    calibration: StrPath | None = None,
    release: CheckpointLike | None = None,
    residual: StrPath | None = None,
    seed: int = 0,
    format: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> DeltaResult | FreshResult | GraphInsertion | UnmergedResult:
    """Put what a fine-tune changed into its base, slots for adapters into an ONNX graph; or begin an adapter beside a model.

    Args:
        model: The model: a checkpoint, or an ``.onnx`` file or a folder with one, whoever made it.
        what: Of a checkpoint: an adapter that holds parameters, or rows of them, as a fine-tune has them: biases, norms,
            layers, token rows (what ``extract_lora(dense=..., matrices="full")`` writes). Of a graph: adapters, each of
            which gets a file for the slots.
        base: Of a graph: the checkpoint that it was made of, by whose values its weights are found.
        output: Folder to make. Its parent must exist.
        required: Of a graph: whether slots and strengths are inputs without a default, for runtimes that pass no optional
            ones.
        gated: Of a graph: put the adapters into it, each behind an input for its strength, by default its weight.
        unmerged: Of a checkpoint: put adapters beside it in one folder, where transformers and PEFT load them: the first with the
            model, others by their names.
        new: Begin an adapter of this kind for the checkpoint: ``lora``, ``dora``, ``rslora``, ``ia3``, ``loha``, ``lokr``,
            ``oft``, ``vera``, ``bottleneck``, ``prompt``, ``prefix``.
        rank: Of `new`: directions of a module (16); the side of a block of an OFT, the width of a bottleneck, the number of
            virtual tokens of a prompt or prefix.
        alpha: Of `new`: as its configuration has it; None is the rank, which makes the scale 1 (rsLoRA: its root).
        targets: Of `new`: ``attention`` (the default), ``mlp``, ``all`` (every linear module but the head), or patterns of
            module names joined by commas.
        init: Of `new`: ``default`` as PEFT begins it, all of them the base at first but for prompts; of LoRAs ``pissa``,
            ``olora``, ``orthogonal``, ``eva`` (along `calibration`), ``loftq`` (against the rounding of a quantised base,
            see `release`); of a prompt ``text``.
        text: Of ``text``: what the virtual tokens begin as.
        calibration: Of ``eva``: inputs of the modules (docs/extraction.md).
        release: Of ``loftq``: the unquantised model that the base was made of.
        residual: Of ``pissa`` and ``olora``: folder to make, the base without the part that the factors begin with, on which
            the adapter is a plain LoRA. Without it PEFT takes the part away itself whenever it loads the adapter.
        seed: Of `new`: of everything random; the same seed, base and options give the same bytes.
        format: Of `new`: ``peft`` (the default), ``mlx``, or ``adapterhub``, the only one of bottlenecks.
        workers: Computing threads; None is one per core, at most eight. Never changes the result.
        overwrite: Replace an existing output, atomically.
        dry_run: Plan only; of `new`, say what training it takes.
        progress: Called with every step.

    Returns:
        What became of every tensor, and the share of the model that was trained; or the slots; or what is trained, and what
        that takes.

    Raises:
        UsageError: an argument of a wrong type, nothing to insert, or no output.
        InputError: an input cannot be read.
        FitError: it does not fit the base, is more than tensors to be copied, or would be rounded; a graph that was made of
            another base, or has no place for a slot; options that do not go together.
        NothingChangedError: the output would be the base.
        OutputExistsError, ResourceError, ProofError: see `surgery.engine.execute.execute`.
    """
    check_counts(workers=workers, rank=rank)
    check_counts(least=0, seed=seed)
    folder = output_path(output, dry_run=dry_run)
    asked: dict[str, Any] = {"rank": rank, "alpha": alpha, "targets": targets, "text": text, "calibration": calibration}
    asked |= {"release": release, "residual": residual, "format": format}
    if new is not None:
        if what is not None:
            raise UsageError("a kind to begin was named, and something to insert", hint="name one of them")
        others = {"base": base is not None, "required": required, "gated": gated, "unmerged": unmerged}
        if odd := [name for name, given in others.items() if given]:
            raise UsageError(f"{odd[0]} has no meaning for an adapter that is begun", hint=f"leave out `{odd[0]}=`")
        return _fresh(as_checkpoint(model, "model"), new, init, seed, asked, folder, overwrite, progress)
    if odd := [name for name, value in asked.items() if value is not None]:
        raise UsageError(f"{odd[0]} belongs to an adapter that is begun", hint="`new=` names its kind")
    if what is None:
        raise UsageError("nothing to insert was named", hint="or name a kind of adapter to begin")
    if not isinstance(model, Checkpoint) and (path := _graph(as_path(model, "model"), base)).suffix == ".onnx":
        if unmerged:
            raise UsageError("an adapter lies beside a checkpoint", hint="a graph has slots without being asked")
        options = {"required": required, "gated": gated, "overwrite": overwrite}
        return _into_graph(path, what, base, folder, **options)
    if base is not None or required or gated:
        raise FitError("a checkpoint has no slots", hint="`base=`, `required=` and `gated=` are for an .onnx file")
    run = Run(workers=workers, overwrite=overwrite, progress=progress)
    if unmerged:
        from surgery.insertion.unmerged import insert_unmerged

        return insert_unmerged(as_checkpoint(model, "model"), as_weighted(what, "what"), folder, run)
    return insert_delta(as_checkpoint(model, "model"), _one(what), folder, run)


def _graph(path: Path, base: CheckpointLike | None) -> Path:
    """The graph's file, of a folder with one: a base was named, which no checkpoint needs."""
    if base is None or not path.is_dir():
        return path
    from surgery.onnx.edit.opening import graph_at

    return graph_at(path).path


def _fresh(
    model: Checkpoint,
    kind: str,
    init: Init,
    seed: int,
    asked: Mapping[str, Any],
    folder: Path | None,
    overwrite: bool,
    progress: Callback | None,
) -> FreshResult:
    from surgery.insertion.fresh import FreshOptions, fresh_adapter

    _check_meaningful(kind, asked)
    said = asked["text"]
    if init == "text" and said is None:
        raise UsageError("a prompt that begins as a text needs the text")
    if not isinstance(targets := asked["targets"] or "attention", str):
        raise wrong_type(targets, "targets", "a role or patterns, in one text")
    options = FreshOptions(
        kind=kind,
        rank=_RANK if asked["rank"] is None else asked["rank"],
        alpha=asked["alpha"],
        targets=targets,
        init="text" if said is not None and init == "default" else init,
        text=() if said is None else _tokens(said, model),
        calibration=None if asked["calibration"] is None else open_calibration(asked["calibration"]),
        release=None if asked["release"] is None else as_checkpoint(asked["release"], "release"),
        residual=None if asked["residual"] is None else local_path(asked["residual"], "residual"),
        seed=seed,
        format=asked["format"] or ("adapterhub" if kind == "bottleneck" else "peft"),
    )
    return fresh_adapter(model, options, folder, overwrite=overwrite, progress=progress)


def _check_meaningful(kind: str, asked: Mapping[str, Any]) -> None:
    """Refuse what the kind has no use for: it would be ignored.

    Raises:
        UsageError: such an argument was given.
    """
    for name, kinds in _WITHOUT.items():
        if asked[name] is not None and kind in kinds:
            raise UsageError(f"{name} has no meaning for the kind {kind}", hint=f"leave out `{name}=`")


def _tokens(text: str, model: Checkpoint) -> tuple[int, ...]:
    """Tokens of a text, by the tokenizer beside the model.

    Raises:
        FitError: the text has none, or the package tokenizers is not installed.
        NotFoundError, MalformedError: the tokenizer cannot be read.
    """
    from surgery.onnx.run.tokenizer import open_tokenizer

    ids = open_tokenizer(model.path if model.path.is_dir() else model.path.parent).encode(text)
    if not ids:
        raise FitError("the text has no tokens")
    return tuple(ids)


def _one(what: AdaptersLike) -> Adapter:
    """The single thing to insert.

    Raises:
        FitError: several, or one with a weight.
    """
    given = as_weighted(what, "what")
    if len(given) != 1 or given[0].weight != 1.0:
        raise FitError("one thing is put into a checkpoint, and as it is", hint="merge adapters with weights")
    return given[0].adapter


def _into_graph(
    path: Path, what: AdaptersLike, base: CheckpointLike | None, folder: Path | None, **options: bool
) -> GraphInsertion:
    from surgery.onnx.export.adapters import sort_adapters
    from surgery.onnx.insert.adapters import insert_adapters

    if base is None:
        raise UsageError("the weights of a graph are found by those of its base", hint="give it with `base=`")
    roles = sort_adapters(what)
    if roles.insert:
        from surgery.onnx.insert.modules import insert_modules

        if options["required"] or options["gated"]:
            raise FitError("modules are optional inputs", hint="without `required=` and `gated=`")
        given = (*roles.insert, *roles.merge, *roles.prefix)
        return insert_modules(path, given, as_checkpoint(base), folder, overwrite=options["overwrite"])
    return insert_adapters(path, (*roles.merge, *roles.prefix), as_checkpoint(base), folder, **options)
