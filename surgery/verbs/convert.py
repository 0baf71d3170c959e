# SPDX-License-Identifier: Apache-2.0
"""Convert: an adapter in another format, proved to do the same to every weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.engine.adapter_output import job_id, stored_as, write_adapter
from surgery.engine.inputs import (
    AdapterLike,
    CheckpointLike,
    StrPath,
    as_adapter,
    as_checkpoint,
    float_type,
    output_path,
)
from surgery.progress import Callback
from surgery_formats.adapters.format import Coded, Entry, Format, Rendering
from surgery_formats.adapters.registry import format_named
from surgery_formats.binding.bind import bind
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, ProofError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.identity import content_id
from surgery_formats.text import listing, show

if TYPE_CHECKING:
    from surgery.algebra.projections import LaidOut

__all__ = ["ConvertResult", "coded_as", "convert"]

Check = Callable[[Path, "ConvertResult"], Mapping[str, Any]]

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
    adapter: AdapterLike,
    to: str,
    *,
    output: StrPath | None = None,
    base: CheckpointLike | None = None,
    component: str | None = None,
    projections: str | None = None,
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
        adapter: File or folder of any known format, or an opened Adapter.
        to: Name of a format.
        output: File (kohya) or folder to make. Its parent must exist.
        base: The model it was trained on; needed where a format's names or shapes come from it, and checked where given.
        component: The part of a pipeline to convert, or the part an adapter without parts belongs to.
        projections: ``split`` (``qkv_proj`` and ``gate_up_proj`` as their parts) or ``fused``; by default they stay as they are. Where
            only the base knows how high the parts are it is needed; it may have either.
        dtype: ``keep`` (each tensor its own; float32 where a scale had to be multiplied in), ``fp32``, ``fp16``, ``bf16``.
        factors: ``int8`` or ``int4``, for a format that stores factors as codes (``compact``).
        allow_loss: Write what the format can hold although it cannot hold all.
        overwrite: Replace an existing output, atomically.
        dry_run: Say what would become of every update, write nothing.
        check: Called with where it was written and with the result, once it is proved and before it appears; what it returns goes into the
            manifest of a folder.
        progress: Called with every step.

    Raises:
        UsageError: an argument of a wrong type, or no output.
        InputError: adapter or base cannot be read.
        FitError: the adapter does not fit the base, something would be dropped, or a value does not fit the type.
        ProofError: what was written does something else.
        OutputExistsError, ResourceError: see `surgery_formats.files`.
    """
    wanted = coded_as(format_named(to), factors)
    kind = float_type(dtype)
    if kind is not None and isinstance(wanted, Coded):
        raise FitError(f"{to} stores factors as codes, and the rest as it is", hint="--factors chooses the codes")
    destination = output_path(output, dry_run=dry_run)
    source = as_adapter(adapter)
    checkpoint = None if base is None else as_checkpoint(base)
    source, left = _placed(source, checkpoint, component)
    given, made = source, None
    if projections is not None:
        if isinstance(wanted, Coded):  # the proof puts the parts together again, and codes are not what they were
            raise FitError(
                f"{to} keeps names as they are", hint="convert with --projections to peft first, then to compact"
            )
        from surgery.algebra.projections import laid_out

        made = laid_out(source, projections, wanted.name, checkpoint)
        source = made.adapter
    held = made is not None and made.held  # a base that has the given names, and none of the new ones
    _check_source(given if held else source, checkpoint)
    bound = None if held else checkpoint
    rendering = wanted.render(source, bound)
    dropped = [entry for entry in rendering.entries if entry.outcome == "dropped"]
    if dropped and not allow_loss:
        raise FitError(
            f"{to} cannot hold {len(dropped)} of {len(rendering.entries)} parts: "
            + "; ".join(f"'{show(entry.site)}' ({entry.detail})" for entry in dropped[:3])
            + (f"; and {len(dropped) - 3} more" if len(dropped) > 3 else ""),
            file=source.path,
            hint="--allow-loss leaves them out" if len(dropped) < len(rendering.entries) else None,
        )
    if not rendering.tensors:
        why = f": '{show(dropped[0].site)}' ({dropped[0].detail})" if dropped else ""
        raise FitError(f"{to} can hold nothing of this adapter{why}", file=source.path)
    rendering = stored_as(rendering, kind)
    traps = given.known_issues()
    result = ConvertResult(None, given.format, wanted.name, (*rendering.entries, *left), {}, traps)
    if destination is None:
        return result

    def prove(path: Path) -> dict[str, Any]:
        nonlocal result
        tolerance = _ROUNDING.get(kind, TOLERANCE) if kind else TOLERANCE
        errors, near = _proved(path, source, wanted, rendering, bound, tolerance)
        if made is not None:
            errors |= _proved_back(path, given, wanted, made, tolerance)
        entries = (replace(e, error=near[e.site]) if e.outcome == "approximated" else e for e in result.entries)
        result = replace(result, entries=tuple(entries), errors=errors)
        return {**result.as_json(), **(check(path, result) if check is not None else {})}

    facts = {"verb": "convert", "target": wanted.name, "projections": projections}
    written = write_adapter(
        rendering,
        wanted,
        destination,
        job_id(facts, source.tensors, rendering),
        prove,
        inputs=(source.path, *(() if checkpoint is None else (checkpoint.path,))),
        side_files={path.name: path for path in given.side_files},
        overwrite=overwrite,
        progress=progress,
    )
    if checkpoint is not None:
        checkpoint.check_unchanged()
    return replace(result, output=written)


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


def _placed(adapter: Adapter, base: Checkpoint | None, component: str | None) -> tuple[Adapter, tuple[Entry, ...]]:
    """The adapter with the component of every site known, or cut to the one chosen; and what that leaves out."""
    named = {site.component for site in adapter.updates} - {""}
    if component is not None and named:
        if component not in named:
            raise FitError(
                f"the adapter has no part '{component}'", file=adapter.path, hint=f"it has {listing(sorted(named))}"
            )
        kept = [site for site in adapter.updates if site.component == component]
        left = sorted(str(site) for site in adapter.updates.keys() - set(kept))
        return adapter.only(kept), tuple(Entry(name, "dropped", "not of the chosen part") for name in left)
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


def _proved(
    path: Path, source: Adapter, target: Format, rendering: Rendering, base: Checkpoint | None, tolerance: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Read back what lies at `path` and compare it with `source`, weight by weight.

    Returns:
        Errors by weight, and by site those of what is approximated.

    Raises:
        ProofError: it is not what was meant.
    """
    from surgery.engine.proof import compare, compare_prompt, restricted
    from surgery.engine.proof_approximate import measured

    written = target.read(path)
    if left := written.unconsumed():
        raise ProofError(
            f"{len(left)} tensors were written that nobody reads: {listing(t.name for t in left)}", file=path
        )
    errors: dict[str, float] = {}
    kept = {entry.site for entry in rendering.entries if entry.outcome != "dropped"}
    if source.prompt is not None and source.prompt.table.name in kept:
        errors |= compare_prompt(source.prompt, written)
    if rendering.held:
        parts = {site.component for site in rendering.held}
        if len(parts) == 1 and all(not site.component for site in written.updates):
            moved = {replace(s, component=min(parts)): chain for s, chain in written.updates.items()}
            written = replace(written, updates=moved)
    near = measured(rendering, written, tolerance)
    held = {site: chain for site, chain in rendering.held.items() if site not in near}
    rest = {site: chain for site, chain in written.updates.items() if site not in near}
    if held or (rest and rendering.held):
        errors |= compare(restricted(source, held), restricted(written, rest), base)
    _check_errors(errors, tolerance, path)
    for tensor in source.tensors:
        tensor.file.check_unchanged()
    return errors, {str(site): error for site, error in near.items()}


def _proved_back(path: Path, given: Adapter, target: Format, made: LaidOut, tolerance: float) -> dict[str, float]:
    """What lies at `path`, put under the names of `given` again, does what that does.

    Raises:
        ProofError: it does not.
    """
    from surgery.algebra.projections import given_names
    from surgery.engine.proof import compare, restricted

    written = given_names(given, target.read(path), made)
    errors = compare(restricted(given, {site: given.updates[site] for site in written.updates}), written, None)
    _check_errors(errors, tolerance, path)
    return errors


def _check_errors(errors: Mapping[str, float], tolerance: float, path: Path) -> None:
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        name = max(wrong, key=lambda one: wrong[one])
        raise ProofError(
            f"{len(wrong)} of {len(errors)} weights differ, '{name}' by {wrong[name]:.1e} of its greatest change "
            f"(at most {tolerance:.1e} is allowed)",
            file=path.name,
            hint="--dtype fp32 keeps more digits",
        )
