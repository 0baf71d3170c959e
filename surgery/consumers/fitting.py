# SPDX-License-Identifier: Apache-2.0
"""The rewriting of an adapter that a consumer honours, composed by what its rules ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from surgery.algebra.combined_adapter import combined_adapter
from surgery.algebra.lora_form import LoraForm, lora_form
from surgery.consumers.consent import Consent
from surgery.consumers.consumer import Consumer
from surgery.consumers.facts import facts_of
from surgery.consumers.rewriting import padded, scaled_inside, with_partners
from surgery.consumers.traits import Trait
from surgery.consumers.verdict import Remedy, Verdict
from surgery.engine.leaving_out import without
from surgery_formats.adapters.format import Entry, Format, Outcome, Scaled
from surgery_formats.canonical.adapter import Adapter, WeightedAdapter
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing, show
from surgery_formats.updates import Update

__all__ = ["FittedAdapter", "as_it_would_be_read", "fitted"]

_ROUNDS = 8  # partners bring partners, and a new rank new scales: each a round or two
_SHOWN = 3
_OF_WRITING: frozenset[Remedy] = frozenset({"dialect", "rewrite"})
"""Remedies that are a matter of writing: what is read back shows whether they helped."""

_OF_CONFIGURATION: frozenset[Trait] = frozenset(
    {
        "LoRA taken for experts",
        "beyond the targets",
        "missing fields",
        "bias setting",
        "promised modules",
        "no targets",
    }
)
"""What a configuration that is written for the tensors as they are does not have."""


@dataclass(frozen=True)
class FittedAdapter:
    """An adapter that a consumer honours, for a writer.

    Attributes:
        adapter: The adapter.
        kept: The original without what was left out.
        rest: What was left out, to be merged into the base; None where nothing is.
        form: What became LoRAs, where something did.
        left_out: Entries of what was left out.
        done: What was done, by site.
    """

    adapter: Adapter
    kept: Adapter
    rest: Adapter | None
    form: LoraForm | None
    left_out: tuple[Entry, ...]
    done: Mapping[str, str]

    def restated(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        """The writer's entries, with what was done before it."""
        entries = self.form.restated(entries) if self.form is not None else entries
        return (*(self._restated(entry) for entry in entries), *self.left_out)

    def _restated(self, entry: Entry) -> Entry:
        if entry.site not in self.done:
            return entry
        detail = ", ".join(filter(None, (entry.detail, self.done[entry.site])))
        return replace(entry, outcome="folded" if entry.outcome == "exact" else entry.outcome, detail=detail)


def as_it_would_be_read(adapter: Adapter, target: Format) -> Adapter:
    """The adapter as a reader of its files in the format `target` would see it."""
    return replace(target.described(adapter) if isinstance(target, Scaled) else adapter, format=target.name)


def fitted(
    adapter: Adapter, base: Checkpoint, consumer: Consumer, version: tuple[int, ...], target: Format, consent: Consent
) -> FittedAdapter:
    """Rewrite an adapter until a consumer honours all of it.

    Raises:
        FitError: a part that only a merge brings into the consumer, or one that the user must decide about.
    """
    seen = replace(adapter, format=target.name) if adapter.format != target.name else adapter
    facts = facts_of(seen, base, consent.greatest_rank)
    verdicts = [one for one in consumer.judge(facts, version) if one.outcome != "honoured"]
    if not verdicts and adapter.format == target.name:
        return FittedAdapter(adapter, adapter, None, None, (), {})
    _check_remedies(verdicts, adapter, consumer)
    out = _left_out(verdicts, adapter, consumer, consent)
    if target.name != "peft":  # whose files alone bring the base's own values along
        carried = [part for part in facts.parts if part.trait == "carried weight"]
        out |= {(part.name, part.trait): "the base's own values" for part in carried}
    gone = [part.update for part in facts.parts if part.update is not None and (part.name, part.trait) in out]
    left = without(replace(adapter, updates=facts.updates), gone, (name for name, _ in out))
    outcome: Outcome = "folded" if consent.merged else "dropped"
    entries = tuple(
        Entry(name, *(("dropped", why) if what == "carried weight" else (outcome, why)))
        for (name, what), why in out.items()
    )
    rest = _rest(adapter, gone) if consent.merged else None
    turned = {
        one.part for one in verdicts if one.remedy in ("lora", "cut", "saved") and (one.part, one.what) not in out
    }
    if consent.rank is None:
        _check_ranks(verdicts, adapter, consumer, consent)
    form = _as_loras(left, turned, base, target, consent)
    updates = {**left.updates, **(form.adapter.updates if form is not None else {})}
    made = combined_adapter([WeightedAdapter(left, 1.0)], updates, target)
    if any(one.what in _OF_CONFIGURATION for one in verdicts):  # its own would say the same again
        made = replace(made, format="combined", config={})
    if any(one.remedy == "rewrite" for one in verdicts):  # keys as they came are what stands in the way
        made = replace(made, spelling={})
    done: dict[str, str] = {}
    for _ in range(_ROUNDS):
        facts = facts_of(as_it_would_be_read(made, target), base, consent.greatest_rank)
        found = consumer.judge(facts, version)
        verdicts = [one for one in found if one.outcome != "honoured" and one.remedy not in _OF_WRITING]
        if not verdicts:
            return FittedAdapter(made, left, rest, form, entries, done)
        made = _next(made, base, verdicts, done)
    _check_ranks(verdicts, adapter, consumer, consent)
    raise FitError(
        f"no rewriting was found that {consumer.title} honours: '{show(verdicts[0].part)}', {verdicts[0].why}",
        file=adapter.path,
        hint="merge it into the base",
    )


def _as_loras(adapter: Adapter, names: set[str], base: Checkpoint, target: Format, consent: Consent) -> LoraForm | None:
    """The updates at some sites as LoRAs; None if there are none. The rank that was chosen is theirs alone."""
    sites = [site for site in adapter.updates if str(site) in names]
    if not sites:
        return None
    return lora_form(adapter.only(sites), base, target, consent.rank, saved=consent.saved == "lora")


def _next(adapter: Adapter, base: Checkpoint, verdicts: Sequence[Verdict], done: dict[str, str]) -> Adapter:
    """One more step, the first that any verdict asks for."""
    asked: set[Remedy] = {one.remedy for one in verdicts}
    if "partners" in asked:
        partners = {one.needs: one.module for one in verdicts if one.remedy == "partners"}
        done |= {f"{path}.weight": "zeros beside the others" for path in partners}
        return with_partners(adapter, base, partners)
    if "pad" in asked:
        made = padded(adapter)
        for site, chain in made.updates.items():
            if chain is not adapter.updates[site] and chain != adapter.updates[site]:
                done[str(site)] = f"rank {adapter.updates[site][-1].rank} padded to {chain[-1].rank}"
        return made
    if "scale" in asked:
        factors = {one.part: one.factor for one in verdicts if one.remedy == "scale" and one.factor}
        done |= {name: f"scale multiplied into B, times {1 / factor:.4g}" for name, factor in factors.items()}
        return scaled_inside(adapter, factors)
    return adapter


def _check_remedies(verdicts: Sequence[Verdict], adapter: Adapter, consumer: Consumer) -> None:
    """Refuse what only a merge brings into the consumer.

    Raises:
        FitError: there is such a part.
    """
    hopeless = [one for one in verdicts if not one.remedy]
    if hopeless:
        raise FitError(
            f"{consumer.title} has no way to honour '{show(hopeless[0].part)}' ({hopeless[0].what}: {hopeless[0].why})",
            file=adapter.path,
            hint="`surgery export-onnx` puts it in front of the input"
            if hopeless[0].what == "virtual tokens"
            else "merge it into the base, which every program then loads",
        )


def _rest(adapter: Adapter, gone: Sequence[Update]) -> Adapter | None:
    """An adapter of the updates that are left out of another."""
    out = {id(update) for update in gone}
    chains = {site: tuple(one for one in chain if id(one) in out) for site, chain in adapter.updates.items()}
    updates = {site: chain for site, chain in chains.items() if chain}
    used = {tensor.name for chain in updates.values() for update in chain for tensor in update.tensors}
    tensors = tuple(tensor for tensor in adapter.tensors if tensor.name in used)
    return replace(adapter, updates=updates, tensors=tensors, ignored=(), examine=tuple) if updates else None


def _check_ranks(verdicts: Sequence[Verdict], adapter: Adapter, consumer: Consumer, consent: Consent) -> None:
    """Refuse a rank above what the consumer takes.

    Raises:
        FitError: there is one.
    """
    if cut := next((one for one in verdicts if one.remedy == "cut"), None):
        most = consent.greatest_rank or consumer.greatest_rank
        raise FitError(
            f"'{show(cut.part)}': {cut.why}",
            file=adapter.path,
            hint=f"`rank={most}` cuts it, with the error shown; `max_rank=` says what the program was started with",
        )


def _left_out(
    verdicts: Sequence[Verdict], adapter: Adapter, consumer: Consumer, consent: Consent
) -> dict[tuple[str, str], str]:
    """What is left out, by part and trait, and why.

    Raises:
        FitError: the user has not decided.
    """
    saved = [one for one in verdicts if one.remedy == "saved"]
    lost = [one for one in verdicts if one.remedy == "drop"]
    if consent.merged:
        chosen = [*lost, *(saved if consent.saved != "lora" else [])]
        return {(one.part, one.what): f"{one.what}: merged into the base" for one in chosen}
    if saved and consent.saved is None:
        raise FitError(
            f"{consumer.title} cannot hold {_some(saved, 'module')} trained in full: {listing(one.part for one in saved)}",
            file=adapter.path,
            hint='`saved="lora"` makes a LoRA of the difference to the base, `saved="drop"` leaves them out, '
            "`merge_rest=` merges them into a copy of the base",
        )
    if lost and not consent.loss:
        named = "; ".join(f"'{show(one.part)}' ({one.what}: {one.why})" for one in lost[:_SHOWN])
        more = f"; and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise FitError(
            f"{consumer.title} cannot honour {_some(lost, 'part')}: {named}{more}",
            file=adapter.path,
            hint="`merge_rest=` merges them into a copy of the base, `allow_loss=True` leaves them out",
        )
    dropped = [*lost, *(saved if consent.saved == "drop" else [])]
    return {(one.part, one.what): f"{one.what}: {one.why}" for one in dropped}


def _some(verdicts: Sequence[Verdict], what: str) -> str:
    return f"{len(verdicts)} {what}{'' if len(verdicts) == 1 else 's'}"
