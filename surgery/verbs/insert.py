# SPDX-License-Identifier: Apache-2.0
"""Insert: what was trained, as it is, into a model; or what is to be trained, fresh, beside it."""

from __future__ import annotations

from pathlib import Path

from surgery.engine.calibration_file import open_calibration
from surgery.engine.execute import Run
from surgery.engine.inputs import (
    AdapterLike,
    CheckpointLike,
    StrPath,
    as_adapter,
    as_checkpoint,
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

__all__ = ["DeltaResult", "FreshResult", "insert"]

_RANK = 16


@timed
def insert(
    base: CheckpointLike,
    what: AdapterLike | None = None,
    *,
    output: StrPath | None = None,
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
) -> DeltaResult | FreshResult:
    """Put the tensors that a fine-tune changed into its base, or begin an adapter beside it.

    Args:
        base: The model.
        what: An adapter that holds parameters, or rows of them, as a fine-tune has them: biases, norms, layers, token
            rows, as `extract_lora` writes them. They replace the base's own, to the byte.
        output: Folder to make. Its parent must exist.
        new: Begin an adapter of this kind instead: ``lora``, ``dora``, ``rslora``, ``ia3``, ``loha``, ``lokr``, ``oft``,
            ``vera``, ``bottleneck``, ``prompt``, ``prefix``.
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
        seed: Of everything random: the same seed, base and options give the same bytes.
        format: Of `new`: ``peft`` (the default), ``mlx``, or ``adapterhub``, the only one of bottlenecks.
        workers: Threads that compute weights of a model; None is one per core, at most eight. Never changes the result.
        overwrite: Replace an existing output, atomically.
        dry_run: Say what would be written, and of `new` what training it takes; write nothing.
        progress: Called with every step.

    Returns:
        What became of every tensor and the share of the model that was trained; or what trains, and what that takes.

    Raises:
        UsageError: an argument of a wrong type, nothing to insert, or no output.
        InputError: an input cannot be read.
        FitError: it does not fit the base, is more than tensors to be copied, or would be rounded; options that do not go
            together.
        NothingChangedError: the output would be the base.
        OutputExistsError, ResourceError, ProofError: see `surgery.engine.execute.execute`.
    """
    check_counts(workers=workers, rank=rank)
    check_counts(least=0, seed=seed)
    folder = output_path(output, dry_run=dry_run)
    if (new is None) == (what is None):
        raise UsageError(
            "an adapter to insert and a kind to begin were both named" if new else "nothing to insert was named",
            hint="name a file of trained tensors, or a kind of adapter to begin",
        )
    if what is not None:
        asked: dict[str, object] = {
            "rank": rank,
            "alpha": alpha,
            "targets": targets,
            "text": text,
            "calibration": calibration,
        }
        asked |= {"release": release, "residual": residual, "format": format}
        if odd := [name for name, value in asked.items() if value is not None]:
            raise UsageError(f"{odd[0]} belongs to an adapter that is begun, and tensors to insert were named")
        run = Run(workers=workers, overwrite=overwrite, progress=progress)
        return insert_delta(as_checkpoint(base), as_adapter(what, "what"), folder, run)
    from surgery.insertion.fresh import FreshOptions, fresh_adapter

    assert new is not None
    model = as_checkpoint(base)
    options = FreshOptions(
        kind=new,
        rank=_RANK if rank is None else rank,
        alpha=alpha,
        targets=targets or "attention",
        init="text" if text is not None and init == "default" else init,
        text=() if text is None else _tokens(text, model),
        calibration=None if calibration is None else open_calibration(calibration),
        release=None if release is None else as_checkpoint(release, "release"),
        residual=None if residual is None else local_path(residual, "residual"),
        seed=seed,
        format=format or ("adapterhub" if new == "bottleneck" else "peft"),
    )
    if options.init == "text" and text is None:
        raise UsageError("a prompt that begins as a text needs the text")
    return fresh_adapter(model, options, folder, overwrite=overwrite, progress=progress)


def _tokens(text: str, model: Checkpoint) -> tuple[int, ...]:
    """Tokens of a text, by the tokenizer beside the model.

    Raises:
        FitError: the text has none, or the package tokenizers is not installed.
        NotFoundError, MalformedError: the tokenizer cannot be read.
    """
    from surgery.onnx.run.tokenizer import open_tokenizer

    folder: Path = model.path if model.path.is_dir() else model.path.parent
    ids = open_tokenizer(folder).encode(text)
    if not ids:
        raise FitError("the text has no tokens")
    return tuple(ids)
