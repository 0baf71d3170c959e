# SPDX-License-Identifier: Apache-2.0
"""The proof of a written adapter: it is read back and must do to every weight what its source does.

How far a weight is from what its source makes of it `surgery.engine.weight_error` says. With a base both adapters are
bound to it, so that one name for a fused weight and two for its parts meet at the same bytes. Names are proved by the tables
that they were written by, read the other way: that those are the programs' own, golden files of the programs show. What a
format only approximates is compared by factors (`surgery.engine.factor_proof`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from surgery.engine.factor_proof import approximation_errors, relative
from surgery.engine.weight_error import ProofTarget, adds_nothing, largest, weight_error
from surgery_formats.adapters.experts import fused_of, taken_apart
from surgery_formats.adapters.format import Format, Rendering
from surgery_formats.adapters.registry import format_at
from surgery_formats.binding.bind import Binding, bind
from surgery_formats.binding.sizes import sized
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.consumption import check_consumed
from surgery_formats.canonical.prompts import SoftPrompt
from surgery_formats.canonical.site_names import common_names, in_component_of
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, InputError, ProofError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.views import whole
from surgery_formats.text import listing
from surgery_formats.threads import cores, one_thread
from surgery_formats.updates import Factor, Update, experts_of, is_replacing

__all__ = ["check_errors", "compare", "compare_prompt", "prove_rendering", "read_back", "restricted"]

_THREADS = 4  # more wait for memory and for each other


def read_back(target: Format, path: Path) -> Adapter:
    """The adapter that lies at `path`, in its written format.

    Raises:
        ProofError: the format does not read it, or a tensor was written that no update uses.
    """
    try:
        written = target.read(path)
    except (InputError, FitError) as error:
        why = f"{target.name} cannot read what was written: {error.message}"
        raise ProofError(why, file=error.file, tensor=error.tensor, hint=error.hint) from error
    check_consumed(written, ProofError)
    if not target.detect(path) and format_at(path) is None:
        raise ProofError(f"no format, {target.name} included, knows what was written as an adapter", file=path)
    return written


def prove_rendering(
    path: Path,
    source: Adapter,
    target: Format,
    rendering: Rendering,
    binding: Binding | None,
    tolerance: float,
    base: Checkpoint | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Read back what lies at `path` and compare it with what was rendered, weight by weight.

    Args:
        path: The written file or folder, before it has its final name.
        source: What was rendered.
        target: The format.
        rendering: Of `source`.
        binding: Of `source` to its base; None without a base.
        tolerance: Greatest error of a weight's delta, relative to its greatest value.
        base: The one that `source` has its sizes from.

    Returns:
        Errors by weight, and by site those of what is approximated.

    Raises:
        ProofError: it is not what was meant.
    """
    written = read_back(target, path)
    errors: dict[str, float] = {}
    dropped = {entry.site for entry in rendering.entries if entry.outcome == "dropped"}
    if source.prompt is not None and source.prompt.table.name not in dropped:
        errors |= compare_prompt(source.prompt, written)
    written = in_component_of(rendering.held, written, named=base is not None)
    approximated = approximation_errors(rendering, written, tolerance)
    held = {site: chain for site, chain in rendering.held.items() if site not in approximated}
    rest = {site: chain for site, chain in written.updates.items() if site not in approximated}
    if base is not None and (apart := source.unmergeable & held.keys()):
        sized_alike = sized(written, base)
        alone = {site: sized_alike.updates[site] for site in sized_alike.unmergeable}
        errors |= compare(
            restricted(source, {site: held[site] for site in apart}), restricted(sized_alike, alone), None
        )
        held = {site: chain for site, chain in held.items() if site not in apart}
        rest = {site: chain for site, chain in rest.items() if site not in alone}
    if held or (rest and rendering.held):
        kept_source = restricted(source, held)
        if binding is not None and held != dict(source.updates):
            # Without what was dropped or approximated it is another adapter: even a tie may be settled otherwise.
            binding = bind([(kept_source, 1.0)], binding.checkpoint)
        errors |= compare(kept_source, restricted(written, rest), binding)
    check_errors(errors, tolerance, path)
    for file in source.files:
        file.check_unchanged()
    return errors, {str(site): error for site, error in approximated.items()}


def check_errors(errors: Mapping[str, float], tolerance: float, path: Path) -> None:
    """Refuse errors above `tolerance`.

    Raises:
        ProofError: there are such errors.
    """
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        name = max(wrong, key=lambda name: wrong[name])
        raise ProofError(
            f"{len(wrong)} of {len(errors)} weights differ, '{name}' by {wrong[name]:.1e} of its greatest change "
            f"(at most {tolerance:.1e} is allowed)",
            file=path.name,
            hint='`dtype="fp32"` keeps more digits',
        )


def compare(source: Adapter, written: Adapter, binding: Binding | None) -> dict[str, float]:
    """The greatest error of every weight, relative to the greatest value the source adds to it.

    Args:
        source: As read; without what was dropped.
        written: As read back.
        binding: Of `source` to its base; None compares the two by their own names.

    Raises:
        ProofError: they touch different weights, or in different ways.
    """
    if binding is None:
        name = common_names([*source.updates, *written.updates])
        expected, actual = dict(_unbound(source.updates, name)), dict(_unbound(written.updates, name))
    else:
        # The written adapter is bound anew: this proves its names, which the source's binding cannot.
        again = bind([(written, 1.0)], binding.checkpoint)
        if again.untied != binding.untied:
            raise ProofError("only one of source and output parts the head from the embedding", file=written.path)
        expected, actual = _bound(binding), _bound(again)
    lost = sorted(expected.keys() - actual.keys())
    new = [name for name in sorted(actual.keys() - expected.keys()) if not adds_nothing(actual[name])]
    if lost or new:
        raise ProofError(
            f"{len(lost)} weights are missing ({listing(lost)}), {len(new)} are new ({listing(new)})", file=written.path
        )
    names = sorted(expected)
    with one_thread(), ThreadPoolExecutor(min(cores(), _THREADS), "surgery-proof") as pool:
        errors = list(pool.map(lambda name: weight_error(name, expected[name], actual[name], written), names))
    return dict(zip(names, errors, strict=True))


def compare_prompt(prompt: SoftPrompt, written: Adapter) -> dict[str, float]:
    """The greatest error of the virtual tokens, relative to their greatest value.

    Raises:
        ProofError: they are not there, or of another kind or shape.
    """
    twin = written.prompt
    if twin is None or twin.table.shape != prompt.table.shape or replace(twin, table=prompt.table) != prompt:
        raise ProofError(f"the virtual tokens {list(prompt.table.shape)} are not in it", file=written.path)
    mine, theirs = (Factor.of(side.table).load(DType.F64) for side in (prompt, twin))
    return {prompt.table.name: relative(largest(mine - theirs), largest(mine))}


def _bound(binding: Binding) -> dict[str, ProofTarget]:
    """Updates by the base's names, so that fused and separate names of one weight meet."""
    targets = {}
    for (component, name), edit in binding.edits.items():
        pieces = tuple((operation.update, operation.view) for operation in edit.operations)
        shape = edit.source.shape
        value = edit.source if edit.replaced is not None else None
        targets[f"{component}/{name}" if component else name] = ProofTarget(shape, pieces, value)
    return targets


def _unbound(
    updates: Mapping[Site, tuple[Update, ...]], name: Callable[[Site], str]
) -> Iterator[tuple[str, ProofTarget]]:
    """Updates by the adapter's own names; stacked experts one by one."""
    for site, chain in updates.items():
        if len(chain) == 1 and experts_of(chain[0]):
            apart: list[tuple[str, Update]] = [*taken_apart(site.path, chain[0], fused_of(site, None))]
            for path, expert in apart or [(f"{site}[{row}]", part) for row, part in chain[0].parts()]:
                yield path, ProofTarget(expert.shape, ((expert, whole(expert.shape)),))
            continue
        value = next((Plain.of(update.stored) for update in chain if is_replacing(update)), None)
        rest = tuple((update, whole(update.shape)) for update in chain if not is_replacing(update))
        shape = value.shape if value else (max(u.shape[0] for u, _ in rest), rest[0][0].shape[1])
        yield name(site), ProofTarget(shape, rest, value)


def restricted(adapter: Adapter, held: Mapping[Site, tuple[Update, ...]]) -> Adapter:
    """The adapter with the updates in `held` alone, so that it can be compared with what was written of them."""
    used = {tensor.name for chain in held.values() for update in chain for tensor in update.tensors}
    tensors = tuple(tensor for tensor in adapter.tensors if tensor.name in used)
    return replace(adapter, updates=dict(held), tensors=tensors, ignored=(), prompt=None)
