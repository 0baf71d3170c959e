# SPDX-License-Identifier: Apache-2.0
"""What a consumer is: a program that loads adapters, with rules about what it makes of each part of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from surgery.consumers.facts import AdapterFacts
from surgery.consumers.part import AdapterPart
from surgery.consumers.rules import TraitRule, honoured, refused
from surgery.consumers.scales import Formula
from surgery.consumers.traits import Trait
from surgery.consumers.verdict import FORMAT, Verdict

__all__ = ["Consumer", "ModuleGroup", "RuledConsumer", "SourceRead"]

_SAME = 1e-6
"""Relative difference of two scales that counts as none."""


@dataclass(frozen=True, slots=True)
class SourceRead:
    """Code that rules were read from.

    Attributes:
        program: Package or repository.
        version: Of the package, or a commit.
        file: Path within it.
        name: Function or class.
    """

    program: str
    version: str
    file: str
    name: str = ""


class Consumer(Protocol):
    """A program that loads adapters. Adding one is a file with such an object, in `registry.BUILT_IN` or a plugin."""

    @property
    def name(self) -> str:
        """As in ``surgery check --for NAME``."""

    @property
    def title(self) -> str:
        """One line."""

    @property
    def version(self) -> str:
        """The newest version that its rules were read from."""

    @property
    def oldest(self) -> str:
        """The oldest version that they hold for."""

    @property
    def sources(self) -> tuple[SourceRead, ...]:
        """Where they were read."""

    @property
    def format(self) -> str:
        """Name of the adapter format that it loads."""

    @property
    def otherwise(self) -> str:
        """Another that it loads, for what that has no names for; empty without one."""

    @property
    def dialect(self) -> str:
        """The dialect of experts to write for it; empty where it needs none of its own."""

    @property
    def greatest_rank(self) -> int | None:
        """Of a LoRA, unless the program is told otherwise as it starts; None for any."""

    def judge(self, facts: AdapterFacts, version: tuple[int, ...]) -> tuple[Verdict, ...]:
        """What that version of the program makes of every part of an adapter."""


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """Modules side by side that a program puts into one.

    Attributes:
        having: A module of this name ...
        needs: ... needs one of this name beside it.
        rule: What becomes of it otherwise.
    """

    having: str
    needs: str
    rule: TraitRule


def _no_exception(part: AdapterPart, facts: AdapterFacts, version: tuple[int, ...]) -> TraitRule | None:
    return None


def _no_other(facts: AdapterFacts) -> bool:
    return False


def _beyond(facts: AdapterFacts, verdicts: tuple[Verdict, ...]) -> tuple[Verdict, ...]:
    """The verdicts on all that was trained, if a program honours none of it in its own format either, in no form."""
    trained = {part.name for part in facts.parts if part.update is not None or part.trait == "virtual tokens"}
    found = tuple(one for one in verdicts if one.part in trained)
    return () if any(one.outcome == "honoured" or one.remedy for one in found) else found


@dataclass(frozen=True)
class RuledConsumer:
    """A consumer whose rules are data.

    Attributes:
        name: See `Consumer`.
        title: See `Consumer`.
        version: See `Consumer`.
        oldest: See `Consumer`.
        sources: See `Consumer`.
        format: See `Consumer`.
        rules: What becomes of parts of each trait: a start of `surgery.consumers.starts`, and what differs. A plain LoRA
            is honoured.
        otherwise: Another format that it loads, for what `format` has no names for; empty without one.
        reads: Formats of adapters that it loads; of others it refuses the whole file ...
        reads_too: ... but for those that this is true of.
        native: Formats of its own, of which nothing can be read that it does not load: what such a file holds acts as the
            file says, but for `exceptions`.
        scale: How it works out scales; None where it does as the file's format means it.
        one_rank: What becomes of a LoRA whose rank is not the configuration's ``r``.
        leaves: Last names of modules that it knows; empty for any.
        other_leaf: What becomes of the LoRA of another.
        groups: Modules that it puts together.
        since: Rules of later versions: the first version with other rules, and these. They come in order.
        scale_since: The same for `scale`.
        greatest_rank: Of a LoRA, unless the program is told otherwise as it starts; None for any.
        dialect: The dialect of experts to write for it (`surgery_formats.adapters.peft.dialects`).
        of_kinds: What becomes of updates of the trait ``other kind`` by their kind, where that differs from the rule.
        exceptions: Rules of single parts, for what no table holds; None leaves a part to its trait.
    """

    name: str
    title: str
    version: str
    oldest: str
    sources: tuple[SourceRead, ...]
    rules: Mapping[Trait, TraitRule]
    format: str = "peft"
    otherwise: str = ""
    reads: frozenset[str] = frozenset({"peft"})
    reads_too: Callable[[AdapterFacts], bool] = field(default=_no_other)
    native: frozenset[str] = frozenset()
    scale: Formula | None = None
    one_rank: TraitRule = honoured
    leaves: frozenset[str] = frozenset()
    other_leaf: TraitRule = honoured
    groups: tuple[ModuleGroup, ...] = ()
    since: tuple[tuple[tuple[int, ...], Mapping[Trait, TraitRule]], ...] = ()
    scale_since: tuple[tuple[tuple[int, ...], Formula | None], ...] = ()
    greatest_rank: int | None = None
    dialect: str = ""
    of_kinds: Mapping[str, TraitRule] = field(default_factory=dict)
    exceptions: Callable[[AdapterPart, AdapterFacts, tuple[int, ...]], TraitRule | None] = field(default=_no_exception)

    def judge(self, facts: AdapterFacts, version: tuple[int, ...]) -> tuple[Verdict, ...]:
        """One verdict for each part."""
        if facts.adapter.format in self.native:
            own = ((part, self.exceptions(part, facts, version) or honoured) for part in facts.parts)
            return tuple(Verdict(part.name, part.trait, rule.outcome, rule.why, rule.remedy) for part, rule in own)
        if facts.adapter.format not in self.reads and not self.reads_too(facts):
            anew = replace(facts, adapter=replace(facts.adapter, format=self.format))
            if beyond := _beyond(anew, self.judge(anew, version)):
                return beyond
            why = f"it loads {', '.join(sorted(self.reads | self.native))}; this is {facts.adapter.format}"
            return (Verdict(facts.adapter.path.name, FORMAT, "refused", why, "rewrite"),)
        rules: dict[Trait, TraitRule] = {"LoRA": honoured, **self.rules}
        scale = self.scale
        for first, changed in self.since:
            rules |= changed if version >= first else {}
        for first, formula in self.scale_since:
            scale = formula if version >= first else scale
        found = ((part, self.exceptions(part, facts, version) or self._rule(part, rules)) for part in facts.parts)
        return tuple(self._verdict(part, rule, scale, facts) for part, rule in found)

    def _rule(self, part: AdapterPart, rules: Mapping[Trait, TraitRule]) -> TraitRule:
        """By its kind, else by its trait."""
        own = self.of_kinds.get(part.kind) if part.trait == "other kind" else None
        return own or rules[part.trait]

    def _verdict(self, part: AdapterPart, rule: TraitRule, scale: Formula | None, facts: AdapterFacts) -> Verdict:
        """One part: by its trait, then by its module's name, its partners, its rank, its scale."""
        needs = ""
        if rule.outcome == "honoured" and part.scale is not None:
            rule, needs = self._of_module(part, facts)
        if rule.outcome != "honoured" or scale is None or part.scale is None or part.rank is None:
            return Verdict(part.name, part.trait, rule.outcome, rule.why, rule.remedy, needs=needs)
        used = scale(facts.config, part.rank)
        if math.isclose(used, part.scale, rel_tol=_SAME):
            return Verdict(part.name, part.trait, "honoured")
        factor = used / part.scale if part.scale else None
        why = f"it uses {used:.4g}, where {part.scale:.4g} was trained"
        return Verdict(part.name, part.trait, "scaled wrongly", why, "scale", factor)

    def _of_module(self, part: AdapterPart, facts: AdapterFacts) -> tuple[TraitRule, str]:
        """By the module that a LoRA is of, and the path of the partner that it lacks."""
        if self.leaves and part.leaf not in self.leaves:
            return self.other_leaf, ""
        for group in self.groups:
            beside = f"{part.module.removesuffix(group.having)}{group.needs}"
            if part.leaf == group.having and beside not in facts.modules:
                return group.rule, beside
        if (most := facts.greatest_rank or self.greatest_rank) and (part.rank or 0) > most:
            return refused(f"rank {part.rank} is above {most}, what it takes unless it is started with more", "cut"), ""
        if self.one_rank.outcome != "honoured" and part.rank != facts.config.get("r", part.rank):
            return self.one_rank, ""
        return honoured, ""
