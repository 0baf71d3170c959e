# SPDX-License-Identifier: Apache-2.0
"""What a model is made of, as inspect reports it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.reports.drawings import Bars
from surgery.reports.output import PATH
from surgery.reports.quantisation import QuantisedWeights, quantised_phrase
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Chart, Column, Facts, Section, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.to_json import plain, without_empty
from surgery.reports.values import Cell, Name, NameList, Phrase, Value
from surgery_formats.models.module_tree import Node, Totals

__all__ = [
    "CheckpointReport",
    "ComponentReport",
    "WeightFileReport",
    "files_phrase",
    "module_tables",
    "types_phrase",
]

_DEPTH = 4  # of a decoder: model, its layers, their attention, its projections


@dataclass(frozen=True, slots=True)
class WeightFileReport:
    """One file of weights.

    Attributes:
        name: File name, with the component's folder in a pipeline.
        container: ``safetensors``, ``torch`` ...
        nbytes: As the file system counts them.
        tensors: How many tensors it holds.
    """

    name: str
    container: str
    nbytes: int
    tensors: int


@dataclass(frozen=True)
class ComponentReport:
    """One network of a checkpoint.

    Attributes:
        name: ``unet``, or empty for a plain model.
        model_type: As config.json says, or empty.
        family: The known family its names belong to, or empty.
        facts: Sizes from config.json: ``layers``, ``hidden``, ``heads``, ``kv_heads``, ``vocabulary`` ...
        tree: Its modules.
        roles: Totals per role.
        dtypes: Totals per stored type, largest first.
        files: Its weight files.
        ties: ``{alias: source}`` of names that are one parameter.
        quantised: Its weights that are stored as codes, by format.
        networks: The networks in it by what adapters call them, empty for the whole; each with its family, told by names.
        stated: What the header of its first file says that it is, and which field, or None.
        tool: The program that wrote it and what tells so, or None.
    """

    name: str
    model_type: str
    family: str
    facts: Mapping[str, int]
    tree: Node
    roles: Mapping[str, Totals]
    dtypes: Mapping[str, Totals]
    files: tuple[WeightFileReport, ...]
    ties: Mapping[str, str]
    quantised: tuple[QuantisedWeights, ...] = ()
    networks: Mapping[str, str] = field(default_factory=dict)
    stated: str | None = None
    tool: str | None = None

    @property
    def parameters(self) -> int:
        """Numbers stored, ties counted once, buffers not at all."""
        return self.tree.parameters


@summarised
@dataclass(frozen=True)
class CheckpointReport:
    """What a model's folder or file holds.

    Attributes:
        path: What was inspected.
        components: One for a plain model, several for a pipeline.
        parameters: Of all components.
        nbytes: Of all weight files, as the file system counts them.
        side_files: Everything else that belongs to it: tokenizer, templates, schedulers.
        left_behind: Weights of other formats beside those read.
        graphs: ONNX graphs of it, each of which can be inspected by its name.
        notes: What the user should know.
        seconds: How long it took.
    """

    path: Path
    components: tuple[ComponentReport, ...]
    parameters: int
    nbytes: int
    side_files: tuple[str, ...]
    left_behind: tuple[str, ...]
    graphs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = elapsed()

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes."""
        return self.notes

    def as_json(self) -> dict[str, Any]:
        """Plain values, the tree included."""
        return {"type": "checkpoint", **without_empty(plain(self), ("quantised", "networks", "stated", "tool"))}

    def summary(self, *, verbose: bool = False, depth: int | None = _DEPTH) -> Summary:
        """Files, then `depth` levels of modules of every component, all if None or `verbose`, and totals by role."""
        files = [file for component in self.components for file in component.files]
        rows: list[tuple[str, Phrase]] = [
            ("model", Name(self.path, PATH)),
            ("parameters", Value(self.parameters, "count")),
            ("weights", files_phrase(files)),
        ]
        if self.side_files:
            rows.append(("beside", NameList(self.side_files)))
        if self.graphs:
            rows.append(("graphs", NameList(self.graphs)))
        if self.left_behind:
            rows.append(("not read", NameList(self.left_behind)))
        sections: list[Section] = [Facts(tuple(rows))]
        for component in self.components:
            sections += _component(component, None if verbose else depth, named=len(self.components) > 1)
        return Summary(self.path.resolve().name, (*sections, *warning_notes(self.notes)))


def files_phrase(files: Sequence[WeightFileReport]) -> Phrase:
    """``3.01 MB in 1 safetensors file``."""
    kinds = "/".join(sorted({file.container for file in files}))
    plural = "s" if len(files) != 1 else ""
    return Value(sum(file.nbytes for file in files), "bytes"), f" in {len(files)} {kinds} file{plural}"


def types_phrase(dtypes: Mapping[str, Totals]) -> str:
    """``57 BF16, 2 F32``."""
    return ", ".join(f"{total.tensors} {name}" for name, total in dtypes.items())


def _component(component: ComponentReport, depth: int | None, *, named: bool) -> Iterator[Section]:
    kind = Name(component.model_type or "unknown")
    rows: list[tuple[str, Phrase]] = [("component", Name(component.name))] if named else []
    told = component.family or component.networks
    rows.append(("kind", kind if told else (kind, " (family not known: roles are told by names alone)")))
    rows.append(("types", types_phrase(component.dtypes)))
    if component.networks:
        rows.append(("networks", _networks(component.networks)))
    if component.stated:
        rows.append(("says it is", Name(component.stated)))
    if component.tool:
        rows.append(("written by", Name(component.tool)))
    if component.quantised:
        rows.append(("quantised", quantised_phrase(component.quantised)))
    if component.facts:
        rows.append(("sizes", ", ".join(f"{name} {value}" for name, value in component.facts.items())))
    if component.ties:
        rows.append(("tied", NameList(tuple(f"{alias} = {source}" for alias, source in component.ties.items()))))
    yield Facts(tuple(rows))
    yield from module_tables(component.tree, component.roles, depth)


def module_tables(tree: Node, per_role: Mapping[str, Totals], depth: int | None) -> Iterator[Section]:
    """The modules of a network down to a depth, and the totals per role."""
    modules = (
        Column("module", "name"), Column("times", "integer"), Column("role"), Column("shape", "shape"),
        Column("parameters", "count"), Column("type"), Column("bytes", "bytes"),
    )  # fmt: skip
    yield Table(modules, tuple(_tree(tree, depth)), "Modules")
    roles = (
        Column("role"), Column("tensors", "integer"), Column("parameters", "count"), Column("share", "share", 1),
        Column("bytes", "bytes"),
    )  # fmt: skip
    whole = tree.parameters
    rows = tuple(
        (role, total.tensors, total.parameters, total.parameters / whole if whole else None, total.nbytes)
        for role, total in per_role.items()
    )
    yield Chart("What the bytes are part of", Table(roles, rows), Bars(0, (4,)))


def _networks(networks: Mapping[str, str]) -> str:
    """``denoiser (Flux), text_encoder, vae``; ``Flux, by its names`` of a file that is one network."""
    if "" in networks:
        return f"{networks['']}, by its names"
    return ", ".join(f"{part} ({family})" if family else part for part, family in networks.items())


def _tree(parent: Node, depth: int | None, level: int = 0) -> Iterator[tuple[Cell, ...]]:
    """A row per node, names relative to their parent and indented."""
    for node in parent.children:
        name = node.name.removeprefix(f"{parent.name}.") if parent.name else node.name
        tied = f" = {node.tied}" if node.tied else ""
        cut = bool(node.children) and depth is not None and level + 1 >= depth
        yield (
            f"{'  ' * level}{name}{tied}{' ...' if cut else ''}",
            node.repeated if node.repeated > 1 else None,
            node.role,
            node.shape,
            node.parameters,
            ",".join(node.dtypes),
            node.nbytes,
        )
        if not cut:
            yield from _tree(node, depth, level + 1)
