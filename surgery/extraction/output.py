# SPDX-License-Identifier: Apache-2.0
"""Write what was decided, as a PEFT folder or through the converter, and prove it before it gets its name."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery._version import __version__
from surgery.extraction.extraction_plan import ExtractionPlan, Stopwatch
from surgery.extraction.result import ExtractResult
from surgery.extraction.rows import rows_without
from surgery.extraction.write import TENSOR_FILE, fill
from surgery.progress import Callback, Progress
from surgery.verbs.convert import ConvertResult, convert
from surgery_formats.errors import FitError
from surgery_formats.files.output.folder import output_folder
from surgery_formats.text import show

__all__ = ["write", "write_converted"]


def write(
    plan: ExtractionPlan, out: Path, stopwatch: Stopwatch, *, overwrite: bool, progress: Callback | None
) -> ExtractResult:
    """A PEFT folder.

    Args:
        plan: What was decided.
        out: Its place.
        stopwatch: Laps for the timings.
        overwrite: Replace what is there, atomically.
        progress: Called with every step.

    Raises:
        OutputExistsError, ResourceError, ProofError: nothing is left behind.
    """
    calibration = () if plan.calibration is None else (plan.calibration.path,)
    inputs = (plan.checkpoints.base.path, plan.checkpoints.tuned.path, *calibration)
    with output_folder(out, plan.id, overwrite=overwrite, inputs=inputs) as folder:
        folder.write_small("adapter_config.json", plan.config)
        if any(dense.via == "resized" for dense in plan.storage.dense_tensors):
            for name, path in plan.checkpoints.tuned.side_files:
                if "token" in name or name in ("vocab.json", "merges.txt"):
                    folder.write_small(name, path.read_bytes())
        stopwatch.lap("syncing")
        file = folder.create(TENSOR_FILE, plan.nbytes)
        stage = file.path.parent
        filled = fill(file, plan.tensors, plan.metadata)
        stopwatch.lap("writing")
        file.finish({"xxh3": filled})
        stopwatch.lap("syncing")
        if progress is not None:
            progress(Progress(plan.nbytes, plan.nbytes, "proving"))
        result = plan.proved(stage)
        stopwatch.lap("proving")
        plan.checkpoints.check_unchanged()
        if plan.calibration is not None:
            plan.calibration.check_unchanged()
        folder.commit({**result.as_manifest(), "version": __version__})
    stopwatch.lap("committing")
    return replace(result, output=out)


def write_converted(
    plan: ExtractionPlan,
    out: Path,
    to: str,
    stopwatch: Stopwatch,
    most: int | None,
    *,
    allow_loss: bool,
    overwrite: bool,
    progress: Callback | None,
) -> ExtractResult:
    """Through a PEFT folder beside the output, by the converter with its own proof; says so where it takes more than `most` bytes."""
    if not out.parent.is_dir():
        raise FitError("no such folder to write into", file=out.parent)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem[:100]}.surgery-") as name:
        result = write(plan, Path(name) / "peft", stopwatch, overwrite=False, progress=None)

        def check(path: Path, done: ConvertResult) -> Mapping[str, Any]:
            nonlocal result
            found = result if plan.coding is None else plan.coded(path)
            files = [path] if path.is_file() else list(path.glob("*.safetensors"))
            lost = {
                entry.site: f"{to} cannot hold it ({entry.detail})"
                for entry in done.entries
                if entry.outcome == "dropped"
            }
            size = sum(file.stat().st_size for file in files)
            notes = [f"'{show(site)}': {why}" for site, why in lost.items()]
            if most is not None and size > most:
                notes.append(f"the budget is {most:,} bytes, which PEFT keeps to; {to} takes {size:,} for the same")
            result = replace(
                found,
                format=to,
                rows=rows_without(found.rows, plan.storage, lost),
                adapter_nbytes=size,
                warnings=(*found.warnings, *notes),
            )
            return {"extract": result.as_manifest()}

        try:
            convert(
                Path(name) / "peft",
                to,
                output=out,
                base=plan.checkpoints.base.path,
                factors=None if plan.coding is None else plan.coding.name,
                allow_loss=allow_loss,
                overwrite=overwrite,
                check=check,
                progress=progress,
            )
        except FitError as error:
            if error.file is None or name not in str(error.file):
                raise
            # the folder it speaks of is gone by the time anyone reads this
            raise FitError(
                error.message, file=plan.checkpoints.tuned.path, tensor=error.tensor, hint=error.hint
            ) from error
    stopwatch.lap("converting")
    return replace(result, output=out)
