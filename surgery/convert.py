# SPDX-License-Identifier: Apache-2.0
"""Convert: an adapter in another format, proved to do the same to every weight."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from surgery import __version__
from surgery.progress import Callback, Progress
from surgery_formats.adapter import Adapter
from surgery_formats.adapters.format import Coded, Entry, Format, NewTensor, Rendering
from surgery_formats.adapters.registry import format_named, read_adapter
from surgery_formats.binding import bind
from surgery_formats.checkpoint import Checkpoint, open_checkpoint
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.folder import output_folder
from surgery_formats.files.safetensors import layout, reference_order
from surgery_formats.files.single import write_single
from surgery_formats.identity import content_id, fingerprint
from surgery_formats.text import listing, show

if TYPE_CHECKING:
    import torch

__all__ = ["ConvertResult", "coded_as", "convert"]

Check = Callable[[Path], Mapping[str, Any]]
Put = Callable[[bytes | memoryview, int], None]

TOLERANCE = 1e-6
"""Greatest error of a weight's delta relative to its greatest value: what float32 factors allow."""
_ROUNDING = {
    DType.F16: 2.0**-7,
    DType.BF16: 2.0**-4,
}  # 16 units in the last place: both factors are rounded, and products add up


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did, or (dry run) would do.

    Attributes:
        output: File or folder; None for a dry run.
        source: Format it was read from.
        target: Format it was written in.
        entries: What became of every update.
        errors: Per weight that is not approximated, the greatest error found by the proof relative to the greatest value; empty for a
            dry run.
        warnings: What the user should know.
    """

    output: Path | None
    source: str
    target: str
    entries: tuple[Entry, ...]
    errors: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def max_error(self) -> float:
        """The worst weight's error; what is approximated not counted."""
        return max(self.errors.values(), default=0.0)

    @property
    def max_approximation(self) -> float:
        """The worst error of what is approximated, relative to the norm of its change."""
        return max((entry.error for entry in self.entries if entry.error is not None), default=0.0)

    def as_json(self) -> dict[str, Any]:
        """For ``--json`` and the manifest; no paths."""
        return {
            "verb": "convert",
            "from": self.source,
            "to": self.target,
            "entries": [
                {"site": e.site, "outcome": e.outcome, "detail": e.detail}
                | ({} if e.error is None else {"error": e.error})
                for e in self.entries
            ],
            "errors": dict(self.errors),
            "max_error": self.max_error,
            "max_approximation": self.max_approximation,
            "warnings": list(self.warnings),
        }


def convert(
    adapter: str | os.PathLike[str],
    to: str,
    output: str | os.PathLike[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    component: str | None = None,
    dtype: str = "keep",
    factors: str | None = None,
    allow_loss: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    check: Check | None = None,
    progress: Callback | None = None,
) -> ConvertResult:
    """Write an adapter in another format and prove it.

    Args:
        adapter: File or folder of any known format.
        to: Name of a format.
        output: File (kohya) or folder to make. Its parent must exist.
        base: The model it was trained on; needed where a format's names or shapes come from it, and checked where given.
        component: The part of a pipeline to convert, or the part an adapter without parts belongs to.
        dtype: ``keep`` (each tensor its own; float32 where a scale had to be multiplied in), ``fp32``, ``fp16``, ``bf16``.
        factors: ``int8`` or ``int4``, for a format that stores factors as codes (``compact``).
        allow_loss: Write what the format can hold although it cannot hold all.
        overwrite: Replace an existing output, atomically.
        dry_run: Say what would become of every update, write nothing.
        check: Called with what was written and proved, before it appears; what it returns goes into the manifest of a folder.
        progress: Called with every step.

    Raises:
        InputError: adapter or base cannot be read.
        FitError: the adapter does not fit the base, something would be dropped, or a value does not fit the type.
        ProofError: what was written does something else.
        OutputExistsError, ResourceError: see `surgery_formats.files`.
    """
    wanted = coded_as(format_named(to), factors)
    kind = _float_type(dtype)
    if kind is not None and isinstance(wanted, Coded):
        raise FitError(f"{to} stores factors as codes, and the rest as it is", hint="--factors chooses the codes")
    source = read_adapter(adapter)
    checkpoint = None if base is None else open_checkpoint(base)
    source, left = _placed(source, checkpoint, component)
    _check_source(source, checkpoint)
    rendering = wanted.render(source, checkpoint)
    dropped = [entry for entry in rendering.entries if entry.outcome == "dropped"]
    if dropped and not allow_loss:
        raise FitError(
            f"{to} cannot hold {len(dropped)} of {len(rendering.entries)} parts: "
            + "; ".join(f"'{show(entry.site)}' ({entry.detail})" for entry in dropped[:3])
            + (f"; and {len(dropped) - 3} more" if len(dropped) > 3 else ""),
            file=source.path,
            hint="--allow-loss leaves them out",
        )
    if not rendering.tensors:
        raise FitError(f"{to} can hold nothing of this adapter", file=source.path)
    if kind is not None:
        rendering = replace(rendering, tensors=tuple(_cast(tensor, kind) for tensor in rendering.tensors))
    result = ConvertResult(None, source.format, wanted.name, (*rendering.entries, *left), {}, source.traps)
    if dry_run:
        return result
    if output is None:
        raise FitError("no output was named")
    tolerance = _ROUNDING.get(kind, TOLERANCE) if kind else TOLERANCE
    job = _Job(source, checkpoint, wanted, rendering, tolerance, check, progress)
    write = _write_file if wanted.single_file else _write_folder
    made, proved = write(job, Path(output), result, overwrite=overwrite)
    if checkpoint is not None:
        checkpoint.check_unchanged()
    return replace(proved, output=made)


def coded_as(target: Format, factors: str | None) -> Format:
    """`target` with factors of the type `factors`, if one was named.

    Raises:
        FitError: it stores no codes, or none of this type.
    """
    if factors is None:
        return target
    if not isinstance(target, Coded):
        raise FitError(
            f"{target.name} stores factors as numbers, not as {show(factors, 40)} codes", hint="--to compact"
        )
    return target.with_factors(factors)


def _float_type(dtype: str) -> DType | None:
    if dtype == "keep":
        return None
    try:
        found = DType.parse(dtype)
    except ValueError as error:
        raise FitError(str(error), hint="fp32, fp16, bf16 or keep") from error
    if not found.is_float:
        raise FitError(f"factors cannot be stored as {found.label}", hint="fp32, fp16, bf16 or keep")
    return found


def _cast(tensor: NewTensor, dtype: DType) -> NewTensor:
    """Scalars (kohya's alpha) keep their type: they are no weights, and rounding one would change every delta."""
    return tensor if not tensor.shape or not tensor.dtype.is_float else replace(tensor, dtype=dtype)


def _placed(adapter: Adapter, base: Checkpoint | None, component: str | None) -> tuple[Adapter, tuple[Entry, ...]]:
    """The adapter with the component of every site known, or cut to the one chosen; and what that leaves out."""
    named = {site.component for site in adapter.updates} - {""}
    if component is not None and named:
        if component not in named:
            raise FitError(
                f"the adapter has no part '{component}'", file=adapter.path, hint=f"it has {listing(sorted(named))}"
            )
        kept = {site: chain for site, chain in adapter.updates.items() if site.component == component}
        out = {
            tensor.name
            for site in adapter.updates.keys() - kept.keys()
            for u in adapter.updates[site]
            for tensor in u.tensors
        }
        tensors = tuple(tensor for tensor in adapter.tensors if tensor.name not in out)
        left = tuple(
            Entry(str(site), "dropped", "not of the chosen part") for site in adapter.updates.keys() - kept.keys()
        )
        return replace(adapter, updates=kept, tensors=tensors), tuple(sorted(left, key=lambda entry: entry.site))
    if base is None or not base.is_pipeline or named:
        return adapter, ()
    fitting = [component] if component is not None else _fitting(adapter, base)
    if len(fitting) != 1 or fitting[0] not in base.components:
        raise FitError(
            f"which part of the pipeline it belongs to is not known (it fits {listing(fitting) or 'none'})",
            file=adapter.path,
            hint=f"name it with --component; the base has {listing(sorted(base.components))}",
        )
    moved = {replace(site, component=fitting[0]): chain for site, chain in adapter.updates.items()}
    return replace(adapter, updates=moved), ()


def _fitting(adapter: Adapter, base: Checkpoint) -> list[str]:
    """Parts of a pipeline that every update of the adapter fits, by names and shapes."""
    found = []
    for name in sorted(base.components):
        moved = {replace(site, component=name): chain for site, chain in adapter.updates.items()}
        try:
            bind([(replace(adapter, updates=moved), 1.0)], base)
        except FitError:
            continue
        found.append(name)
    return found


def _check_source(source: Adapter, base: Checkpoint | None) -> None:
    """Refuse an adapter with tensors nobody uses, and a base it was not made for."""
    if left := source.unconsumed():
        raise FitError(f"{len(left)} tensors have no use: {listing(tensor.name for tensor in left)}", file=source.path)
    if base is None or not source.updates:
        return
    bind([(source, 1.0)], base)
    if source.base_id and source.base_id != (actual := content_id(base)):
        raise FitError(
            f"was made for a base with content id {source.base_id[:16]}..., this base has {actual[:16]}...",
            file=source.path,
        )


@dataclass(frozen=True)
class _Job:
    source: Adapter
    base: Checkpoint | None
    target: Format
    rendering: Rendering
    tolerance: float
    check: Check | None
    progress: Callback | None

    def proved(self, path: Path, result: ConvertResult) -> ConvertResult:
        """`result` with the errors of what lies at `path`, which is read back and compared."""
        from surgery.convert_approximate import measured
        from surgery.convert_proof import compare, restricted

        written = self.target.read(path)
        if left := written.unconsumed():
            raise ProofError(
                f"{len(left)} tensors were written that nobody reads: {listing(t.name for t in left)}", file=path
            )
        if not self.rendering.held:
            return result
        parts = {site.component for site in self.rendering.held}
        if len(parts) == 1 and all(not site.component for site in written.updates):
            written = replace(
                written, updates={replace(s, component=min(parts)): c for s, c in written.updates.items()}
            )
        near = measured(self.rendering, written, self.tolerance)
        held = {site: chain for site, chain in self.rendering.held.items() if site not in near}
        rest = restricted(written, {site: chain for site, chain in written.updates.items() if site not in near})
        errors = compare(restricted(self.source, held), rest, self.base) if held or rest.updates else {}
        wrong = {name: error for name, error in errors.items() if not error <= self.tolerance}
        if wrong:
            name = max(wrong, key=lambda one: wrong[one])
            raise ProofError(
                f"{len(wrong)} of {len(errors)} weights differ, '{name}' by {wrong[name]:.1e} of its greatest change "
                f"(at most {self.tolerance:.1e} is allowed)",
                file=path.name,
                hint="--dtype fp32 keeps more digits",
            )
        for tensor in self.source.tensors:
            tensor.file.check_unchanged()
        by_name = {str(site): error for site, error in near.items()}
        entries = (
            replace(entry, error=by_name[entry.site]) if entry.outcome == "approximated" else entry
            for entry in result.entries
        )
        return replace(result, entries=tuple(entries), errors=errors)

    @property
    def id(self) -> str:
        """Names the job by its inputs' contents and its options."""
        small = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(self.rendering.small_files.items())}
        tensors = [(tensor.name, tensor.dtype.label, tensor.shape) for tensor in self.rendering.tensors]
        files = sorted({fingerprint(tensor.file) for tensor in self.source.tensors})
        facts = [__version__, "convert", self.target.name, small, dict(self.rendering.metadata), tensors, files]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _ranges(rendering: Rendering) -> tuple[bytes, dict[str, tuple[int, int]], int]:
    entries = reference_order((tensor.name, tensor.dtype, tensor.shape) for tensor in rendering.tensors)
    header, ranges = layout(entries, rendering.metadata)
    return header, ranges, max((offset + size for offset, size in ranges.values()), default=len(header))


def _fill(job: _Job, put: Put) -> str:
    """Write header and tensors in file order; the xxh3-128 of the whole."""
    header, ranges, total = _ranges(job.rendering)
    state = xxhash.xxh3_128(header)
    put(header, 0)
    by_name = {tensor.name: tensor for tensor in job.rendering.tensors}
    for name, (offset, _) in ranges.items():
        data = _bytes_of(by_name[name])
        put(data, offset)
        state.update(data)
        if job.progress is not None:
            job.progress(Progress(offset + len(data), total, "writing"))
    return state.hexdigest()


def _bytes_of(tensor: NewTensor) -> memoryview:
    """The tensor's values, rounded once.

    Raises:
        FitError: a value is too large for the stored type.
    """
    import torch

    values: torch.Tensor = tensor.load()
    if tuple(values.shape) != tensor.shape:
        raise ProofError(f"made with shape {list(values.shape)} instead of {list(tensor.shape)}", tensor=tensor.name)
    stored = values.to(tensor.dtype.torch).contiguous()
    if tensor.dtype.is_float and not bool(torch.isfinite(stored).all()):
        raise FitError(f"NaN, Inf, or a value too large for {tensor.dtype.label}", tensor=tensor.name)
    return memoryview(stored.reshape(-1).view(torch.uint8).numpy().data).cast("B")


def _inputs(job: _Job) -> tuple[Path, ...]:
    return (job.source.path, *(() if job.base is None else (job.base.path,)))


def _write_file(job: _Job, out: Path, result: ConvertResult, *, overwrite: bool) -> tuple[Path, ConvertResult]:
    if out.suffix != ".safetensors":
        raise FitError("the name must end in .safetensors", file=out)
    total = _ranges(job.rendering)[2]
    proved: list[ConvertResult] = []

    def prove(path: Path) -> None:
        proved.append(job.proved(path, result))
        if job.check is not None:
            job.check(path)

    made = write_single(
        out,
        job.id,
        total,
        lambda file: (_fill(job, file.pwrite), None)[1],
        overwrite=overwrite,
        inputs=_inputs(job),
        prove=prove,
    )
    return made, proved[-1]


def _write_folder(job: _Job, out: Path, result: ConvertResult, *, overwrite: bool) -> tuple[Path, ConvertResult]:
    total = _ranges(job.rendering)[2]
    with output_folder(out, job.id, overwrite=overwrite, inputs=_inputs(job)) as folder:
        for name, data in job.rendering.small_files.items():
            folder.write_small(name, data)
        for path in job.source.side_files:
            if path.name not in job.rendering.small_files:
                folder.write_small(path.name, path.read_bytes())
        file = folder.create(job.rendering.tensor_file, total)
        stage = file.path.parent
        file.finish({"xxh3": _fill(job, file.pwrite)})
        proved = job.proved(stage, result)
        facts = job.check(stage) if job.check is not None else {}
        folder.commit({**proved.as_json(), **facts, "version": __version__})
    return out, proved
