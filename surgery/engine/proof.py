# SPDX-License-Identifier: Apache-2.0
"""The proof of a written adapter: it is read back and must do to every weight what its source does.

Low-rank parts are compared as the dense deltas they stand for, in float64, a few rows at a time; magnitudes, replaced
values and token rows as they are. With a base both adapters are bound to it, so that one name for a fused weight and
two for its parts meet at the same bytes. Names are proved by the tables that they were written by, read the other way: that
those are the programs' own, golden files of the programs show. What a format only approximates is compared by factors
(`surgery.engine.factor_proof`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy

from surgery.engine.execute import cores
from surgery.engine.factor_proof import (
    approximation_errors,
    relative,
    scale_error,
    tensor_error,
)
from surgery_formats.adapters.experts import fused_of, taken_apart
from surgery_formats.adapters.format import Format, Rendering
from surgery_formats.adapters.registry import format_at
from surgery_formats.adapters.rows import row_slice
from surgery_formats.arrays import Array, namespace
from surgery_formats.binding.bind import Binding, bind
from surgery_formats.binding.sizes import sized
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.consumption import check_consumed
from surgery_formats.canonical.prompts import SoftPrompt
from surgery_formats.canonical.site_names import common_names
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, InputError, ProofError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.storage.base import Storage, read_values
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.apply import Apply, apply_chain
from surgery_formats.tensors.views import View, whole
from surgery_formats.text import listing
from surgery_formats.threads import one_thread
from surgery_formats.updates import (
    Factor,
    LoRA,
    Update,
    experts_of,
    is_directed,
    is_replacing,
    low_rank_part,
    settings,
)
from surgery_formats.updates.weights import HeldWeight

__all__ = ["check_errors", "compare", "compare_prompt", "prove_rendering", "read_back", "restricted"]

_THREADS = 4  # more wait for memory and for each other
_BLOCK_ELEMENTS = 1 << 20  # 8 MB of float64 per side


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
    components = {site.component for site in rendering.held}
    if len(components) == 1 and all(not site.component for site in written.updates):
        moved = {replace(s, component=min(components)): chain for s, chain in written.updates.items()}
        written = replace(written, updates=moved)
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


@dataclass(frozen=True)
class _ProofTarget:
    """All that an adapter does to one weight.

    Attributes:
        shape: Of the matrix the views look into.
        pieces: Updates and where in it they act.
        value: What replaces the weight first.
    """

    shape: tuple[int, int]
    pieces: tuple[tuple[Update, View], ...]
    value: Storage | None = None


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
    new = [name for name in sorted(actual.keys() - expected.keys()) if not _adds_nothing(actual[name])]
    if lost or new:
        raise ProofError(
            f"{len(lost)} weights are missing ({listing(lost)}), {len(new)} are new ({listing(new)})", file=written.path
        )
    names = sorted(expected)
    with one_thread(), ThreadPoolExecutor(min(cores(), _THREADS), "surgery-proof") as pool:
        errors = list(pool.map(lambda name: _error(name, expected[name], actual[name], written), names))
    return dict(zip(names, errors, strict=True))


def _adds_nothing(target: _ProofTarget) -> bool:
    """Whether its rows of B are zeros: they stand for what was not trained, where a format stacks it with what was."""
    for update, view in target.pieces:
        lora = update.low_rank()
        if lora is None or _largest(lora.B.load(DType.F64)[view.row_origin :][: view.shape[0]]):
            return False
    return target.value is None


def compare_prompt(prompt: SoftPrompt, written: Adapter) -> dict[str, float]:
    """The greatest error of the virtual tokens, relative to their greatest value.

    Raises:
        ProofError: they are not there, or of another kind or shape.
    """
    twin = written.prompt
    if twin is None or twin.table.shape != prompt.table.shape or replace(twin, table=prompt.table) != prompt:
        raise ProofError(f"the virtual tokens {list(prompt.table.shape)} are not in it", file=written.path)
    mine, theirs = (Factor.of(side.table).load(DType.F64) for side in (prompt, twin))
    return {prompt.table.name: relative(_largest(mine - theirs), _largest(mine))}


def _bound(binding: Binding) -> dict[str, _ProofTarget]:
    """Updates by the base's names, so that fused and separate names of one weight meet."""
    targets = {}
    for (component, name), edit in binding.edits.items():
        pieces = tuple((operation.update, operation.view) for operation in edit.operations)
        shape = edit.source.shape
        value = edit.source if edit.replaced is not None else None
        targets[f"{component}/{name}" if component else name] = _ProofTarget(shape, pieces, value)
    return targets


def _unbound(
    updates: Mapping[Site, tuple[Update, ...]], name: Callable[[Site], str]
) -> Iterator[tuple[str, _ProofTarget]]:
    """Updates by the adapter's own names; stacked experts one by one."""
    for site, chain in updates.items():
        if len(chain) == 1 and experts_of(chain[0]):
            apart: list[tuple[str, Update]] = [*taken_apart(site.path, chain[0], fused_of(site, None))]
            for path, expert in apart or [(f"{site}[{row}]", part) for row, part in chain[0].parts()]:
                yield path, _ProofTarget(expert.shape, ((expert, whole(expert.shape)),))
            continue
        value = next((Plain.of(update.stored) for update in chain if is_replacing(update)), None)
        rest = tuple((update, whole(update.shape)) for update in chain if not is_replacing(update))
        shape = value.shape if value else (max(u.shape[0] for u, _ in rest), rest[0][0].shape[1])
        yield name(site), _ProofTarget(shape, rest, value)


def _error(name: str, expected: _ProofTarget, actual: _ProofTarget, written: Adapter) -> float:
    magnitudes = [_magnitudes(target) for target in (expected, actual)]
    if expected.shape != actual.shape or [key for key, _ in magnitudes[0]] != [key for key, _ in magnitudes[1]]:
        raise ProofError("the written update is of a different kind than the source's", file=written.path, tensor=name)
    error = 0.0
    for (_, mine), (_, theirs) in zip(*magnitudes, strict=True):
        error = max(error, relative(_largest(mine - theirs), _largest(mine)))
    if (expected.value is None) != (actual.value is None):
        raise ProofError(
            "one of source and output replaces this weight, the other does not", file=written.path, tensor=name
        )
    for by_factors in (_tensor_error, _scale_error):
        if (known := by_factors(expected, actual)) is not None:
            return max(error, known)
    return max(error, _delta_error(expected, actual))


def _magnitudes(target: _ProofTarget) -> list[tuple[tuple[object, ...], Array]]:
    """Trained lengths, with what they belong to; those of rows that follow each other are one vector, whoever holds them."""
    found: list[tuple[tuple[object, ...], Array]] = []
    bands: dict[str, list[tuple[int, Array]]] = {}
    for update, view in target.pieces:
        if not is_directed(update):
            continue
        lengths = update.magnitude.load(DType.F64)
        straight = not view.transposed and isinstance(view.rows, range) and view.rows.step == 1 and len(view.rows)
        if update.per_row and straight:
            own = lengths.reshape(-1)[view.row_origin : view.row_origin + len(view.rows)]
            bands.setdefault(update.kind, []).append((view.rows[0], own))
        else:
            found.append(((update.kind, view, update.per_row), lengths))
    for kind, parts in bands.items():
        parts.sort(key=lambda part: part[0])
        rows = [row for start, own in parts for row in range(start, start + len(own))]
        joined = namespace(parts[0][1]).concat([own for _, own in parts]) if len(parts) > 1 else parts[0][1]
        found.append(((kind, tuple(rows)), joined))
    return found


def _added(update: Update) -> Update:
    """What an update adds to its weight, as a LoRA if it has that form.

    The row lengths of a DoRA are compared on their own.
    """
    return low_rank_part(update) or update


def _tensor_error(expected: _ProofTarget, actual: _ProofTarget) -> float | None:
    """The error of the stored tensors if the delta is neither low-rank nor stored in full; else None."""
    if all(_has_plain_delta(update) for target in (expected, actual) for update, _ in target.pieces):
        return None
    pairs = list(zip(expected.pieces, actual.pieces, strict=False))
    if len(expected.pieces) == len(actual.pieces) and all(_alike(*pair) for pair in pairs):
        return max(tensor_error(mine, theirs) for (mine, _), (theirs, _) in pairs)
    known = (update.effect != "maps" and all(update.shape) for t in (expected, actual) for update, _ in t.pieces)
    return None if all(known) else math.inf


def _has_plain_delta(update: Update) -> bool:
    stored_in_full = update.effect != "maps" and len(update.factors()) == 1 and all(update.shape)
    return stored_in_full or low_rank_part(update) is not None


def _alike(piece: tuple[Update, View], other: tuple[Update, View]) -> bool:
    (mine, view), (theirs, seen) = piece, other
    return type(mine) is type(theirs) and view == seen and settings(mine) == settings(theirs)


def _scale_error(expected: _ProofTarget, actual: _ProofTarget) -> float | None:
    """The error of the scale, where rows are changed by low-rank updates with equal factors; else None."""
    if expected.value or actual.value:
        return None
    if len(expected.pieces) == len(actual.pieces) == 1:
        (mine, view), (theirs, seen) = expected.pieces[0], actual.pieces[0]
        if view == seen:
            return scale_error(_added(mine), _added(theirs))
    bands, others = _bands(expected), _bands(actual)
    if not bands or not others:
        return None
    edges = sorted({edge for start, stop, _ in (*bands, *others) for edge in (start, stop)})
    worst = 0.0
    for start, stop in pairwise(edges):
        left, right = _band(bands, start, stop), _band(others, start, stop)
        if left is None and right is None:
            continue
        error = scale_error(left, right) if left and right else None
        if error is None:
            return None
        worst = max(worst, error)
    return worst


def _bands(target: _ProofTarget) -> list[tuple[int, int, LoRA]]:
    """Rows of the matrix with the LoRA that changes them, from top to bottom; nothing if some are changed in another way."""
    bands = []
    for update, view in target.pieces:
        lora, (height, width) = low_rank_part(update), view.shape
        plain = not view.transposed and isinstance(view.rows, range) and view.rows.step == 1
        if lora is None or not plain or view.cols != range(target.shape[1]) or lora.shape[1] != width or not height:
            return []
        start = view.rows[0]
        bands.append((start, start + height, row_slice(lora, view.row_origin, view.row_origin + height)))
    bands.sort(key=lambda band: band[:2])
    return [] if any(one[1] > other[0] for one, other in pairwise(bands)) else bands


def _band(bands: Sequence[tuple[int, int, LoRA]], start: int, stop: int) -> LoRA | None:
    """The LoRA of rows ``[start, stop)``, which lie in one band or in none."""
    found = next((band for band in bands if band[0] <= start and stop <= band[1]), None)
    return row_slice(found[2], start - found[0], stop - found[0]) if found else None


def _delta_error(expected: _ProofTarget, actual: _ProofTarget) -> float:
    worst = largest = 0.0
    mine, theirs = _applied(expected), _applied(actual)
    step = max(1, _BLOCK_ELEMENTS // max(expected.shape[1], 1))
    for start in range(0, expected.shape[0], step):
        stop = min(start + step, expected.shape[0])
        a, b = _block(expected, mine, start, stop), _block(actual, theirs, start, stop)
        worst = max(worst, _largest(a - b))
        largest = max(largest, _largest(a))
    return relative(worst, largest)


def _applied(target: _ProofTarget) -> list[tuple[View, Apply]]:
    nothing = HeldWeight.zeros(target.shape, DType.F64)
    return [(view, _added(update).prepare(nothing)) for update, view in target.pieces]


def _block(target: _ProofTarget, chain: Sequence[tuple[View, Apply]], start: int, stop: int) -> Array:
    """Rows ``[start, stop)`` of what becomes of a weight of zeros, or of the replaced values."""
    if target.value is not None:
        block = read_values(target.value, start, stop, DType.F64)
    else:
        block = numpy.zeros((stop - start, target.shape[1]))
    apply_chain(chain, block, start, stop)
    return block


def _largest(values: Array) -> float:
    """The greatest value; infinite if one is no number, which `max` of Python would pass over."""
    found = float(abs(values).max())
    return math.inf if math.isnan(found) else found


def restricted(adapter: Adapter, held: Mapping[Site, tuple[Update, ...]]) -> Adapter:
    """The adapter with the updates in `held` alone, so that it can be compared with what was written of them."""
    used = {tensor.name for chain in held.values() for update in chain for tensor in update.tensors}
    tensors = tuple(tensor for tensor in adapter.tensors if tensor.name in used)
    return replace(adapter, updates=dict(held), tensors=tensors, ignored=(), prompt=None)
