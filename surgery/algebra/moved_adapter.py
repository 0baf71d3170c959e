# SPDX-License-Identifier: Apache-2.0
"""An adapter for a model whose layers were moved: its sites under their new numbers, copied with layers that are repeated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.algebra.projections import LAYOUTS, change_layout
from surgery.engine.adapter_output import WriteOptions, job_id
from surgery.engine.conversion import Conversion, bound_source, plan_conversion, write_conversion
from surgery.engine.convert_result import ConvertResult
from surgery.engine.rebuild.layers_result import AdapterBeside
from surgery.progress import Callback
from surgery.reports.request import unrecorded
from surgery_formats.adapters.contents import contents_of
from surgery_formats.adapters.format import Format, Inheriting, what_to_tell
from surgery_formats.adapters.registry import format_to_write
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.errors import FitError
from surgery_formats.models.rebuilt.layers import places_of_layers
from surgery_formats.models.rebuilt.projections import KINDS
from surgery_formats.models.rebuilt.rebuilt import Rebuilt
from surgery_formats.models.rebuilt.stack import LayerStack, layer_stack
from surgery_formats.updates import Update, is_row_setting

__all__ = ["MovePlan", "MovedAdapter", "moved_adapter", "plan_move"]


@dataclass(frozen=True, slots=True)
class MovedAdapter:
    """An adapter whose sites were moved.

    Attributes:
        adapter: With the new sites.
        original: As it was.
        dropped: Sites of layers that are gone.
        copied: New sites beyond the first of each old one.
    """

    adapter: Adapter
    original: Adapter
    dropped: tuple[str, ...]
    copied: tuple[str, ...]


def moved_adapter(adapter: Adapter, stack: LayerStack, order: Sequence[int], target: Format) -> MovedAdapter:
    """`adapter` for a model whose layer `i` was the layer ``order[i]``.

    Args:
        adapter: Trained for all the layers.
        stack: These.
        order: Old numbers.
        target: The format to write.

    Raises:
        FitError: keys and values for each layer; or no change is left.
    """
    if adapter.prompt is not None and adapter.prompt.prefix is not None:
        raise FitError("holds keys and values for each layer, which belong to these layers", file=adapter.path)
    if adapter.prompt is not None and not adapter.updates:  # rows before the input, which no layer has
        return MovedAdapter(replace(adapter, base_id=""), adapter, (), ())
    places = places_of_layers(order)
    name = stack.prefix.rstrip(".").rpartition(".")[2]
    number = re.compile(rf"(?:^|[._]){re.escape(name)}[._](\d+)(?=[._])")
    updates: dict[Site, tuple[Update, ...]] = {}
    optional: set[Site] = set()
    dropped: list[str] = []
    copied: list[str] = []
    for site, chain in adapter.updates.items():
        match = number.search(site.path)
        if match is None:
            moved = [site]
        else:
            old = int(match[1])
            if old >= stack.count:
                raise FitError(f"changes layer {old}, and the base has {stack.count} layers", file=adapter.path)
            before, after = site.path[: match.start(1)], site.path[match.end(1) :]
            moved = [replace(site, path=f"{before}{new}{after}") for new in places.get(old, ())]
        if not moved:
            dropped.append(str(site))
        copied += map(str, moved[1:])
        updates |= dict.fromkeys(moved, chain)
        if site in adapter.optional:
            optional |= set(moved)
    if not updates and adapter.prompt is None:
        raise FitError("changes only layers that are left out", file=adapter.path)
    kept = {tensor.name for chain in updates.values() for update in chain for tensor in update.tensors}
    gone = {t.name for chain in adapter.updates.values() for update in chain for t in update.tensors} - kept
    same = adapter.format == target.name and isinstance(target, Inheriting) and _low_rank(updates)
    changed = replace(
        adapter,
        updates=updates,
        format=adapter.format if same else "moved",
        tensors=tuple(tensor for tensor in adapter.tensors if tensor.name not in gone),
        base_id="",
        optional=frozenset(optional),
        spelling={},
        copied_modules=frozenset(),
        config=target.inherited([adapter], updates) if same and isinstance(target, Inheriting) else {},
    )
    return MovedAdapter(changed, adapter, tuple(dropped), tuple(copied))


def _check_vocabulary(adapter: Adapter, rebuilt: Rebuilt) -> None:
    """Refuse what an adapter changes of a vocabulary that has other rows, but for single rows that keep their ids.

    Raises:
        FitError: it changes the embedding or the head.
    """
    vocabulary = rebuilt.facts.get("vocabulary")
    if vocabulary is None:
        return
    base = rebuilt.base.main
    for site, chain in adapter.updates.items():
        names = [piece.parameter.name for piece in base.names.resolve(site.path)]
        stays = "ids" not in vocabulary and all(map(is_row_setting, chain))
        if any(base.role(name) in ("embedding", "head") for name in names) and not stays:
            raise FitError(
                f"changes '{site}', whose rows are others now",
                file=adapter.path,
                hint="merge it, and change the vocabulary of the result",
            )


def _low_rank(updates: dict[Site, tuple[Update, ...]]) -> bool:
    held = [contents_of(update) for chain in updates.values() for update in chain]
    return any(one.lora or one.stack for one in held)


@dataclass(frozen=True, slots=True)
class MovePlan:
    """A moved adapter that is not written yet."""

    moved: MovedAdapter
    conversion: Conversion

    def account(self, output: Path | None) -> AdapterBeside:
        """What became of its changes."""
        moved = self.moved
        return AdapterBeside(output, len(moved.adapter.updates), moved.dropped, moved.copied)

    def write(self, output: Path, base: Path, *, overwrite: bool, progress: Callback | None) -> ConvertResult:
        """Write it, and prove it by reading it back; `base` is where the original's lies.

        Raises:
            ProofError, OutputExistsError, ResourceError: as `surgery.engine.conversion.write_conversion`.
        """
        original, conversion = self.moved.original, self.conversion
        result = ConvertResult(
            None,
            original.format,
            conversion.target.name,
            conversion.rendering.entries,
            {},
            (*original.known_issues(), *what_to_tell(conversion.rendering, conversion.target)),
            original.path,
        )
        options = WriteOptions(output, (original.path, base), original.files_beside, overwrite, progress)
        with unrecorded():
            return write_conversion(conversion, options, result)


def plan_move(adapter: Adapter, rebuilt: Rebuilt) -> MovePlan:
    """The plan that writes an adapter of a base for what was made of that, in its own format.

    Raises:
        FitError: it does not fit what was made, or the format cannot hold it.
    """
    target = format_to_write(adapter.format)
    stack = layer_stack(rebuilt.base.main)
    order = rebuilt.facts["layers"]["order"] if "layers" in rebuilt.facts else range(stack.count)
    _check_vocabulary(adapter, rebuilt)
    moved = moved_adapter(adapter, stack, order, target)
    layout = next((what for what in LAYOUTS if what in rebuilt.facts), None)
    if layout is not None and set(rebuilt.facts[layout]) != set(KINDS):
        raise FitError("an adapter is moved with all its projections or none", file=adapter.path)
    if layout is not None:
        moved = replace(moved, adapter=change_layout(moved.adapter, layout, target, rebuilt.base).adapter)
    base = rebuilt.checkpoint
    conversion = plan_conversion(moved.adapter, target, base, bound_source(moved.adapter, base))
    job = job_id({"moved": rebuilt.facts}, adapter.files, conversion.rendering)
    return MovePlan(replace(moved, adapter=replace(moved.adapter, made=job)), conversion)
