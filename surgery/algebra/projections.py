# SPDX-License-Identifier: Apache-2.0
"""An adapter of fused projections (``qkv_proj``, ``gate_up_proj``) as one of their parts, and back; nothing is approximated.

Splitting keeps A and cuts B by rows. Fusing puts the parts' B on the diagonal of one and their A under each other, which has the ranks'
sum; where all parts have one A, as after splitting, B goes back under each other and the rank stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

import torch

from surgery.algebra.combined_update import CombinedUpdate
from surgery.algebra.files import as_adapter
from surgery.algebra.low_rank import PEFT
from surgery.engine.proof import check_errors, compare, restricted
from surgery_formats.adapters.format import Format
from surgery_formats.adapters.writing import component_of, factor_dtype
from surgery_formats.canonical.adapter import Adapter, Site, WeightedAdapter
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, ProofError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.families.projections import PROJECTIONS, FusedProjection, heights_by_config
from surgery_formats.models.names import extent
from surgery_formats.tensors.computed import computed
from surgery_formats.text import show
from surgery_formats.updates import DoRA, Factor, LoRA, Offset, Update

__all__ = ["LAYOUTS", "Layout", "LayoutChange", "change_layout", "prove_layout"]

Layout = Literal["split", "fused"]
LAYOUTS: tuple[Layout, ...] = ("split", "fused")
Heights = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LayoutChange:
    """An adapter under other names.

    Attributes:
        adapter: What a writer is given.
        heights: ``{path of the whole projection: rows of its parts}`` of all that changed.
        held: Whether the base given has the source's names, and not these.
        layout: Of `adapter`.
    """

    adapter: Adapter
    heights: Heights
    held: bool
    layout: Layout


def change_layout(adapter: Adapter, layout: str, target: str, base: Checkpoint | None) -> LayoutChange:
    """`adapter` with every projection split or fused.

    Args:
        adapter: As read.
        layout: As it is to be.
        target: Format it will be written in.
        base: Of either layout, where heights are asked of it.

    Raises:
        FitError: nothing to split or fuse, a height that nothing tells, or an update that has no rows to cut.
    """
    if layout != "split" and layout != "fused":
        raise FitError(f"no layout '{show(layout)}'", hint="split or fused")
    found, heights = (_split if layout == "split" else _fused)(adapter, base, {})
    if not heights:
        wanted = " or ".join(p.whole for p in PROJECTIONS) if layout == "split" else "self_attn.q_proj or mlp.gate_proj"
        raise FitError(f"there is nothing to be {layout}: no {wanted}", file=adapter.path)
    parts = [CombinedUpdate(site, chain, "kept") for site, chain in found.items()]
    made = as_adapter([WeightedAdapter(adapter, 1.0)], parts, target)
    held = base is not None and any(_rows(site, base) for site in adapter.updates.keys() - found.keys())
    return LayoutChange(made, heights, held, "split" if layout == "split" else "fused")


def prove_layout(
    path: Path, *, given: Adapter, target: Format, change: LayoutChange, tolerance: float
) -> dict[str, float]:
    """Errors by weight of what lies at `path`, put under the names of `given` again.

    Raises:
        ProofError: it does not do what `given` does.
    """
    written = _in_given_names(given, target.read(path), change)
    errors = compare(restricted(given, {site: given.updates[site] for site in written.updates}), written, None)
    check_errors(errors, tolerance, path)
    return errors


def _in_given_names(given: Adapter, written: Adapter, change: LayoutChange) -> Adapter:
    """What was written, under the names of `given` again, to be compared with it.

    Raises:
        ProofError: a part that `given` did not have is not zero, or one that it had is missing.
    """
    back = _fused if change.layout == "split" else _split
    restored, _ = back(written, None, change.heights)
    for site in restored.keys() - given.updates.keys():  # a part that was not trained is rows of zeros
        for update in restored[site]:
            factor = update.B if isinstance(update, LoRA) else update.value if isinstance(update, Offset) else None
            if factor is None or bool(factor.load(torch.float64).any()):
                raise ProofError("was not trained, and changes", file=written.path, tensor=site.path)
    modules = [f".{module}." for whole in change.heights for module in _modules(whole)]
    moved = {site for site in {*given.updates, *restored} if any(module in f".{site.path}" for module in modules)}
    missing = {site for site in given.updates if site in moved} - restored.keys()
    if missing:
        raise ProofError(f"{len(missing)} weights are missing", file=written.path)
    return restricted(
        written, {site: chain for site, chain in restored.items() if site in moved & given.updates.keys()}
    )


def _modules(whole: str) -> tuple[str, ...]:
    """A fused module and its parts."""
    projection = next(p for p in PROJECTIONS if f".{whole}".endswith(f".{p.whole}"))
    stem = whole.removesuffix(projection.whole)
    return whole, *(f"{stem}{part}" for part in projection.parts)


Found = tuple[dict[Site, tuple[Update, ...]], dict[str, tuple[int, ...]]]


def _split(adapter: Adapter, base: Checkpoint | None, known: Heights) -> Found:
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
            updates[new] = tuple(_cut(update, new, start, stop, adapter) for update in chain)
    return updates, heights


def _fused(adapter: Adapter, base: Checkpoint | None, known: Heights) -> Found:
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
        chains = [adapter.updates.get(one) for one in sites]
        trained = {i: chain[0].shape[0] for i, chain in enumerate(chains) if chain}
        name = f"{stem}{projection.whole}"
        rows = known.get(name) or heights.get(name) or _heights(site, projection, stem, trained, None, base, adapter)
        heights[name] = rows
        updates[whole] = (_joined(chains, rows, whole, adapter),)
    return updates, heights


def _rows(site: Site, base: Checkpoint) -> int:
    found = component_of(site, base).names.resolve(site.path)
    return extent(found)[0] if found else 0


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
        hint="give the base with --base" if base is None else "is this the base it was trained on?",
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


def _cut(update: Update, site: Site, start: int, stop: int, adapter: Adapter) -> Update:
    """The update of rows ``[start, stop)``."""
    if isinstance(update, LoRA):
        a, b = _factors(site, adapter)
        A = computed(a, update.A.shape, update.A.tensors, lambda: update.A.load(torch.float64), _kept(update.A))
        B = computed(
            b,
            (stop - start, update.rank),
            update.B.tensors,
            lambda: update.B.load(torch.float64)[start:stop],
            _kept(update.B),
        )
        return LoRA(Factor.of(A), Factor.of(B), update.scale, update.alpha)
    if isinstance(update, DoRA) and update.per_row:
        direction = _cut(update.direction, site, start, stop, adapter)
        assert isinstance(direction, LoRA)
        return DoRA(direction, _vector(update.magnitude, _magnitude(site, adapter), start, stop))
    if isinstance(update, Offset):
        return Offset(_vector(update.value, f"laid-out.{site}", start, stop), update.scale)
    raise FitError(f"is changed by a {update.kind}, which has no rows to cut", file=adapter.path, tensor=site.path)


def _vector(value: Factor, name: str, start: int, stop: int) -> Factor:
    shape = (stop - start, *value.shape[1:])
    return Factor.of(computed(name, shape, value.tensors, lambda: value.load(torch.float64)[start:stop], _kept(value)))


def _joined(chains: Sequence[tuple[Update, ...] | None], rows: tuple[int, ...], site: Site, adapter: Adapter) -> Update:
    """The updates of the parts as one of the whole."""
    present = [chain for chain in chains if chain]
    kinds = {update.kind for chain in present for update in chain}
    if len(kinds) > 1 or any(len(chain) > 1 for chain in present):
        raise FitError(f"its parts are changed by {', '.join(sorted(kinds))}", file=adapter.path, tensor=site.path)
    parts = [None if chain is None else chain[0] for chain in chains]
    if all(part is None or isinstance(part, LoRA) for part in parts):
        return _joined_loras([part if isinstance(part, LoRA) else None for part in parts], rows, site, adapter)
    if all(part is None or isinstance(part, Offset) for part in parts):
        offsets = [part if isinstance(part, Offset) else None for part in parts]

        def values() -> torch.Tensor:
            made = [o.value.load(torch.float64) * o.scale if o else None for o in offsets]
            tail = next(value.shape[1:] for value in made if value is not None)
            zeros = [torch.zeros((h, *tail), dtype=torch.float64) for h in rows]
            return torch.cat([z if v is None else v for v, z in zip(made, zeros, strict=True)])

        first = next(offset for offset in offsets if offset)
        shape = (sum(rows), *first.value.shape[1:])
        return Offset(
            Factor.of(computed(f"laid-out.{site}", shape, [t for o in offsets if o for t in o.tensors], values))
        )
    doras = [part for part in parts if isinstance(part, DoRA) and part.per_row]
    if len(doras) < len(parts):
        why = "by a DoRA in some of its parts only: the lengths of the others are the base's"
        raise FitError(
            f"is changed {why if kinds == {DoRA.kind} else f'by a {kinds.pop()}'}", file=adapter.path, tensor=site.path
        )
    magnitudes = [dora.magnitude for dora in doras]
    magnitude = computed(
        _magnitude(site, adapter),
        (sum(rows),),
        [tensor for m in magnitudes for tensor in m.tensors],
        lambda: torch.cat([m.load(torch.float64) for m in magnitudes]),
        _kept(*magnitudes),
    )
    return DoRA(_joined_loras([dora.direction for dora in doras], rows, site, adapter), Factor.of(magnitude))


def _joined_loras(loras: Sequence[LoRA | None], rows: tuple[int, ...], site: Site, adapter: Adapter) -> LoRA:
    present = [lora for lora in loras if lora is not None]
    first = present[0]
    (a, b), sources = _factors(site, adapter), [tensor for lora in present for tensor in lora.tensors]
    one_scale = all(lora.scale == first.scale for lora in present)
    times = [1.0 if lora is None or one_scale else lora.scale for lora in loras]
    scale = first.scale if one_scale else 1.0
    a_type, b_type = (_kept(*factors) for factors in ([p.A for p in present], [p.B for p in present]))
    if not one_scale and b_type.bits < 32:
        b_type = DType.F32
    shared = len(present) == len(loras) and _one_factor([lora.A for lora in present])
    rank = first.rank if shared else sum(lora.rank for lora in present)

    def up() -> torch.Tensor:
        whole = torch.zeros((sum(rows), rank), dtype=torch.float64)
        row = column = 0
        for lora, height, factor in zip(loras, rows, times, strict=True):
            if lora is not None:
                at = 0 if shared else column
                whole[row : row + height, at : at + lora.rank] = lora.B.load(torch.float64) * factor
                column += lora.rank
            row += height
        return whole

    def down() -> torch.Tensor:
        return torch.cat([lora.A.load(torch.float64) for lora in (present[:1] if shared else present)])

    A = computed(a, (rank, first.shape[1]), sources, down, a_type)
    B = computed(b, (sum(rows), rank), sources, up, b_type)
    return LoRA(Factor.of(A), Factor.of(B), scale, scale * rank)


def _one_factor(factors: Sequence[Factor]) -> bool:
    if len({factor.shape for factor in factors}) > 1:
        return False
    values = factors[0].load(torch.float64)
    return all(torch.equal(values, other.load(torch.float64)) for other in factors[1:])


def _kept(*factors: Factor) -> DType:
    """Rows are moved, not computed: the type stays."""
    return factor_dtype(factors, folded=False)


def _factors(site: Site, adapter: Adapter) -> tuple[str, str]:
    """Keys of A and B: PEFT's writer goes by them."""
    if adapter.format == "peft":
        stem = f"{PEFT}{site.path.removesuffix('.weight')}"
        return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
    return f"laid-out.{site}.down", f"laid-out.{site}.up"


def _magnitude(site: Site, adapter: Adapter) -> str:
    stem = f"{PEFT}{site.path.removesuffix('.weight')}"
    return f"{stem}.lora_magnitude_vector" if adapter.format == "peft" else f"laid-out.{site}.magnitude"
