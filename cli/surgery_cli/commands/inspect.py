# SPDX-License-Identifier: Apache-2.0
"""``surgery inspect``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from surgery_cli.options import Settings, complete_files
from surgery_cli.options import command as sub_command
from surgery_cli.output import emit_json, note, pairs, table, warn
from surgery_formats.text import count, listing, nbytes, show

if TYPE_CHECKING:
    from surgery.verbs.inspect import AdapterReport, CheckpointReport, ComponentReport, PromptFacts, WeightFileReport
    from surgery_formats.models.module_tree import Node, Totals

__all__ = ["command"]

_DEPTH = 4  # of a decoder: model, its layers, their attention, its projections
_LISTED = 8  # names in one line


@sub_command("inspect")
@click.argument("reference", metavar="REF", shell_complete=complete_files)
@click.option("--depth", type=click.IntRange(min=1), default=_DEPTH, show_default=True, help="Levels of modules.")
@click.option("--all", "every", is_flag=True, help="Every level; of an adapter every parameter and all metadata.")
def command(settings: Settings, reference: str, depth: int, every: bool) -> None:
    """Show what a model or an adapter is made of.

    Of a model: its modules with role, shape, parameters, type and bytes; equal layers are shown once. Of an adapter: format,
    kind, rank, alpha, scale, what it touches, and what makes it easy to use wrongly. Only headers are read.

    \b
    Examples:
      surgery inspect llama/
      surgery inspect my-lora/ --all
      surgery inspect llama/ --json | jq .result.parameters
    """
    from surgery.verbs.inspect import AdapterReport, inspect
    from surgery_formats.refs import resolve

    found = inspect(resolve(reference))
    if settings.json:
        emit_json("inspect", found.as_json())
    elif isinstance(found, AdapterReport):
        _adapter(found, every)
    else:
        _checkpoint(found, None if every else depth)


def _checkpoint(found: CheckpointReport, depth: int | None) -> None:
    pipeline = len(found.components) > 1
    files = [file for component in found.components for file in component.files]
    rows = [("model", show(found.path, 500)), ("parameters", count(found.parameters)), ("weights", _files(files))]
    if found.side_files:
        rows.append(("beside", listing(found.side_files, _LISTED)))
    if found.left_behind:
        rows.append(("not read", listing(found.left_behind, _LISTED)))
    pairs(rows)
    for component in found.components:
        click.echo()
        _component(component, depth, pipeline)
    for text in found.notes:
        warn(text)


def _component(found: ComponentReport, depth: int | None, named: bool) -> None:
    kind = show(found.model_type or "unknown")
    rows = [("component", show(found.name))] if named else []
    rows.append(("kind", kind if found.family else f"{kind} (family not known: roles are told by names alone)"))
    rows.append(("types", _types(found.dtypes)))
    if found.facts:
        rows.append(("sizes", ", ".join(f"{name} {value}" for name, value in found.facts.items())))
    if found.ties:
        rows.append(("tied", listing([f"{alias} = {source}" for alias, source in found.ties.items()], _LISTED)))
    pairs(rows)
    click.echo()
    table(
        ("module", "times", "role", "shape", "parameters", "type", "bytes"),
        _tree(found.tree, depth),
        right=(1, 4, 6),
    )
    click.echo()
    table(
        ("role", "tensors", "parameters", "share", "bytes"),
        (
            (
                role,
                total.tensors,
                count(total.parameters),
                _share(total.parameters, found.parameters),
                nbytes(total.nbytes),
            )
            for role, total in found.roles.items()
        ),
        right=(1, 2, 3, 4),
    )


def _tree(root: Node, depth: int | None) -> Iterator[tuple[object, ...]]:
    """A row per node, names relative to their parent and indented."""

    def below(parent: Node, level: int) -> Iterator[tuple[object, ...]]:
        for node in parent.children:
            name = node.name.removeprefix(f"{parent.name}.") if parent.name else node.name
            shape = "" if node.shape is None else _sizes(node.shape)
            tied = f" = {node.tied}" if node.tied else ""
            more = " ..." if node.children and depth is not None and level + 1 >= depth else ""
            times = node.repeated if node.repeated > 1 else ""
            yield (
                f"{'  ' * level}{name}{tied}{more}",
                times,
                node.role,
                shape,
                count(node.parameters),
                ",".join(node.dtypes),
                nbytes(node.nbytes),
            )
            if not more:
                yield from below(node, level + 1)

    return below(root, 0)


def _adapter(found: AdapterReport, every: bool) -> None:
    kinds = ", ".join(f"{number} {kind}" for kind, number in found.kinds.items())
    rows = [
        ("adapter", show(found.path, 500)),
        ("format", show(found.format)),
        ("kind", show(found.kind) + (f" ({kinds})" if kinds else "")),
    ]
    for label, values in (("rank", found.ranks), ("alpha", found.alphas), ("scale", found.scales)):
        if values:
            how = ", alpha / sqrt(rank)" if label == "scale" and found.rslora else ""
            rows.append((label, _spread(values) + how))
    if found.prompt is not None:
        rows.append(("prompt", _prompt(found.prompt)))
    if found.token_rows:
        rows.append(("token rows", ", ".join(f"{show(name)}: {len(ids)}" for name, ids in found.token_rows.items())))
    if found.base_name:
        rows.append(("base", show(found.base_name, 500)))
    if found.base_id:
        rows.append(("base id", show(found.base_id)))
    carried = f", and {count(found.carried)} carried along untrained" if found.carried else ""
    rows += [
        ("trained", f"{count(found.parameters)} parameters{carried}"),
        ("weights", _files(found.files)),
        ("types", _types(found.dtypes)),
    ]
    rows += (
        [("metadata", f"{show(name)} = {show(value, 500)}") for name, value in found.metadata.items()] if every else []
    )
    pairs(rows)
    if found.targets:
        click.echo()
        _touched(found, every)
    if not every and found.metadata:
        number = len(found.metadata)
        note(f"{number} metadata string{'s' if number != 1 else ''}; --all shows {'them' if number != 1 else 'it'}")
    if found.ignored:
        note(f"without effect on a base: {listing(found.ignored, _LISTED)}")
    for text in found.traps:
        warn(text)


def _prompt(found: PromptFacts) -> str:
    """``16 virtual tokens of 128 numbers``, or of keys and values."""
    twice = f" for each of {found.submodules} submodules" if found.submodules > 1 else ""
    if found.prefix is None:
        return f"{found.virtual_tokens} virtual tokens of {found.dim} numbers{twice}"
    one = found.prefix
    layers, heads = f"{one.layers} layers", f"{one.kv_heads} heads of {one.head_dim}"
    return f"{found.virtual_tokens} virtual tokens, as keys and values of {layers}, {heads}{twice}"


def _touched(found: AdapterReport, every: bool) -> None:
    if every:
        table(
            ("parameter", "role", "kind", "shape", "rank", "alpha", "scale", "parameters"),
            (
                (
                    one.name,
                    one.role,
                    one.kind,
                    _sizes(one.shape),
                    *map(_number, (one.rank, one.alpha, one.scale)),
                    count(one.parameters),
                )
                for one in found.modules
            ),
            right=(4, 5, 6, 7),
        )
    else:
        table(
            ("parameters like", "times", "role", "kind", "rank", "scale", "parameters"),
            (
                (
                    one.pattern,
                    one.count,
                    one.role,
                    one.kind,
                    _spread(one.ranks),
                    _spread(one.scales),
                    count(one.parameters),
                )
                for one in found.targets
            ),
            right=(1, 4, 5, 6),
        )


def _files(files: Any) -> str:
    every: list[WeightFileReport] = list(files)
    kinds = "/".join(sorted({file.container for file in every}))
    total = nbytes(sum(file.nbytes for file in every))
    return f"{total} in {len(every)} {kinds} file{'s' if len(every) != 1 else ''}"


def _types(dtypes: Mapping[str, Totals]) -> str:
    return ", ".join(f"{total.tensors} {name}" for name, total in dtypes.items())


def _spread(values: Mapping[int, int] | Mapping[float, int]) -> str:
    """``16``, or where they differ ``8 (12 times), 16 (4 times)``."""
    if len(values) == 1:
        return _number(next(iter(values)))
    return ", ".join(f"{_number(value)} ({times} times)" for value, times in values.items())


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""
