# SPDX-License-Identifier: Apache-2.0
"""Write the canonical form to one file of weights, by the dialect of a format.

An adapter that was read from such a file, or made from several, is written under its own keys, and needs no base. Sites
from elsewhere get the dialect's spelling; flat ones need the base, which alone knows their dots.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

from surgery_formats.adapters.contents import contents_of
from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.grammar.dialect import Dialect
from surgery_formats.adapters.grammar.header import ADAPTER_METADATA, header_of
from surgery_formats.adapters.grammar.kinds import kind_of_update
from surgery_formats.adapters.grammar.kinds.kind import LeafWriter
from surgery_formats.adapters.grammar.kinds.lora import LORA
from surgery_formats.adapters.grammar.kinds.magnitudes import has_lengths_of_rows_alone
from surgery_formats.adapters.grammar.kinds.whole import WHOLE
from surgery_formats.adapters.grammar.leaves import LEAVES, NORMS_OF_FLUX, longest_leaf
from surgery_formats.adapters.grammar.scales import StatedScales
from surgery_formats.adapters.grammar.spelling import BUNDLE
from surgery_formats.adapters.grammar.spelt_modules import ModuleSpelling, SpeltModules
from surgery_formats.adapters.relaid import Whole, relaid, whole_of
from surgery_formats.adapters.rows import Span, joined
from surgery_formats.adapters.writing import (
    ConversionLedger,
    commonest,
    places_of,
    restate,
    surviving_metadata,
    whole_place,
)
from surgery_formats.binding.growth import grown
from surgery_formats.binding.sizes import component_of
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.families.denoisers import COMPONENTS, denoiser_of
from surgery_formats.models.names import Names, WeightSlice
from surgery_formats.updates import LoRA, Update, is_directed, is_replacing, low_rank_part

__all__ = ["render_weight_file"]

_CLIP, _TEXT = "clip_text_model", "text_model."  # a level of every published CLIP, which transformers 5 leaves out
_NO_PLACE: Mapping[str, str] = {
    "embedding": "embeddings",
    "experts": "stacked experts",
    "attention output": "the inside of a torch.nn.MultiheadAttention",
}


def render_weight_file(adapter: Adapter, base: Checkpoint | None, dialect: Dialect) -> Rendering:
    """Render an adapter as one file. What the grammar has no leaves for is dropped.

    Raises:
        FitError: a weight that the base does not have.
    """
    spelt = SpeltModules.in_adapter(adapter, dialect.name)
    job = _Job(adapter, base, dialect, spelt)
    ledger = ConversionLedger()
    for site, chain in adapter.updates.items():
        for source in chain:
            if why := job.write(site, source):
                ledger.drop(site, source, why)
            elif job.waiting is not None:
                ledger.keep(site, source, "folded", f"with the other parts of {job.stem}")
            else:
                notes = ", ".join(job.notes)
                ledger.keep(site, source, "folded" if notes else "exact", notes or job.stem)
    job.write_joined()
    tensors = {name: tensor for writer in job.writers.values() for name, tensor in writer.tensors.items()}
    bundle_alone = all(name.startswith(BUNDLE) for name in tensors)  # a file of its own format: a textual inversion
    if not bundle_alone and not dialect.claims(tensors.keys()):
        ledger, tensors = _unrecognised(adapter), {}
    ledger.drop_prompt(adapter)
    metadata = _metadata(adapter, job)
    ordered = tuple(tensors[name] for name in sorted(tensors))
    return Rendering(f"{adapter.path.stem}.safetensors", ordered, metadata, {}, tuple(ledger.entries), ledger.held)


def _unrecognised(adapter: Adapter) -> ConversionLedger:
    """Everything dropped: the file would be taken for a model, or for one of another format."""
    ledger = ConversionLedger()
    for site, chain in adapter.updates.items():
        for update in chain:
            ledger.drop(site, update, "its names do not tell such a file from a model, or from another format's")
    return ledger


@dataclass(frozen=True, slots=True)
class _SpeltPart:
    """One module of the file, or a part of what a site has.

    Attributes:
        stem: What stands before the leaf.
        kernel: Sizes of a convolution's kernel.
        update: What it holds.
    """

    stem: str
    kernel: tuple[int, ...]
    update: Update


@dataclass
class _Job:
    """One file in the making.

    Attributes:
        writers: By stem.
        ranks: Ranks and alphas of modules that the header states, by component and path.
        notes: What was multiplied into which, for the update written last.
        stem: Of that update.
        waiting: The whole that the update written last is a part of, which is written with its other parts.
        wholes: Those weights by their stems: their heights, and the parts, each with its rows and theirs.
    """

    adapter: Adapter
    base: Checkpoint | None
    dialect: Dialect
    spelt: SpeltModules
    writers: dict[str, LeafWriter] = field(default_factory=dict)
    ranks: dict[str, dict[str, tuple[int, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stem: str = ""
    waiting: str | None = None
    wholes: dict[str, _Waiting] = field(default_factory=dict)

    @property
    def with_alpha(self) -> bool:
        """Whether scales stand beside factors."""
        return self.spelt.has_alphas if self.spelt.modules else self.dialect.with_alpha

    @property
    def in_header(self) -> bool:
        """Whether scales stand in the header."""
        if self.with_alpha:
            return False
        return ADAPTER_METADATA in self.adapter.metadata if self.spelt.modules else self.dialect.in_header

    def write(self, site: Site, source: Update) -> str:
        """Write one update; why it cannot be, or empty."""
        self.waiting = None
        held = contents_of(source)
        update: Update = source if kind_of_update(source.kind) else (held.lora or held.offset or source)
        kind = kind_of_update(update.kind)
        module, _, parameter = site.path.rpartition(".")
        own = self.spelt.at(site)
        role = f"whole_{parameter}"
        is_whole = role in own.leaves if own else role in self.dialect.leaves and module.endswith(NORMS_OF_FLUX)
        if is_whole and is_replacing(update):
            kind = WHOLE
        elif own is None and is_replacing(update) and self._is_loaded_norm(site, update):
            kind, parameter = WHOLE, "weight"
        elif kind is None or (
            is_replacing(update) and not (self.dialect.whole or (own and "set_weight" in own.leaves))
        ):
            return f"this format has no {source.kind}"
        if len(chain := self.adapter.updates[site]) > 1 and any(other.effect == "maps" for other in chain):
            return "programs that read it take one kind of change for each module"
        if own is None and not kind.takes(update):
            return f"this format has no {source.kind}"
        loaded = self.dialect.loaded is None or update.kind in self.dialect.loaded or kind is WHOLE
        loaded = loaded or ("up_bias" in self.dialect.leaves and parameter == "bias" and bool(self._beside(site)))
        if own is None and not loaded:
            return f"the format's own program loads no {source.kind}"
        if own is None and self.dialect.in_header and update.kind == "LoRA" and site.component in self._directed:
            return "the format's own program loads no LoRA beside a DoRA"
        if site.module_kind in _NO_PLACE:
            return f"this format has no place for {_NO_PLACE[site.module_kind]}"
        named = parameter == "weight" or (parameter == "bias" and held.offset) or kind is WHOLE
        named = named or (own is not None and parameter == "modulation" and "diff_m" in own.leaves)
        named = named or (own is not None and parameter == "output" and "embedding_out" in own.leaves)
        named = named or (parameter == "scale" and module.endswith(NORMS_OF_FLUX) and is_replacing(update))
        if not named:
            return "this format names modules, not parameters"
        prefix = (self.dialect.prefix_for(self._component(site)) or "") if own else self._prefix(site)
        if prefix is None:
            return f"this format has no place for '{site.component}'"
        if own is None and isinstance(update, LoRA) and self._waits(site, update, prefix):
            return ""
        pieces = [_SpeltPart(own.stem, site.kernel, update)] if own else self._pieces(site, update, prefix)
        if not pieces:
            if self.base is None:
                return self._needs_base(site)
            if self._in_release(site):
                return (
                    "the network's makers hold it with others in one weight, as whose part only a LoRA can be written"
                )
            if self.dialect.names_of is None:
                return "the base holds what it changes in parts, and has no name for it"
            return f"{self.dialect.names_of} holds what it changes in parts that it cannot be cut to"
        leaves = {**self.dialect.leaves, **self.spelt.usual, **(own.leaves if own else {})}
        for piece in pieces:
            writer = LeafWriter(
                piece.stem,
                leaves,
                piece.kernel if all(piece.kernel) or not self.base else self._kernel(site, update),
                self.with_alpha,
                self.in_header and low_rank_part(update) is not None,
                self._states_shape(site, update),
                self._bias_scale(site),
                self.trained,
                self._alpha_dtype(own, update) if own else DType.F32,
            )
            if is_directed(update) and not update.per_row and has_lengths_of_rows_alone(writer):
                return "its magnitudes belong to columns, this format's to rows"
            kind.write(piece.update, parameter, writer)
            if why := self._keep(writer, prefix, piece.update.rank, module if own else ""):
                return why
            self.notes, self.stem = writer.notes, pieces[0].stem
        if not self.notes and type(update) is not type(source):
            self.notes = [held.folded]
        return ""

    def _keep(self, writer: LeafWriter, prefix: str, rank: int | None, module: str = "") -> str:
        """Put what was written of a module beside the rest; why that cannot be, or empty."""
        known = self.writers.setdefault(writer.stem, writer)
        if known is not writer:
            if known.tensors.keys() & writer.tensors.keys():
                return "a second one of this kind on one module"
            known.tensors.update(writer.tensors)
        if writer.alpha is not None and rank:
            called = module or writer.stem.removeprefix(prefix).rstrip(".")
            self.ranks.setdefault(prefix.rstrip("."), {})[called] = rank, writer.alpha
        return ""

    def _waits(self, site: Site, lora: LoRA, prefix: str) -> bool:
        """Whether the update is of some rows of a weight of the base, under whose name it is written with its other parts."""
        base, flat = self.base, self.dialect.flat
        if base is None or self.dialect.names_of or site.kernel or site.component not in (*COMPONENTS, ""):
            return False
        places = places_of(site, base, lora.tensors)
        parameters = [place.parameter for place in places]
        if any(len(p.sizes) != 2 or p.view.transposed or p.shape[1] != p.sizes[1] for p in parameters):
            return False
        whole = self._whole_of(site, places)
        if whole is None or not whole.name.endswith(".weight"):
            return False
        if whole_place(places) is not None and whole.rows == (((0, whole.height), 0),):
            return False
        module = whole.name.removesuffix(".weight")
        stem = f"{prefix}{module.replace('.', '_') if flat else module}."
        waiting = self.wholes.setdefault(stem, _Waiting(prefix, whole.height, []))
        waiting.parts.append((lora, whole.rows))
        self.waiting = self.stem = stem
        return True

    def _whole_of(self, site: Site, places: tuple[WeightSlice, ...]) -> Whole | None:
        """The weight of which the dialect has those at `places` as rows."""
        names = self._names_at(site, places[0].parameter.name)
        return whole_of(places, names, in_release=self._in_release(site))

    def _in_release(self, site: Site) -> bool:
        """Whether a site's modules have their makers' names."""
        return self.dialect.in_release and site.component in (*COMPONENTS, "")

    def _names_at(self, site: Site, stored: str) -> Names:
        """The names of the network of a site's component that a weight of the base is of."""
        assert self.base is not None
        component = component_of(site, self.base)
        return component.parts.get(component.within(stored)[0], component.names)

    def write_joined(self) -> None:
        """Write what waited for its other parts."""
        leaves = {**self.dialect.leaves, **self.spelt.usual}
        with ThreadPoolExecutor(
            min(4, os.cpu_count() or 1), "surgery-join"
        ) as pool:  # each reads whether A's are equal
            loras = list(
                pool.map(lambda stem: joined(stem, self.wholes[stem].parts, self.wholes[stem].height), self.wholes)
            )
        for (stem, whole), lora in zip(self.wholes.items(), loras, strict=True):
            writer = LeafWriter(stem, leaves, (), self.with_alpha, self.in_header)
            LORA.write(lora, "weight", writer)
            self._keep(writer, whole.prefix, lora.rank)

    @cached_property
    def trained(self) -> tuple[tuple[int, float], ...]:
        """What readers will take from the header, if no scale stands elsewhere."""
        if self.with_alpha or self.in_header:
            return ()
        metadata = surviving_metadata(self.adapter)
        _restate_ranks(metadata, self)
        return StatedScales.of(metadata, with_alphas=False, path=self.adapter.path).trained

    def _alpha_dtype(self, own: ModuleSpelling, update: Update) -> DType | None:
        """The type of a module's alpha as its file had it; None if it had none."""
        if "alpha" not in own.leaves:
            return None
        name = f"{own.stem}{own.leaves['alpha']}"
        return next((tensor.dtype for tensor in update.tensors if tensor.name == name), DType.F32)

    def _needs_base(self, site: Site) -> str:
        """Why a site cannot be spelt without one."""
        if site.flat:
            return "its name is flattened, and only the base can tell its dots"
        return "what this format calls it is known from the base"

    def _prefix(self, site: Site) -> str | None:
        """How keys of a site's component begin; None if the format has no place for it."""
        component = self._component(site)
        if component.startswith("text_encoder") and self.dialect.encoders and self.base is not None:
            encoder = component_of(site, self.base)
            kind = str(encoder.config.get("model_type"))
            level = _TEXT if kind == _CLIP and not any(name.startswith(_TEXT) for name in encoder.parameters) else ""
            level = level.replace(".", "_") if self.dialect.flat else level
            for told in (f"{kind}:{encoder.name}", kind):
                if told in self.dialect.encoders:
                    return self.dialect.encoders[told] + level
        return self.dialect.prefix_for(component)

    def _pieces(self, site: Site, update: Update, prefix: str) -> list[_SpeltPart]:
        """What the file has for a site that no file of this format had; nothing if it cannot be told, or cut."""
        program = self.dialect.names_of
        names = self.base.names_of(site.component) if self.base is not None else None
        if program is None or names is None:
            stem, kernel = self._spelt(site, update, prefix)
            return [_SpeltPart(stem, kernel, update)] if stem and program != "OMI" else []
        assert self.base is not None
        slices = places_of(site, self.base, update.tensors)
        where = whole_place(slices)
        kernel = where[1][2:] if where else site.kernel
        found = relaid(update, slices, names.inner or names, program)
        level = _TEXT if prefix.endswith(_TEXT) else ""
        return [
            _SpeltPart(f"{prefix}{name.removeprefix(level).rpartition('.')[0]}.", kernel, piece)
            for name, piece in found
        ]

    def _states_shape(self, site: Site, update: Update) -> bool:
        """Whether the shape of a weight that grows is written: as the file had it, or because the base's is smaller."""
        own = self.spelt.at(site)
        if own is not None:
            return "reshape_weight" in own.leaves
        if not (site.grows and self.dialect.whole) or self.base is None:
            return site.grows and self.dialect.whole
        places = places_of(site, self.base, update.tensors)
        return grown(update, places) != places

    def _bias_scale(self, site: Site) -> float:
        """What is multiplied into a bias beside factors when the file is read: their scale, if the file states it."""
        beside = self._beside(site)
        return beside[0].scale if beside and (self.with_alpha or self.in_header) else 1.0

    def _beside(self, site: Site) -> list[LoRA]:
        """The factors of the weight beside a bias."""
        weight = replace(site, path=f"{site.path.rpartition('.')[0]}.weight")
        return [lora for update in self.adapter.updates.get(weight, ()) if (lora := low_rank_part(update))]

    def _is_loaded_norm(self, site: Site, update: Update) -> bool:
        """Whether a whole parameter is one of the norms that the format's program loads."""
        pieces = self._pieces(site, update, "") if self.dialect.norms and self.base is not None else []
        return bool(pieces) and all(piece.stem.endswith(self.dialect.norms) for piece in pieces)

    def _spelt(self, site: Site, update: Update, prefix: str) -> tuple[str, tuple[int, ...]]:
        """The stem of a site that no file of this format had, and its kernel; an empty stem if none can be told."""
        name, kernel = site.path, site.kernel
        places = places_of(site, self.base, update.tensors) if self.base is not None else ()
        where = whole_place(places) if places else None
        if self.base is not None and where:
            name, kernel = component_of(site, self.base).within(where[0])[1], where[1][2:]
        if places and self._in_release(site) and self._names_at(site, places[0].parameter.name).networks:
            whole = self._whole_of(site, places)
            if whole is None or whole.rows != (((0, whole.height), 0),):
                return "", ()
            name = whole.name
        elif not where and site.flat and not self.dialect.flat:
            return "", ()
        module = name.rpartition(".")[0]
        return f"{prefix}{module.replace('.', '_') if self.dialect.flat else module}.", kernel

    def _component(self, site: Site) -> str:
        """What diffusers calls the component of a site; ``lora_unet_`` and ``diffusion_model.`` say it of any denoiser."""
        if self.spelt.at(site) is not None or site.component not in (*COMPONENTS, ""):
            return site.component
        if self.base is not None and self.base.is_pipeline:
            return component_of(site, self.base).name
        return self._denoiser or site.component

    @cached_property
    def _directed(self) -> frozenset[str]:
        """Components with a DoRA: diffusers then gives every module magnitudes."""
        updates = self.adapter.updates.items()
        return frozenset(site.component for site, chain in updates if any(is_directed(update) for update in chain))

    @cached_property
    def _denoiser(self) -> str:
        own = self.base.main.parts.get("denoiser", self.base.main.names) if self.base else None
        names = own.parameters if own else [site.path for site in self.adapter.updates]
        family = denoiser_of(name.rpartition(".")[0] for name in names)
        return family.component if family else ""

    def _kernel(self, site: Site, update: Update) -> tuple[int, ...]:
        assert self.base is not None
        where = whole_place(places_of(site, self.base, update.tensors))
        return where[1][2:] if where else ()


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A weight that is written when all its parts are known: LoRAs, and which of their rows lie at which of its own."""

    prefix: str
    height: int
    parts: list[tuple[LoRA, Sequence[tuple[Span, int]]]]


def _metadata(adapter: Adapter, job: _Job) -> Mapping[str, str]:
    """What the file says of itself: what its sources said, with ranks and alphas as they are now."""
    metadata = surviving_metadata(adapter, hashed=True)
    metadata.pop(ADAPTER_METADATA, None)
    if job.in_header:
        names = [name for writer in job.writers.values() for name in writer.tensors]
        roles = {name: LEAVES.get(longest_leaf(name)) for name in names}
        biased, directed = (
            [
                owner
                for owner in job.ranks
                if any(roles[name] == role and name.startswith(f"{owner}.") for name in names)
            ]
            for role in ("up_bias", "dora_scale")
        )
        metadata |= header_of(adapter.metadata, job.ranks, adapter.path, biased, directed)
    _restate_ranks(metadata, job)
    if job.spelt.modules and "format" in adapter.metadata:
        metadata["format"] = adapter.metadata["format"]
    return metadata


def _restate_ranks(metadata: dict[str, str], job: _Job) -> None:
    """The numbers of sd-scripts as they are now. Where they state the scales, what is left of those is in the factors."""
    loras = [lora for chain in job.adapter.updates.values() for u in chain if (lora := low_rank_part(u))]
    if loras and "ss_network_dim" in metadata:
        restate(metadata, "ss_network_dim", commonest(lora.rank for lora in loras) or 0)
    if loras and "ss_network_alpha" in metadata and (job.with_alpha or job.in_header):
        restate(metadata, "ss_network_alpha", commonest(lora.scale * lora.rank for lora in loras) or 0.0)
