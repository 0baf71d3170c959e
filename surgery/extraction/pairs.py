# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a fine-tune belongs to which of its base; what does not belong together is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Component
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import closest, listing, show

__all__ = ["Pair", "differing_settings", "pair_up"]

Match = Literal["pair", "alias", "derivable"]


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor of TUNED and what BASE has in its place.

    Attributes:
        name: As TUNED names it (an untied head has its own name even where BASE stores none).
        base: BASE's tensor; for a head that only TUNED stores apart, BASE's embedding.
        tuned: TUNED's tensor.
        match: Whether it is to be compared, or is another name of a tensor that is, or is computed when the model is built.
        why: For the ledger.
    """

    name: str
    base: StoredTensor
    tuned: StoredTensor
    match: Match = "pair"
    why: str = ""

    @property
    def grown(self) -> int:
        """Rows that TUNED has and BASE lacks."""
        return self.tuned.shape[0] - self.base.shape[0] if self.tuned.shape else 0


def pair_up(base: Component, tuned: Component) -> tuple[Pair, ...]:
    """Every tensor of TUNED with its place in BASE, in TUNED's order.

    Raises:
        FitError: another architecture, a tensor that one of them lacks, or another shape.
    """
    _check_kind(base, tuned)
    found, lacking, met = [], [], set()
    for name, tensor in tuned.tensors.items():
        source = tuned.aliases.get(name)
        if source and source in tuned.tensors and tuned.tensors[source].place == tensor.place:
            found.append(Pair(name, tensor, tensor, "alias", f"tied to {source}"))
            continue
        if any(f".{name}".endswith(f".{leaf}") for leaf in tuned.family.derivable):
            found.append(Pair(name, tensor, tensor, "derivable", "computed when the model is built"))
            continue
        place = base.tensors.get(name) or base.tensors.get(base.aliases.get(name, "")) or _elsewhere(name, base, tensor)
        if place is None:
            lacking.append(name)
            continue
        met.add(place.name)
        found.append(Pair(name, place, tensor))
    if lacking:
        raise FitError(
            f"BASE lacks {len(lacking)} of TUNED's {len(tuned.tensors)} tensors: {listing(lacking)}",
            file=tuned.folder,
            tensor=lacking[0],
            hint=(closest(lacking[0], base.tensors) if len(lacking) == 1 else "")
            or "is this the base it was tuned from?",
        )
    missing = [
        name
        for name in base.tensors
        if name not in met
        and name not in tuned.tensors
        and base.aliases.get(name, tuned.aliases.get(name)) not in tuned.tensors
        and not any(f".{name}".endswith(f".{leaf}") for leaf in base.family.derivable)
    ]
    if missing:
        raise FitError(
            f"TUNED lacks {len(missing)} of BASE's {len(base.tensors)} tensors: {listing(missing)}",
            file=tuned.folder,
            tensor=missing[0],
            hint=(closest(missing[0], tuned.tensors) if len(missing) == 1 else "")
            or "is this the base it was tuned from?",
        )
    wrong = [pair for pair in found if pair.base.shape != pair.tuned.shape and not _may_grow(pair, tuned)]
    if wrong:
        pair = wrong[0]
        raise FitError(
            f"{list(pair.tuned.shape)} in TUNED, {list(pair.base.shape)} in BASE ({len(wrong)} tensors differ in shape: "
            f"{listing(pair.name for pair in wrong)})",
            file=pair.tuned.file.path,
            tensor=pair.name,
            hint="is this the base it was tuned from?",
        )
    for pair in found:
        _check_types(pair)
    return tuple(found)


def _check_types(pair: Pair) -> None:
    """Codes of a quantised model and plain numbers have no difference, and an adapter can put neither in the other's place."""
    one, other = pair.base.dtype, pair.tuned.dtype
    if one is not other and not (one.is_float and other.is_float):
        raise FitError(
            f"{other.label} in TUNED, {one.label} in BASE, which cannot be subtracted",
            file=pair.tuned.file.path,
            tensor=pair.name,
            hint="take both in a plain floating-point type: F32, F16 or BF16",
        )


def _elsewhere(name: str, base: Component, tensor: StoredTensor) -> StoredTensor | None:
    """The same weight under another spelling (another era's names, a prefix more or less)."""
    places = base.names.resolve(name)
    if len(places) != 1:
        return None
    stored = places[0].parameter.storage.tensor
    return stored if isinstance(stored, StoredTensor) and stored.shape == tensor.shape else None


def _may_grow(pair: Pair, tuned: Component) -> bool:
    """Only a vocabulary may: the embedding, and the head that goes with it."""
    same = len(pair.base.shape) == 2 == len(pair.tuned.shape) and pair.base.shape[1] == pair.tuned.shape[1]
    return same and pair.grown > 0 and pair.name in (tuned.embedding, tuned.head)


_DECIDES = (
    "rope_theta",
    "rope_scaling",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_eps",
    "num_attention_heads",
    "sliding_window",
)


def _check_kind(base: Component, tuned: Component) -> None:
    """Equal shapes are not enough: the same tensors mean something else in another architecture."""
    for key in ("model_type", "_class_name"):
        one, other = base.config.get(key), tuned.config.get(key)
        if one and other and one != other:
            raise FitError(
                f"TUNED is a '{show(other)}', BASE is a '{show(one)}'",
                file=tuned.folder,
                hint="extract from the base that TUNED was tuned from",
            )


def differing_settings(base: Component, tuned: Component) -> tuple[str, ...]:
    """Warnings of settings that make another function of the same tensors: an adapter cannot hold them."""
    return tuple(
        f"'{key}' is {show(repr(tuned.config[key]), 60)} in TUNED and {show(repr(base.config[key]), 60)} in BASE, which no adapter holds"
        for key in _DECIDES
        if key in base.config and key in tuned.config and base.config[key] != tuned.config[key]
    )
