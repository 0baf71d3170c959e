# SPDX-License-Identifier: Apache-2.0
"""The small files of an export: graphs, adapters for their slots, prompts, configuration of onnxruntime-genai."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.export.adapters import AdapterRoles, entry
from surgery.onnx.export.genai import genai_config
from surgery.onnx.export.prompts import Prompt, WeightLocation, computed_past, empty_past, stored_past
from surgery.onnx.graph.build import Built, GraphOptions, build
from surgery.onnx.graph.contract import TEXT
from surgery.onnx.graph.virtual import Virtual
from surgery_formats.errors import FitError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.models.checkpoint import Component
from surgery_formats.models.families.recipe import Model

if TYPE_CHECKING:
    import onnx

    from surgery.onnx.export.slots import Swappable

__all__ = ["ROWS", "Assembly", "Form", "prompt_form"]

ROWS = "rows.onnx"
"""Beside a graph with keys and values: one over the same weights with rows behind the vocabulary, for onnxruntime-genai."""

Array = npt.NDArray[Any]

Form = str
"""``kv``: keys and values as the default past; ``rows``: behind the vocabulary; ``front``: before an encoder's tokens; empty: none."""


def prompt_form(asked: str, prompts: tuple[Prompt, ...], model: Model) -> Form:
    """How soft prompts go into the graph.

    Raises:
        FitError: they cannot go as was asked.
    """
    if asked not in ("auto", "kv", "rows"):
        raise FitError(f"no form '{asked}' of a prompt", hint="auto, kv or rows")
    if not prompts:
        return ""
    without = next((one for one in prompts if one.embeddings is None), None)
    if model.kind == "encoder":
        if asked != "auto" or len(prompts) > 1 or without is not None:
            what = "keys and values" if without is not None else "rows or keys and values, or several prompts"
            raise FitError(f"an encoder takes one prompt of embeddings in front of its text, no {what}")
        return "front"
    if asked == "rows" and without is not None:
        why = "a text has token ids already" if without.kind == TEXT else "its keys and values belong to no token"
        raise FitError(
            f"{without.kind} cannot be rows of the vocabulary: {why}",
            file=without.adapter.path if without.adapter else None,
            hint="--prompt-form kv",
        )
    return "rows" if asked == "rows" else "kv"


@dataclass(frozen=True)
class Assembly:
    """All that decides the small files.

    Attributes:
        component: The base, with the configuration of what was merged.
        model: Its recipe.
        options: How to build; soft prompts and the contract's fields about adapters come from here.
        wanted: Adapters.
        slots: Swappable ones, as in `wanted`.
        prompts: In order; the first one is the default.
        form: Of the prompts.
    """

    component: Component
    model: Model
    options: GraphOptions
    wanted: AdapterRoles
    slots: tuple[Swappable, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    form: Form = ""

    @property
    def slot_names(self) -> frozenset[str]:
        """Union of the targets."""
        return frozenset(name for one in self.slots for name in one.additions)

    def draft(self) -> Built:
        """The graphs with nothing computed: refuses what cannot be built; contract and file names are final.

        Raises:
            FitError: see `surgery.onnx.graph.build.build`.
        """
        built = self._built(empty_past(self.model) if self.form == "kv" else {})
        longest = max((one.tokens for one in self.prompts), default=0)
        if longest and built.contract.max_length < (1 if self.form == "front" else longest + 1):
            raise FitError(
                f"{longest} virtual tokens leave no room in {built.contract.max_length}", hint="a larger --max-length"
            )
        return built

    def names(self, draft: Built) -> tuple[str, ...]:
        """Of all small files."""
        named = [self._adapter_file(one.name) for one in self.wanted.swap]
        if self.form == "kv":
            named += [self._prompt_file(one) for one in self.prompts]
        return (*named, *(["genai_config.json"] if self.for_genai(draft) else []), *draft.graphs)

    def files(self, place: WeightLocation) -> tuple[dict[str, bytes], Built, dict[str, onnx.ModelProto]]:
        """All small files but the graphs, the graphs not yet serialised.

        Args:
            place: Where the weights lie by now.

        Raises:
            FitError, ProofError: see `computed_past` and `write_adapter_file`.
        """
        pasts = self._pasts(place) if self.form == "kv" else []
        built = self._built(pasts[0] if pasts else {})
        kind = _numpy_type(self.options)
        files: dict[str, bytes] = {}
        sizes = _slot_sizes(built)
        for named, one in zip(self.wanted.swap, self.slots, strict=True):
            from surgery.onnx.export.slots import slot_arrays

            arrays = slot_arrays(one, built.contract.slots, sizes, kind)
            files[self._adapter_file(named.name)] = _adapter_bytes(arrays)
        for prompt, past in zip(self.prompts, pasts, strict=False):
            files[self._prompt_file(prompt)] = _adapter_bytes({name: one.astype(kind) for name, one in past.items()})
        if genai := self.for_genai(built):
            folder = self.component.folder
            generation = folder / "generation_config.json"
            files["genai_config.json"] = genai_config(
                self.component.config,
                read_object(generation) if generation.exists() else {},
                built.contract,
                built.model.layers[0].attention.heads if built.model.layers else 0,
                genai,
            )
        return files, built, dict(built.graphs)

    def for_genai(self, built: Built) -> str:
        """The graph for onnxruntime-genai, or empty: it feeds a past of its own, so that a default one would be ignored in silence."""
        if built.contract.kind != "decoder":
            return ""
        if self.form != "kv":
            return "model.onnx"
        return ROWS if ROWS in built.graphs else ""

    def _pasts(self, place: WeightLocation) -> list[dict[str, Array]]:
        stored = {one.name: stored_past(one, len(self.model.layers)) for one in self.prompts if _is_stored(one)}
        others = [one for one in self.prompts if one.name not in stored]
        computed = computed_past(others, self.component, self.model, self.options, place)
        found = {**stored, **{one.name: past for one, past in zip(others, computed, strict=True)}}
        return [found[one.name] for one in self.prompts]

    def _built(self, past: Mapping[str, Array]) -> Built:
        rows = [one.embeddings for one in self.prompts if one.embeddings is not None]
        table = np.concatenate(rows) if rows else None
        front = len(table) if table is not None and self.form == "front" else 0
        virtual = Virtual(past, None if self.form == "kv" else table, front)
        options = replace(self.options, slotted=self.slot_names, virtual=virtual, contract=self._contract())
        built = build(self.component, options, self.model)
        if self.form != "kv" or self.prompts[0].embeddings is None:
            return built
        theirs = replace(options, prefill=False, virtual=Virtual(rows=table), contract=self._contract("rows"))
        graph = build(self.component, theirs, self.model).graphs["model.onnx"]
        return replace(built, graphs={ROWS: graph, **built.graphs})

    def _contract(self, form: Form = "") -> dict[str, Any]:
        form = form or self.form
        entries = [entry(one, "merged", weight=one.weight) for one in self.wanted.merge]
        entries += [entry(one, "swapped", file=self._adapter_file(one.name)) for one in self.wanted.swap]
        names = {id(one.adapter): one for one in self.wanted.prefix}
        first = self.model.vocabulary
        for prompt in self.prompts:
            more: dict[str, Any] = {"virtual_tokens": prompt.tokens}
            if self.form == "kv":
                more["file"] = self._prompt_file(prompt)
            if form != "front" and prompt.embeddings is not None:
                more["rows"] = [first, prompt.tokens]
                first += prompt.tokens
            if prompt.adapter is None:
                entries.append({"name": prompt.name, "mode": "prefix", "kind": TEXT, "ids": [*prompt.ids], **more})
            else:
                entries.append(entry(names[id(prompt.adapter)], "prefix", **more))
        found: dict[str, Any] = {"adapters": tuple(entries)}
        if self.prompts:
            found["prompt_kind"] = self.prompts[0].kind
            if form == "rows":
                found["vocabulary_rows"] = (self.model.vocabulary, self.prompts[0].tokens)
            else:
                found["virtual_tokens"] = self.prompts[0].tokens
        return found

    @staticmethod
    def _adapter_file(name: str) -> str:
        return f"adapters/{name}.onnx_adapter"

    @staticmethod
    def _prompt_file(prompt: Prompt) -> str:
        return f"prompts/{prompt.name}.onnx_adapter"


def _is_stored(prompt: Prompt) -> bool:
    return prompt.embeddings is None and not prompt.ids


def _numpy_type(options: GraphOptions) -> np.dtype[Any]:
    from surgery.onnx.graph.graph import Graph

    return Graph().numpy_type(options.io)


def _slot_sizes(built: Built) -> dict[str, tuple[int, int]]:
    """By slot, rows of A and columns of B."""
    shapes = {
        one.name: [dim.dim_value for dim in one.type.tensor_type.shape.dim]
        for one in built.graphs["model.onnx"].graph.input
    }
    return {slot.weight: (shapes[slot.A][0], shapes[slot.B][1]) for slot in built.contract.slots}


def _adapter_bytes(arrays: Mapping[str, Array]) -> bytes:
    """An ``.onnx_adapter`` file, read back where it was written."""
    from surgery.onnx.run.adapter_file import write_adapter_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.onnx_adapter"
        write_adapter_file(path, arrays)
        return path.read_bytes()
