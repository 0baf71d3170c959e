# SPDX-License-Identifier: Apache-2.0
"""Write what was decided, as a PEFT folder or through the converter, and prove it before it gets its name."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery._version import __version__
from surgery.extraction.extraction_plan import ExtractionPlan, Watch
from surgery.extraction.result import ExtractResult
from surgery.extraction.rows import without
from surgery.extraction.write import TENSOR_FILE, fill
from surgery.progress import Callback, Progress
from surgery.verbs.convert import ConvertResult, convert
from surgery_formats.errors import FitError
from surgery_formats.files.output.folder import output_folder
from surgery_formats.text import show

__all__ = ["write", "write_converted"]


def write(job: ExtractionPlan, out: Path, watch: Watch, *, overwrite: bool, progress: Callback | None) -> ExtractResult:
    """A PEFT folder.

    Args:
        job: What was decided.
        out: Its place.
        watch: Laps for the timings.
        overwrite: Replace what is there, atomically.
        progress: Called with every step.

    Raises:
        OutputExistsError, ResourceError, ProofError: nothing is left behind.
    """
    given = () if job.calibration is None else (job.calibration.path,)
    inputs = (job.both.base.path, job.both.tuned.path, *given)
    with output_folder(out, job.id, overwrite=overwrite, inputs=inputs) as folder:
        folder.write_small("adapter_config.json", job.config)
        if any(kept.via == "resized" for kept in job.forms.kept):
            for name, path in job.both.tuned.side_files:
                if "token" in name or name in ("vocab.json", "merges.txt"):
                    folder.write_small(name, path.read_bytes())
        watch.lap("syncing")
        file = folder.create(TENSOR_FILE, job.nbytes)
        stage = file.path.parent
        filled = fill(file, job.tensors, job.metadata)
        watch.lap("writing")
        file.finish({"xxh3": filled})
        watch.lap("syncing")
        if progress is not None:
            progress(Progress(job.nbytes, job.nbytes, "proving"))
        result = job.proved(stage)
        watch.lap("proving")
        job.both.check_unchanged()
        if job.calibration is not None:
            job.calibration.check_unchanged()
        folder.commit({**result.as_json(), "version": __version__})
    watch.lap("committing")
    return replace(result, output=out)


def write_converted(
    job: ExtractionPlan,
    out: Path,
    to: str,
    watch: Watch,
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
        result = write(job, Path(name) / "peft", watch, overwrite=False, progress=None)

        def check(path: Path, done: ConvertResult) -> Mapping[str, Any]:
            nonlocal result
            found = result if job.coding is None else job.coded(path)
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
                rows=without(found.rows, job.forms, lost),
                adapter_nbytes=size,
                warnings=(*found.warnings, *notes),
            )
            return {"extract": result.as_json()}

        try:
            convert(
                Path(name) / "peft",
                to,
                output=out,
                base=job.both.base.path,
                factors=None if job.coding is None else job.coding.name,
                allow_loss=allow_loss,
                overwrite=overwrite,
                check=check,
                progress=progress,
            )
        except FitError as error:
            if error.file is None or name not in str(error.file):
                raise
            # the folder it speaks of is gone by the time anyone reads this
            raise FitError(error.message, file=job.both.tuned.path, tensor=error.tensor, hint=error.hint) from error
    watch.lap("converting")
    return replace(result, output=out)
