# SPDX-License-Identifier: Apache-2.0
"""Split and fuse the projections of an adapter (``qkv_proj``, ``gate_up_proj``); nothing is approximated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

from surgery.algebra.combined_adapter import combined_adapter
from surgery.algebra.projection_rows import cut_rows, join_rows
from surgery.engine.proof import check_errors, compare, restricted
from surgery_formats.adapters.format import Format
from surgery_formats.binding.sizes import component_of
from surgery_formats.canonical.adapter import Adapter, Site, WeightedAdapter
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, ProofError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.families.projections import PROJECTIONS, FusedProjection, heights_by_config
from surgery_formats.models.names import extent
from surgery_formats.text import show
from surgery_formats.updates import Update, in_full

__all__ = ["LAYOUTS", "Layout", "LayoutChange", "change_layout", "prove_layout"]

Layout = Literal["split", "fused"]
LAYOUTS: tuple[Layout, ...] = ("split", "fused")
Heights = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LayoutChange:
    """An adapter under other names.

    Attributes:
        adapter: The adapter under its new names.
        heights: ``{path of the whole projection: rows of its parts}`` of all that changed.
        held: Whether the base has the source's names and not the new ones.
        layout: Of `adapter`.
    """

    adapter: Adapter
    heights: Heights
    held: bool
    layout: Layout


def change_layout(adapter: Adapter, layout: str, target: Format, base: Checkpoint | None) -> LayoutChange:
    """`adapter` with every projection split or fused; `base`, of either layout, tells heights that nothing else does.

    Raises:
        FitError: nothing to split or fuse, a height that nothing tells, or an update that has no rows to cut.
    """
    if layout != "split" and layout != "fused":
        raise FitError(f"no layout '{show(layout)}'", hint="split or fused")
    updates, heights = (_split if layout == "split" else _fused)(adapter, base, {})
    if not heights:
        names = " or ".join(p.whole for p in PROJECTIONS) if layout == "split" else "self_attn.q_proj or mlp.gate_proj"
        raise FitError(f"there is nothing to be {layout}: no {names}", file=adapter.path)
    changed = combined_adapter([WeightedAdapter(adapter, 1.0)], updates, target)
    held = base is not None and any(_rows(site, base) for site in adapter.updates.keys() - updates.keys())
    return LayoutChange(changed, heights, held, "split" if layout == "split" else "fused")


def prove_layout(
    path: Path, *, original: Adapter, target: Format, change: LayoutChange, tolerance: float
) -> dict[str, float]:
    """Errors by weight of what lies at `path`, put under the names of `original` again.

    Raises:
        ProofError: it does not do what `original` does.
    """
    written = _in_original_names(original, target.read(path), change)
    errors = compare(restricted(original, {site: original.updates[site] for site in written.updates}), written, None)
    check_errors(errors, tolerance, path)
    return errors


def _in_original_names(original: Adapter, written: Adapter, change: LayoutChange) -> Adapter:
    """What was written, under the names of `original` again, to be compared with it.

    Raises:
        ProofError: a part that `original` did not have is not zero, or one that it had is missing.
    """
    back = _fused if change.layout == "split" else _split
    restored, _ = back(written, None, change.heights)
    for site in restored.keys() - original.updates.keys():  # a part that was not trained is rows of zeros
        for update in restored[site]:
            lora, offset = update.low_rank(), in_full(update)
            factor = lora.B if lora else offset.value if offset else None
            if factor is None or bool(factor.load(DType.F64).any()):
                raise ProofError("was not trained, and changes", file=written.path, tensor=site.path)
    modules = [f".{module}." for whole in change.heights for module in _modules(whole)]
    moved = {site for site in {*original.updates, *restored} if any(module in f".{site.path}" for module in modules)}
    missing = {site for site in original.updates if site in moved} - restored.keys()
    if missing:
        raise ProofError(f"{len(missing)} weights are missing", file=written.path)
    return restricted(
        written, {site: chain for site, chain in restored.items() if site in moved & original.updates.keys()}
    )


def _modules(whole: str) -> tuple[str, ...]:
    """A fused module and its parts."""
    projection = next(p for p in PROJECTIONS if f".{whole}".endswith(f".{p.whole}"))
    stem = whole.removesuffix(projection.whole)
    return whole, *(f"{stem}{part}" for part in projection.parts)


UpdatesAndHeights = tuple[dict[Site, tuple[Update, ...]], dict[str, tuple[int, ...]]]


def _split(adapter: Adapter, base: Checkpoint | None, known: Heights) -> UpdatesAndHeights:
    updates: dict[Site, tuple[Update, ...]] = {}
    heights: dict[str, tuple[int, ...]] = {}
    for site, chain in adapter.updates.items():
        module, _, leaf = site.path.rpartition(".")
        projection = next((p for p in PROJECTIONS if f".{module}".endswith(f".{p.whole}")), None)
        if projection is None or site.flat:
            updates[site] = chain
            continue
        stem = module.removesuffix(projection.whole)
        rows = known.get(module) or _heights(site, projection, stem, {}, chain[0].shape[0], base, adapter)
        heights[module] = rows
        for part, (start, stop) in zip(projection.parts, pairwise(accumulate(rows, initial=0)), strict=True):
            new = replace(site, path=f"{stem}{part}.{leaf}")
            updates[new] = tuple(cut_rows(update, new, start, stop, adapter.path) for update in chain)
    return updates, heights


def _fused(adapter: Adapter, base: Checkpoint | None, known: Heights) -> UpdatesAndHeights:
    updates: dict[Site, tuple[Update, ...]] = {}
    heights: dict[str, tuple[int, ...]] = {}
    for site, chain in adapter.updates.items():
        module, _, leaf = site.path.rpartition(".")
        projection = next((p for p in PROJECTIONS for part in p.parts if f".{module}".endswith(f".{part}")), None)
        if projection is None or site.flat:
            updates[site] = chain
            continue
        stem = next(module.removesuffix(part) for part in projection.parts if module.endswith(part))
        whole = replace(site, path=f"{stem}{projection.whole}.{leaf}")
        if whole in updates:
            continue
        sites = [replace(site, path=f"{stem}{part}.{leaf}") for part in projection.parts]
        chains = [adapter.updates.get(part) for part in sites]
        trained = {i: chain[0].shape[0] for i, chain in enumerate(chains) if chain}
        name = f"{stem}{projection.whole}"
        rows = known.get(name) or heights.get(name) or _heights(site, projection, stem, trained, None, base, adapter)
        heights[name] = rows
        updates[whole] = (join_rows(chains, rows, whole, adapter.path),)
    return updates, heights


def _rows(site: Site, base: Checkpoint) -> int:
    slices = component_of(site, base).names.resolve(site.path)
    return extent(slices)[0] if slices else 0


def _heights(
    site: Site,
    projection: FusedProjection,
    stem: str,
    trained: Mapping[int, int],
    total: int | None,
    base: Checkpoint | None,
    adapter: Adapter,
) -> tuple[int, ...]:
    """Rows of every part: as trained, as the base's parts have them, as its configuration says, or equal halves."""
    for rows in _guesses(site, projection, stem, trained, base, total):
        fits = all(rows[i] == height for i, height in trained.items()) and all(rows)
        if fits and total in (None, sum(rows)):
            return rows
    raise FitError(
        f"how many rows belong to each of {', '.join(projection.parts)} is not known",
        file=adapter.path,
        tensor=site.path,
        hint="give the base with `base=`" if base is None else "is this the base it was trained on?",
    )


def _guesses(
    site: Site,
    projection: FusedProjection,
    stem: str,
    trained: Mapping[int, int],
    base: Checkpoint | None,
    total: int | None,
) -> Iterator[tuple[int, ...]]:
    count = len(projection.parts)
    if len(trained) == count:
        yield tuple(trained[i] for i in range(count))
    if base is not None:
        component = component_of(site, base)
        yield tuple(_rows(replace(site, path=f"{stem}{part}.weight"), base) for part in projection.parts)
        text = component.config.get("text_config")
        for config in (component.config, text if isinstance(text, Mapping) else {}):
            if rows := heights_by_config(projection, config):
                yield rows
    if count == 2:  # gate and up multiply each other's values: they are as high
        height = next(iter(trained.values()), (total or 0) // 2)
        yield (height, height)
