# SPDX-License-Identifier: Apache-2.0
"""The small files of an export: graphs, adapters for their slots, prompts, configuration of onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.export.adapters import AdapterRoles, NamedAdapter, entry
from surgery.onnx.export.genai import genai_config
from surgery.onnx.export.inserted import INSERTED, BakedModules, ModuleSlots, values_at
from surgery.onnx.export.prompt_past import Prompt, WeightLocation, computed_past, empty_past, layer_keys, stored_past
from surgery.onnx.export.sentence import SENTENCE_FILE, SentenceFile
from surgery.onnx.export.stored_factors import stored_array
from surgery.onnx.graph.build import GraphOptions, GraphSet, build
from surgery.onnx.graph.contract import TEXT
from surgery.onnx.graph.virtual_tokens import Virtual
from surgery.onnx.graph.weights import Replaceable
from surgery.onnx.run.adapter_file import AdapterFile, adapter_bytes
from surgery_formats.errors import FitError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.files.raw import open_file
from surgery_formats.models.component import Component
from surgery_formats.models.families.inserted import as_fields, with_inserted
from surgery_formats.models.families.parameters import parameters
from surgery_formats.models.families.recipe import Model
from surgery_formats.models.sets_beside import same_bytes, sets_beside

if TYPE_CHECKING:
    from surgery.onnx.export.slots import Swappable

__all__ = ["NONE", "ROWS", "Assembly", "Form", "prompt_form"]

NONE, NONE_OF_ENCODER = "none.onnx_adapter", "none.encoder.onnx_adapter"
"""The adapter that does nothing: for slots that are required, and against a default past."""

ROWS = "rows.onnx"
"""A second graph beside one with keys and values: same weights, rows after the vocabulary, for onnxruntime-genai."""

Array = npt.NDArray[Any]

Form = str
"""``kv``: keys and values as the default past; ``rows``: rows after the vocabulary; ``front``: before an encoder's
tokens; ``layers``: keys and values in front of every layer's of an encoder; empty: no prompt."""


def prompt_form(requested: str, prompts: tuple[Prompt, ...], model: Model) -> Form:
    """Choose how soft prompts enter the graph.

    Raises:
        FitError: the prompts do not support the requested form.
    """
    if requested not in ("auto", "kv", "rows"):
        raise FitError(f"'{requested}' is not a form of a prompt", hint="auto, kv or rows")
    if not prompts:
        return ""
    if model.encoder is not None:
        raise FitError("soft prompts of encoder-decoders go into no graph yet", hint="LoRAs and (IA)^3 do")
    no_embeddings = next((prompt for prompt in prompts if prompt.embeddings is None), None)
    if not model.generates:
        takes = no_embeddings is None or (model.takes_past and no_embeddings.kind != TEXT)
        if requested != "auto" or len(prompts) > 1 or not takes:
            what = "rows or keys and values, or several prompts" if takes else "keys and values"
            raise FitError(f"an encoder takes one prompt of embeddings in front of its text, not {what}")
        return "front" if no_embeddings is None else "layers"
    if requested == "rows" and no_embeddings is not None:
        reason = "a text has token ids already" if no_embeddings.kind == TEXT else "its keys and values are not tokens"
        raise FitError(
            f"{no_embeddings.kind} cannot be rows of the vocabulary: {reason}",
            file=no_embeddings.adapter.path if no_embeddings.adapter else None,
            hint='`prompt_form="kv"`',
        )
    return "rows" if requested == "rows" else "kv"


@dataclass(frozen=True)
class Assembly:
    """Everything that determines the small files.

    Attributes:
        component: The base, with the merged configuration.
        model: Its recipe.
        options: How to build; soft prompts and the contract's fields about adapters are added here.
        roles: The adapters.
        slots: The swappable adapters, in the order of `roles`.
        prompts: The prompts; the first one is the default.
        form: Form of the prompts.
        headed: Whether swapped adapters bring a head for which the base's configuration has no place.
        baked: Modules that adapters insert, a part of the graph.
        companions: Whether what onnxruntime-genai reads comes along.
        sentence: The modules of sentence-transformers behind the model.
    """

    component: Component
    model: Model
    options: GraphOptions
    roles: AdapterRoles
    slots: tuple[Swappable, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    form: Form = ""
    headed: bool = False
    baked: BakedModules | None = None
    companions: bool = True
    sentence: SentenceFile | None = None

    @property
    def slot_names(self) -> frozenset[str]:
        """The weights that need a slot for any adapter."""
        return frozenset(name for adapter in self.slots for name in adapter.additions)

    @cached_property
    def module_slots(self) -> ModuleSlots:
        """Optional inputs for the modules of swapped adapters."""
        if not any(adapter.modules for adapter in self.slots):
            return ModuleSlots((), ((),) * len(self.slots))
        return ModuleSlots.of([adapter.modules for adapter in self.slots])

    @property
    def _recipe(self) -> Model:
        """The recipe with all modules that adapters insert."""
        places = (*(self.baked.places if self.baked else ()), *self.module_slots.places)
        return with_inserted(self.model, places)

    def draft(self) -> GraphSet:
        """Build the graphs without computing anything; contract and file names are final.

        Raises:
            FitError: see `surgery.onnx.graph.build.build`.
        """
        built = self._built(empty_past(self.model)) if self.form == "kv" else self._final
        longest = max((prompt.tokens for prompt in self.prompts), default=0)
        if longest and built.contract.max_length < (1 if self.form in ("front", "layers") else longest + 1):
            raise FitError(
                f"{longest} virtual tokens leave no room in {built.contract.max_length}",
                hint="use a larger `max_length=`",
            )
        return built

    def names(self, draft: GraphSet) -> tuple[str, ...]:
        """Names of all small files."""
        names = [
            self._adapter_file(named.name, part)
            for named, adapter in zip(self.roles.swap, self.slots, strict=True)
            for part in self._parts(adapter)
        ]
        if self.form == "kv":
            names += [self._prompt_file(prompt) for prompt in self.prompts]
        names += self._brought
        names += self._nothing(draft)
        names += [INSERTED] if self.baked is not None else []
        names += [SENTENCE_FILE] if self.sentence is not None and self.sentence.layout is not None else []
        return (*names, *(["genai_config.json"] if self.for_genai(draft) else []), *draft.graphs)

    def files(self, location: WeightLocation) -> tuple[dict[str, bytes | AdapterFile], GraphSet]:
        """Create all small files; the graphs stand apart. `location` is where the weights lie now.

        Raises:
            FitError, ProofError: see `computed_past` and `AdapterFile.of`.
        """
        pasts = self._pasts(location) if self.form == "kv" else []
        built = self._built(pasts[0] if pasts else {}) if self.form == "kv" else self._final
        kind = _numpy_type(self.options)
        files: dict[str, bytes | AdapterFile] = {}
        for named, adapter, places in zip(self.roles.swap, self.slots, self.module_slots.names, strict=True):
            from surgery.onnx.export.slots import SlotArrays

            modules = values_at(adapter.modules, places)
            for part in self._parts(adapter):
                contract = built.encoder if part and built.encoder else built.contract
                inputs = {name: built.inputs[name] for name in contract.replaceable}
                full = {name: stored_array(values, built.inputs[name], name) for name, values in modules.items()}
                arrays = SlotArrays.of(adapter, contract.slots, built.sizes, kind, inputs, full)
                files[self._adapter_file(named.name, part)] = AdapterFile.of(arrays.specs, arrays.make)
        for prompt, past in zip(self.prompts, pasts, strict=False):
            files[self._prompt_file(prompt)] = adapter_bytes(
                {name: stored_array(kv, kind, name) for name, kv in past.items()}
            )
        for name, path in self._brought.items():
            source = open_file(path)
            files[name] = bytes(source.read(0, source.size))
        for name, nothing in self._nothing(built).items():
            files[name] = adapter_bytes({value: np.zeros(shape, kind) for value, shape in nothing.items()})
        if self.baked is not None:
            files[INSERTED] = self.baked.data()
        if self.sentence is not None and self.sentence.layout is not None:
            files[SENTENCE_FILE] = self.sentence.data()
        if genai := self.for_genai(built):
            folder = self.component.folder
            generation = folder / "generation_config.json"
            files["genai_config.json"] = genai_config(
                self.component.config,
                read_object(generation) if generation.exists() else {},
                built.contract,
                built.model.layers[0].attention.heads if built.model.layers else 0,
                genai,
                position_ids=self.options.position_ids,
            )
        return files, built

    @cached_property
    def _brought(self) -> dict[str, Path]:
        """Tokenizers and templates that swapped adapters were trained with, where the base has others."""
        if not self.roles.swap:
            return {}
        own = sets_beside(self.component.folder).get("tokenizer", {})
        found: dict[str, Path] = {}
        for named in self.roles.swap:
            theirs = sets_beside(named.adapter.path).get("tokenizer", {})
            if any(name not in own or not same_bytes(path, own[name]) for name, path in theirs.items()):
                found |= {f"{_tokenizer(named)}/{name}": path for name, path in theirs.items() if "/" not in name}
        return found

    def _nothing(self, built: GraphSet) -> dict[str, dict[str, tuple[int, ...]]]:
        """What switches everything off, by file: shapes of factors of rank 0, and of a past without tokens."""
        sizes = built.sizes
        past = empty_past(self.model) if self.form == "kv" else {}
        found: dict[str, dict[str, tuple[int, ...]]] = {NONE: {name: array.shape for name, array in past.items()}}
        for name, contract in ((NONE, built.contract), (NONE_OF_ENCODER, built.encoder)):
            for slot in contract.slots if contract is not None else ():
                rows, columns = sizes[slot.weight]
                found.setdefault(name, {}).update({slot.A: (rows, 0), slot.B: (0, columns)})
        return {name: shapes for name, shapes in found.items() if shapes}

    def for_genai(self, built: GraphSet) -> str:
        """The graph for onnxruntime-genai, or empty. It always passes its own past, so a default past has no effect."""
        contract = built.contract
        if contract.kind != "decoder" or built.encoder is not None or not self.companions:
            return ""
        if contract.convolutions or contract.embedder:
            return ""
        if self.form != "kv":
            return "model.onnx"
        return ROWS if ROWS in built.graphs else ""

    def _pasts(self, location: WeightLocation) -> list[dict[str, Array]]:
        layers = len(self.model.caching)
        without = (prompt for prompt in self.prompts if prompt.embeddings is None and not prompt.ids)
        stored = {prompt.name: stored_past(prompt, layers) for prompt in without}
        uncomputed = [prompt for prompt in self.prompts if prompt.name not in stored]
        computed = computed_past(uncomputed, self.component, self.model, self.options, location)
        pasts = {**stored, **{prompt.name: past for prompt, past in zip(uncomputed, computed, strict=True)}}
        return [pasts[prompt.name] for prompt in self.prompts]

    @cached_property
    def _final(self) -> GraphSet:
        """The graphs, where nothing has to be computed for them: the draft is what is written."""
        return self._built({})

    def _built(self, past: Mapping[str, Array]) -> GraphSet:
        rows = [prompt.embeddings for prompt in self.prompts if prompt.embeddings is not None]
        table = np.concatenate(rows) if rows else None
        front = len(table) if table is not None and self.form == "front" else 0
        keys = layer_keys(self.prompts[0], len(self.model.layers)) if self.form == "layers" else {}
        virtual = Virtual(past, None if self.form == "kv" else table, front, keys=keys)
        options = replace(
            self.options,
            slotted=self.slot_names,
            replaceable=self._replaceable(),
            virtual=virtual,
            contract=self._contract(),
        )
        built = build(self.component, options, self._recipe)
        if self.form != "kv" or self.prompts[0].embeddings is None:
            return built
        rows_options = replace(options, prefill=False, virtual=Virtual(rows=table), contract=self._contract("rows"))
        graph = build(self.component, rows_options, self._recipe).graphs["model.onnx"]
        return replace(built, graphs={ROWS: graph, **built.graphs})

    def _contract(self, form: Form = "") -> dict[str, Any]:
        form = form or self.form
        entries = [entry(named, "merged", weight=named.weight) for named in self.roles.merge]
        entries += [self._swapped(*pair) for pair in zip(self.roles.swap, self.slots, strict=True)]
        names = {id(named.adapter): named for named in self.roles.prefix}
        first = self.model.vocabulary
        for prompt in self.prompts:
            details: dict[str, Any] = {"virtual_tokens": prompt.tokens}
            if self.form == "kv":
                details["file"] = self._prompt_file(prompt)
            if form != "front" and prompt.embeddings is not None:
                details["rows"] = [first, prompt.tokens]
                first += prompt.tokens
            if prompt.adapter is None:
                entries.append({"name": prompt.name, "mode": "prefix", "kind": TEXT, "ids": [*prompt.ids], **details})
            else:
                entries.append(entry(names[id(prompt.adapter)], "prefix", **details))
        entries += [entry(named, "inserted", file=INSERTED) for named in self.roles.insert]
        places = (*(self.baked.places if self.baked else ()), *self.module_slots.places)
        fields: dict[str, Any] = {"adapters": tuple(entries), "inserted": tuple(map(as_fields, places))}
        if self.prompts:
            fields["prompt_kind"] = self.prompts[0].kind
            if form == "rows":
                fields["vocabulary_rows"] = (self.model.vocabulary, self.prompts[0].tokens)
            else:
                fields["virtual_tokens"] = self.prompts[0].tokens
        return fields

    def _replaceable(self) -> Replaceable:
        modules = self.module_slots.inputs
        if not any(adapter.replaced for adapter in self.slots):
            return modules
        from surgery.onnx.export.replaced import replaceable

        return modules | replaceable(self.model, [adapter.replaced for adapter in self.slots])

    def _swapped(self, named: NamedAdapter, adapter: Swappable) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if adapter.replaced:
            from surgery.onnx.export.replaced import label_facts

            facts = label_facts(adapter.adapter, adapter.replaced, self.model, self.component.config)
        parts = {f"{part}_file": self._adapter_file(named.name, part) for part in self._parts(adapter) if part}
        if named.weight != 1.0:
            facts = {**facts, "weight": named.weight}
        if any(name.startswith(f"{_tokenizer(named)}/") for name in self._brought):
            facts = {**facts, "tokenizer": _tokenizer(named)}
        return entry(named, "swapped", file=self._adapter_file(named.name), **parts, **facts)

    def _parts(self, adapter: Swappable) -> tuple[str, ...]:
        """What an adapter's files are called besides its name: the decoder's has none, the encoder's is there if needed."""
        encoder = self.model.encoder
        if encoder is None or {*adapter.additions, *adapter.replaced}.isdisjoint(parameters(encoder)):
            return ("",)
        return ("", "encoder")

    @staticmethod
    def _adapter_file(name: str, part: str = "") -> str:
        return f"adapters/{name}{f'.{part}' if part else ''}.onnx_adapter"

    @staticmethod
    def _prompt_file(prompt: Prompt) -> str:
        return f"prompts/{prompt.name}.onnx_adapter"


def _tokenizer(named: NamedAdapter) -> str:
    return f"tokenizer-{named.name}"


def _numpy_type(options: GraphOptions) -> np.dtype[Any]:
    from surgery.onnx.graph.graph import Graph

    return Graph().numpy_type(options.io)
