# SPDX-License-Identifier: Apache-2.0
"""Write the canonical form to one file of weights, by the dialect of a format.

An adapter that was read from such a file, or made from several, is written under its own keys, and needs no base. Sites
from elsewhere get the dialect's spelling; flat ones need the base, which alone knows their dots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.grammar.dialect import Dialect
from surgery_formats.adapters.grammar.joining import WaitingParts
from surgery_formats.adapters.grammar.kinds.kind import LeafWriter
from surgery_formats.adapters.grammar.kinds.lora import LORA
from surgery_formats.adapters.grammar.kinds.magnitudes import has_lengths_of_rows_alone
from surgery_formats.adapters.grammar.naming import SiteNames, SpeltPart
from surgery_formats.adapters.grammar.refusals import Candidate, candidate_for, refusal
from surgery_formats.adapters.grammar.spelling import BUNDLE
from surgery_formats.adapters.grammar.spelt_modules import SpeltModules
from surgery_formats.adapters.grammar.written_scales import WrittenScales
from surgery_formats.adapters.writing import ConversionLedger, places_of
from surgery_formats.binding.growth import grown
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import show
from surgery_formats.updates import Update, is_directed, low_rank_part

__all__ = ["render_weight_file"]


def render_weight_file(adapter: Adapter, base: Checkpoint | None, dialect: Dialect) -> Rendering:
    """Render an adapter as one file. What the grammar has no leaves for is dropped.

    Raises:
        FitError: a weight that the base does not have.
    """
    spelt = SpeltModules.in_adapter(adapter, dialect.name)
    names = SiteNames(adapter, base, dialect, spelt)
    job = _Job(names, WrittenScales(adapter, dialect, spelt), WaitingParts(names))
    for site, chain in adapter.updates.items():
        for source in chain:
            job.write(site, source)
    job.write_joined()
    ledger = job.ledger
    tensors = {name: tensor for writer in job.writers.values() for name, tensor in writer.tensors.items()}
    metadata = job.scales.metadata(tensors.keys(), job.ranks)
    bundle_alone = all(name.startswith(BUNDLE) for name in tensors)  # a file of its own format: a textual inversion
    if not bundle_alone and not dialect.claims(tensors.keys()):
        ledger, tensors = _unrecognised(adapter), {}
    ledger.drop_prompt(adapter)
    ordered = tuple(tensors[name] for name in sorted(tensors))
    return Rendering(f"{adapter.path.stem}.safetensors", ordered, metadata, {}, tuple(ledger.entries), ledger.held)


def _unrecognised(adapter: Adapter) -> ConversionLedger:
    """Everything dropped: the file would be taken for a model, or for one of another format."""
    ledger = ConversionLedger()
    for site, chain in adapter.updates.items():
        for update in chain:
            ledger.drop(site, update, "its names do not tell such a file from a model, or from another format's")
    return ledger


@dataclass(frozen=True)
class _Job:
    """One file in the making.

    Attributes:
        names: What it calls sites.
        scales: Where it states their scales.
        waiting: What is written once its other parts are known.
        ledger: What became of every update.
        writers: The file's modules by stem.
        ranks: Ranks and alphas that the header states, by component and module.
    """

    names: SiteNames
    scales: WrittenScales
    waiting: WaitingParts
    ledger: ConversionLedger = field(default_factory=ConversionLedger)
    writers: dict[str, LeafWriter] = field(default_factory=dict)
    ranks: dict[str, dict[str, tuple[int, float]]] = field(default_factory=dict)

    @cached_property
    def leaves(self) -> Mapping[str, str]:
        """Spellings by role of modules that no file of this format had."""
        return {**self.names.dialect.leaves, **self.names.spelt.usual}

    def write(self, site: Site, source: Update) -> None:
        """Write one update, and record what became of it.

        Raises:
            FitError: a weight that the base does not have.
        """
        candidate = candidate_for(site, source, self.names)
        if why := refusal(candidate, self.names) or self._place(candidate):
            self.ledger.drop(site, source, why)

    def _place(self, candidate: Candidate) -> str:
        """Put an update into its modules; why there is no place for it, or empty."""
        site, update = candidate.site, candidate.update
        prefix = self.names.prefix(site)
        if prefix is None:
            return f"this format has no place for '{show(self.names.component(site))}'"
        if self.waiting.take(candidate, prefix):
            return ""
        parts = self.names.parts(site, update, prefix)
        if not parts:
            return self.names.why_none(site)
        writers = [self._writer(candidate, part) for part in parts]
        if is_directed(update) and not update.per_row and has_lengths_of_rows_alone(writers[0]):
            return "its magnitudes belong to columns, this format's to rows"
        assert candidate.kind is not None  # or `refusal` had told
        for writer, part in zip(writers, parts, strict=True):
            candidate.kind.write(part.update, candidate.parameter, writer)
        if any(self._has(writer) for writer in writers):  # of all parts, before one of them is in the file
            return "a second one of this kind on one module"
        for writer, part in zip(writers, parts, strict=True):
            self._keep(writer, prefix, part.update.rank, candidate.module if candidate.own else "")
        folded = "" if type(update) is type(candidate.source) else candidate.held.folded
        notes = ", ".join(dict.fromkeys(note for writer in writers for note in writer.notes)) or folded
        self.ledger.keep(site, candidate.source, "folded" if notes else "exact", notes or parts[0].stem)
        return ""

    def write_joined(self) -> None:
        """Write what waited for its other parts."""
        for whole, made in self.waiting.joined():
            if isinstance(made, str):
                for part in whole.parts:
                    self.ledger.drop(part.site, part.source, made)
                continue
            writer = LeafWriter(whole.stem, self.leaves, (), self.scales.with_alpha, self.scales.in_header)
            LORA.write(made, "weight", writer)
            self._keep(writer, whole.prefix, made.rank)
            for part in whole.parts:
                self.ledger.keep(part.site, part.source, "folded", f"with the other parts of {whole.stem}")

    def _writer(self, candidate: Candidate, part: SpeltPart) -> LeafWriter:
        """What collects the tensors of one module of an update."""
        scales, own = self.scales, candidate.own
        return LeafWriter(
            stem=part.stem,
            leaves={**self.leaves, **own.leaves} if own else self.leaves,
            kernel=part.kernel,
            with_alpha=scales.with_alpha,
            in_header=scales.in_header and low_rank_part(candidate.update) is not None,
            grows=self._states_shape(candidate),
            bias_scale=scales.of_bias(candidate.site),
            trained=scales.trained,
            alpha_dtype=scales.alpha_dtype(candidate.site, candidate.update),
        )

    def _states_shape(self, candidate: Candidate) -> bool:
        """Whether the shape of a weight that grows is written: as the file had it, or because the base's is smaller."""
        site, update, base = candidate.site, candidate.update, self.names.base
        if candidate.own is not None:
            return "reshape_weight" in candidate.own.leaves
        if not (site.grows and self.names.dialect.whole):
            return False
        if base is None:
            return True
        places = places_of(site, base, update.tensors)
        return grown(update, places) != places

    def _has(self, writer: LeafWriter) -> bool:
        """Whether the file has one of the tensors that were written of a module."""
        known = self.writers.get(writer.stem)
        return known is not None and bool(known.tensors.keys() & writer.tensors.keys())

    def _keep(self, writer: LeafWriter, prefix: str, rank: int | None, module: str = "") -> None:
        """Put what was written of a module beside the rest."""
        known = self.writers.setdefault(writer.stem, writer)
        known.tensors.update(writer.tensors)
        if writer.alpha is not None and rank:
            called = module or writer.stem.removeprefix(prefix).rstrip(".")
            self.ranks.setdefault(prefix.rstrip("."), {})[called] = rank, writer.alpha
