# SPDX-License-Identifier: Apache-2.0
"""What a file calls a site: the beginning of its component's keys, its module, or the modules that a program has in its place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from surgery_formats.adapters.grammar.dialect import Dialect
from surgery_formats.adapters.grammar.spelt_modules import SpeltModules
from surgery_formats.adapters.relaid import Whole, relaid, whole_of
from surgery_formats.adapters.writing import places_of, whole_place
from surgery_formats.binding.sizes import component_of, slices_of
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.families.denoisers import COMPONENTS, denoiser_of
from surgery_formats.models.layouts.parts import encoder_name
from surgery_formats.models.names import Names, WeightSlice
from surgery_formats.updates import Update, is_directed

__all__ = ["SiteNames", "SpeltPart"]

_CLIP, _TEXT = "clip_text_model", "text_model."  # a level of every published CLIP, which transformers 5 leaves out


@dataclass(frozen=True, slots=True)
class SpeltPart:
    """One module of a file, with all or a part of what a site has.

    Attributes:
        stem: What stands before the leaf.
        kernel: Sizes of a convolution's kernel; empty for other modules.
        update: What it holds.
    """

    stem: str
    kernel: tuple[int, ...]
    update: Update


@dataclass(frozen=True)
class SiteNames:
    """Names for the sites of an adapter in a file of a dialect.

    Attributes:
        adapter: Whose sites.
        base: The model that tells names and shapes; None if none is known.
        dialect: Of the file.
        spelt: How the modules were spelt in files of this format that the adapter came from. They keep their keys.
    """

    adapter: Adapter
    base: Checkpoint | None
    dialect: Dialect
    spelt: SpeltModules

    def prefix(self, site: Site) -> str | None:
        """How keys of a site's component begin; None if the format has no place for it."""
        component = self.component(site)
        if self.spelt.at(site) is not None:
            return self.dialect.prefix_for(component) or ""
        if component.startswith("text_encoder") and self.dialect.encoders and self.base is not None:
            names = self.base.names_of(component)
            if own := encoder_name(names.prefix) if names else "":  # of a file that ComfyUI saved
                told = self.dialect.encoders.get(own, self.dialect.encoders.get("*"))
                return told.replace("*", own) if told else None
            encoder = component_of(site, self.base)
            kind = str(encoder.config.get("model_type"))
            level = _TEXT if kind == _CLIP and not any(name.startswith(_TEXT) for name in encoder.parameters) else ""
            level = level.replace(".", "_") if self.dialect.flat else level
            for told in (f"{kind}:{encoder.name}", kind):
                if told in self.dialect.encoders:
                    return self.dialect.encoders[told] + level
        return self.dialect.prefix_for(component)

    def parts(self, site: Site, update: Update, prefix: str) -> list[SpeltPart]:
        """The modules that hold an update of a site; none if their names cannot be told, or the update cannot be cut.

        Raises:
            FitError: a weight that the base does not have.
        """
        if (own := self.spelt.at(site)) is not None:
            return [SpeltPart(own.stem, self._kernel(site, update), update)]
        program = self.dialect.names_of
        names = self.base.names_of(site.component) if self.base is not None else None
        if self.base is None or program is None or names is None:
            found = self._as_one(site, update, prefix)
            return [] if program == "OMI" else found
        slices = places_of(site, self.base, update.tensors)
        where = whole_place(slices)
        kernel = where[1][2:] if where else _told(site.kernel)
        level = _TEXT if prefix.endswith(_TEXT) else ""
        return [
            SpeltPart(f"{prefix}{name.removeprefix(level).rpartition('.')[0]}.", kernel, part)
            for name, part in relaid(update, slices, names.inner or names, program)
        ]

    def why_none(self, site: Site) -> str:
        """Why `parts` found none for a site."""
        if self.base is None and site.flat:
            return "its name is flattened, and only the base can tell its dots"
        if self.base is None:
            return "what this format calls it is known from the base"
        if self._in_release(site):
            return "the network's makers hold it with others in one weight, as whose part only a LoRA can be written"
        if self.dialect.names_of is None:
            return "the base holds what it changes in parts, and has no name for it"
        return f"{self.dialect.names_of} holds what it changes in parts that it cannot be cut to"

    def whole_at(self, site: Site, places: tuple[WeightSlice, ...]) -> Whole | None:
        """The weight of which the file has those at `places` as rows; None if there is no one such weight."""
        names = self._names_at(site, places[0].parameter.name)
        return whole_of(places, names, in_release=self._in_release(site))

    def _as_one(self, site: Site, update: Update, prefix: str) -> list[SpeltPart]:
        """All of an update in one module, by the name that the base has, or the network's makers, or the site."""
        name, kernel = site.path, site.kernel
        places = places_of(site, self.base, update.tensors) if self.base is not None else ()
        where = whole_place(places) if places else None
        if self.base is not None:
            name = component_of(site, self.base).within(where[0])[1] if where else name
            kernel = where[1][2:] if where else _told(kernel)
        if places and self._in_release(site) and self._names_at(site, places[0].parameter.name).networks:
            whole = self.whole_at(site, places)
            if whole is None or not whole.is_filled:
                return []
            name = whole.name
        elif not where and site.flat and not self.dialect.flat:
            return []
        return [SpeltPart(self.stem(prefix, name.rpartition(".")[0]), kernel, update)]

    def stem(self, prefix: str, module: str) -> str:
        """What stands before the leaves of a module, a dotted path."""
        return f"{prefix}{module.replace('.', '_') if self.dialect.flat else module}."

    def _in_release(self, site: Site) -> bool:
        """Whether a site's modules have their makers' names."""
        return self.dialect.in_release and site.component in (*COMPONENTS, "")

    def _names_at(self, site: Site, stored: str) -> Names:
        """The names of the network of a site's component that a weight of the base is of."""
        assert self.base is not None
        component = component_of(site, self.base)
        return component.parts.get(component.within(stored)[0], component.names)

    def _kernel(self, site: Site, update: Update) -> tuple[int, ...]:
        """The kernel that the site's file told, or the base's where it did not tell all sizes."""
        if all(site.kernel) or self.base is None:
            return site.kernel
        where = whole_place(places_of(site, self.base, update.tensors))
        return where[1][2:] if where else ()

    def component(self, site: Site) -> str:
        """What diffusers calls the component of a site; ``lora_unet_`` and ``diffusion_model.`` say it of any denoiser."""
        if self.spelt.at(site) is not None or site.component not in (*COMPONENTS, ""):
            return site.component
        if self.base is not None and self.base.is_pipeline:
            return component_of(site, self.base).name
        return self._beside_denoiser(site) or self._denoiser or site.component

    def _beside_denoiser(self, site: Site) -> str:
        """Of a file that holds several networks: which a site is of that names none; empty for the one that removes noise."""
        if site.component or self.base is None or "denoiser" not in self.base.main.parts:
            return ""
        stored = next((place.parameter.name for place in slices_of(site, self.base)), "")
        part, name = self.base.main.within(stored)
        return "" if part == "denoiser" else part or name.partition(".")[0]

    @cached_property
    def directed(self) -> frozenset[str]:
        """Components of which some modules have magnitudes."""
        updates = self.adapter.updates.items()
        return frozenset(site.component for site, chain in updates if any(map(is_directed, chain)))

    @cached_property
    def _denoiser(self) -> str:
        own = self.base.main.parts.get("denoiser", self.base.main.names) if self.base else None
        names = own.parameters if own else [site.path for site in self.adapter.updates]
        family = denoiser_of(name.rpartition(".")[0] for name in names)
        return family.component if family else ""


def _told(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel whose sizes a file told; empty if it did not tell all."""
    return kernel if all(kernel) else ()
