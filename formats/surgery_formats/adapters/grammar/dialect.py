# SPDX-License-Identifier: Apache-2.0
"""A dialect: what one format of one-file adapters spells its own way. It is all that such a format has to say."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from surgery_formats.adapters.grammar.leaves import LEAVES, NORMS_OF_FLUX
from surgery_formats.adapters.grammar.spelling import KeyPrefix, split_key
from surgery_formats.adapters.relaid import Program
from surgery_formats.models.factor_names import holds_factors_alone
from surgery_formats.models.families.denoisers import COMPONENTS

__all__ = ["Dialect"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """The spelling of one format.

    Attributes:
        name: Of the format.
        prefixes: How keys may begin; the first that fits is taken.
        own: Beginnings that no other format has: a file with such a key is of this one. Without any, all keys have to be
            modules with known leaves, and the format is asked after those that have some.
        foreign: Beginnings that no file of this format has, unless it has some of `but`.
        but: See `foreign`.
        mark: An expression that every module's keys match besides, where others have the same beginnings.
        written: The prefix that is written for each component of a pipeline; of one without a name first.
        leaves: Spellings of roles in what is written from other formats.
        with_alpha: Whether scales are written as alphas beside factors from other formats.
        in_header: Whether they are written into the header instead, as diffusers does.
        in_release: Whether modules have their makers' names, whatever the base calls them.
        names_of: Whose names of modules are written, where the dialect has one for what a base holds fused or otherwise.
        encoders: The prefix of a text encoder by the type of its model, or by type and component (``t5``,
            ``clip_text_model:text_encoder``), where the component alone does not tell it; in a file that ComfyUI saved by its
            name there (``t5xxl``, or ``*`` for any).
        loaded: Kinds of updates that the format's own program loads; others are written only where a file had them. None
            for all that the grammar has.
        norms: Ends of the modules whose weights that program takes whole, with a dot behind.
        whole: Whether that program takes whole weights, and weights that grow (ComfyUI's ``set_weight``, ``reshape_weight``).
    """

    name: str
    prefixes: tuple[KeyPrefix, ...]
    own: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    but: tuple[str, ...] = ()
    mark: str = ""
    written: Mapping[str, str] = field(default_factory=dict)
    leaves: Mapping[str, str] = field(default_factory=dict)
    with_alpha: bool = True
    in_header: bool = False
    names_of: Program | None = None
    in_release: bool = False
    encoders: Mapping[str, str] = field(default_factory=dict)
    loaded: frozenset[str] | None = None
    norms: tuple[str, ...] = ()
    whole: bool = False

    def claims(self, names: Collection[str]) -> bool:
        """Whether a file with these keys is of this format: it has its beginnings, and holds factors alone."""
        has_foreign = bool(self.foreign) and any(name.startswith(self.foreign) for name in names)
        if has_foreign and not any(name.startswith(self.but) for name in names):
            return False
        if self.own and not any(name.startswith(self.own) for name in names):
            return False
        if self.mark and not all(re.match(self.mark, name) for name in names):
            return False
        if not self.own and not holds_factors_alone(names):  # before every name of a model is taken apart
            return False
        leaves = [self._is_leaf(name, names) for name in names]
        if not self.own:
            return all(leaves)
        return any(leaves) and (self.flat or all(leaves) or holds_factors_alone(names))

    @property
    def flat(self) -> bool:
        """Whether modules of all its keys are flattened: their beginnings are no model's."""
        return all(prefix.flat for prefix in self.prefixes)

    def _is_leaf(self, name: str, names: Collection[str]) -> bool:
        key = split_key(name, self.prefixes)
        if key is None or self.flat:
            return key is not None
        # "weight" and "scale" are leaves, and the ends of many a name that is none of this grammar
        if key.leaf == "weight":
            return f"{key.stem}on_input" in names
        if key.leaf == "scale":
            return key.module.endswith(NORMS_OF_FLUX) or any(
                f"{key.stem}{leaf}" in names for leaf in LEAVES.keys() - {"scale"}
            )
        return key.leaf in LEAVES

    def prefix_for(self, component: str) -> str | None:
        """How keys of a component begin in what is written; None if the format has no place for it."""
        if component in self.written:
            return self.written[component]
        alike = [name for name in COMPONENTS if name in self.written] if component in COMPONENTS else []
        return self.written[alike[0]] if alike else None
