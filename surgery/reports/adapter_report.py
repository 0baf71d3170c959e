# SPDX-License-Identifier: Apache-2.0
"""What an adapter holds and touches, as inspect reports it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from surgery.reports.checkpoint_report import WeightFileReport, files_phrase, types_phrase
from surgery.reports.delta_facts import DeltaFacts, delta_charts
from surgery.reports.output import PATH
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Column, Facts, Note, Section, Table
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.targets import TargetedParameter, TargetGroup
from surgery.reports.to_json import plain, without_empty
from surgery.reports.values import Name, NameList, Phrase, Piece, Value
from surgery_formats.canonical.prompts import Prefix
from surgery_formats.canonical.provenance import ScaleSource
from surgery_formats.models.module_tree import Totals
from surgery_formats.text import numbered

__all__ = ["AdapterReport", "PromptFacts"]


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """Sizes of a soft prompt.

    Attributes:
        kind: ``PROMPT_TUNING``, ``PREFIX_TUNING`` ...
        virtual_tokens: In front of the input.
        dim: Numbers per token: of an embedding; of all key heads of one layer.
        submodules: 2 for an encoder and its decoder.
        prefix: Layers, heads and their size where it holds keys and values.
    """

    kind: str
    virtual_tokens: int
    dim: int
    submodules: int
    prefix: Prefix | None


@summarised
@dataclass(frozen=True)
class AdapterReport:
    """What an adapter holds, and what it does to a base.

    Attributes:
        path: What was inspected.
        format: ``peft``, ``kohya``, ``mlx``.
        kind: What the file says it is (``LORA``, ``PROMPT_TUNING``).
        kinds: Parameters touched per kind of update (``LoRA``, ``DoRA``, ``replacement``).
        ranks: How many parameters have which rank.
        alphas: How many have which alpha; those without one are left out.
        scales: How many have which scale, the factor on ``B A``.
        rslora: Whether the scale is ``alpha / sqrt(rank)``.
        dora: Whether any direction has a magnitude.
        targets: Parameters touched, those alike in one line.
        modules: Every parameter touched, with rank, alpha and scale of its own.
        in_full: Parameters stored whole (among `modules`): trained in full, or carried along.
        token_rows: ``{parameter: token ids}`` of embedding rows trained.
        prompt: Sizes of a soft prompt, or None.
        parameters: Numbers trained.
        carried: Numbers stored whole, but not trained (an embedding saved because the vocabulary was resized).
        nbytes: Of its weight files, as the file system counts them.
        dtypes: Totals per stored type.
        files: Its weight files.
        base_name: The base it says it was trained on, or empty.
        base_id: Content id of that base, or empty.
        quantised_base: What quantised that base and where the adapter's files say so; None if they do not.
        metadata: Free strings of the file.
        ignored: ``{tensor: why}`` of tensors that rightly do nothing.
        traps: What makes this adapter easy to use wrongly.
        tool: The program that wrote it and what tells so, or None.
        family: The family of its base by the names it changes, or None.
        made_for: What the file's header says of its base, and which field, or None.
        scale_sources: How many updates have their scale from where (`surgery_formats.canonical.provenance`).
        token: What calls a textual inversion in a prompt, or None.
        deltas: What each update of low rank adds, where its values were read.
        seconds: How long it took.
    """

    path: Path
    format: str
    kind: str
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    scales: Mapping[float, int]
    rslora: bool
    dora: bool
    targets: tuple[TargetGroup, ...]
    modules: tuple[TargetedParameter, ...]
    in_full: tuple[TargetedParameter, ...]
    token_rows: Mapping[str, tuple[int, ...]]
    prompt: PromptFacts | None
    parameters: int
    carried: int
    nbytes: int
    dtypes: Mapping[str, Totals]
    files: tuple[WeightFileReport, ...]
    base_name: str
    base_id: str
    metadata: Mapping[str, str]
    ignored: Mapping[str, str]
    traps: tuple[str, ...]
    quantised_base: str | None = None
    tool: str | None = None
    family: str | None = None
    made_for: str | None = None
    scale_sources: Mapping[ScaleSource, int] = field(default_factory=dict)
    token: str | None = None
    deltas: tuple[DeltaFacts, ...] = ()
    seconds: float = elapsed()

    @property
    def warnings(self) -> tuple[str, ...]:
        """The traps."""
        return self.traps

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "type": "adapter",
            **without_empty(
                plain(self), ("quantised_base", "tool", "family", "made_for", "scale_sources", "token", "deltas")
            ),
        }

    def summary(self, *, verbose: bool = False) -> Summary:
        """Format, kind, ranks, scales and sizes, then the parameters it changes.

        Alike parameters share a row, unless `verbose`.
        """
        sections: list[Section] = [Facts((*self._facts(), *(self._metadata() if verbose else ())))]
        if self.targets:
            sections.append(_every_parameter(self.modules) if verbose else _groups(self.targets))
        sections += delta_charts(self.deltas)
        if self.metadata and not verbose:
            sections.append(Note(numbered(len(self.metadata), "metadata string"), "omitted"))
        if self.ignored:
            sections.append(Note(("without effect on a base: ", NameList(tuple(self.ignored)))))
        return Summary(self.path.resolve().name, (*sections, *warning_notes(self.traps)))

    def _kind(self) -> Phrase:
        """``LoRA of 42 weights``; before that what the file says, where that is another word."""
        kinds = ", ".join(f"{kind} of {numbered(number, 'weight')}" for kind, number in self.kinds.items())
        if len(self.kinds) == 1 and self.kind.casefold() == next(iter(self.kinds)).casefold():
            return kinds
        return (Name(self.kind), f": {kinds}") if kinds else Name(self.kind)

    def _facts(self) -> list[tuple[str, Phrase]]:
        rows: list[tuple[str, Phrase]] = [
            ("adapter", Name(self.path, PATH)),
            ("format", Name(self.format)),
            ("kind", self._kind()),
        ]
        for label, values in (("rank", self.ranks), ("alpha", self.alphas), ("scale", self.scales)):
            if values:
                how = ", alpha / sqrt(rank)" if label == "scale" and self.rslora else ""
                rows.append((label, (Value(values, "spread", 6), how)))
        if self.scale_sources:
            found = (f"{number} {_SOURCES[source]}" for source, number in self.scale_sources.items())
            rows.append(("scales from", ", ".join(found)))
        if self.token is not None:
            rows.append(("token", Name(self.token)))
        if self.prompt is not None:
            rows.append(("prompt", _prompt(self.prompt)))
        if self.token_rows:
            rows.append(("token rows", _listed((Name(name), f": {len(ids)}") for name, ids in self.token_rows.items())))
        if self.family:
            rows.append(("family", f"{self.family}, by its names"))
        if self.made_for:
            rows.append(("made for", Name(self.made_for)))
        if self.tool:
            rows.append(("written by", Name(self.tool)))
        if self.base_name:
            rows.append(("base", Name(self.base_name, PATH)))
        if self.quantised_base:
            rows.append(("trained on", self.quantised_base))
        if self.base_id:
            rows.append(("base id", Name(self.base_id)))
        carried: tuple[Piece, ...] = (", and ", Value(self.carried, "count"), " carried along untrained")
        rows += [
            ("trained", (Value(self.parameters, "count"), " parameters", *(carried if self.carried else ()))),
            ("weights", files_phrase(self.files)),
            ("types", types_phrase(self.dtypes)),
        ]
        return rows

    def _metadata(self) -> list[tuple[str, Phrase]]:
        return [("metadata", (Name(name), " = ", Name(value, PATH))) for name, value in self.metadata.items()]


_SOURCES: Mapping[ScaleSource, str] = {
    "alpha": "alpha in the file",
    "adapter metadata": "lora_adapter_metadata",
    "training metadata": "ss_network_alpha",
    "rank": "nowhere: alpha is the rank",
    "none": "stored whole, without one",
}


def _listed(entries: Iterable[tuple[Piece, ...]]) -> Phrase:
    pieces: list[Piece] = []
    for entry in entries:
        pieces += [", "] * bool(pieces) + list(entry)
    return tuple(pieces)


def _prompt(prompt: PromptFacts) -> str:
    """``16 virtual tokens of 128 numbers``, or of keys and values."""
    twice = f" for each of {prompt.submodules} submodules" if prompt.submodules > 1 else ""
    if prompt.prefix is None:
        return f"{prompt.virtual_tokens} virtual tokens of {prompt.dim} numbers{twice}"
    layers, heads = f"{prompt.prefix.layers} layers", f"{prompt.prefix.kv_heads} heads of {prompt.prefix.head_dim}"
    return f"{prompt.virtual_tokens} virtual tokens, as keys and values of {layers}, {heads}{twice}"


def _groups(targets: tuple[TargetGroup, ...]) -> Table:
    columns = (
        Column("parameters like", "name"), Column("times", "integer"), Column("role"), Column("kind"),
        Column("rank", "spread", 6), Column("scale", "spread", 6), Column("parameters", "count"),
    )  # fmt: skip
    row = attrgetter("pattern", "count", "role", "kind", "ranks", "scales", "parameters")
    return Table(columns, tuple(map(row, targets)), "Parameters that it changes")


def _every_parameter(modules: tuple[TargetedParameter, ...]) -> Table:
    columns = (
        Column("parameter", "name"), Column("role"), Column("kind"), Column("shape", "shape"),
        Column("rank", "integer"),
        Column("alpha", "number", 6), Column("scale", "number", 6), Column("parameters", "count"),
    )  # fmt: skip
    row = attrgetter("name", "role", "kind", "shape", "rank", "alpha", "scale", "parameters")
    return Table(columns, tuple(map(row, modules)), "Parameters that it changes")
