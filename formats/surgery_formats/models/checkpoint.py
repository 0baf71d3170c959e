# SPDX-License-Identifier: Apache-2.0
"""A model on disk, only read: its networks and its side files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery_formats.containers.base import ShardSet
from surgery_formats.containers.registry import open_weights
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.files.places import exists
from surgery_formats.files.raw import stays_inside
from surgery_formats.files.remote.path import to_path
from surgery_formats.models.component import Component
from surgery_formats.models.factor_names import named_adapter
from surgery_formats.models.families.denoisers import COMPONENTS
from surgery_formats.models.known_files import refuse_known
from surgery_formats.models.names import Names
from surgery_formats.models.side_files import side_files

__all__ = ["Checkpoint", "open_checkpoint"]

_T5 = "text_encoder_3"  # ComfyUI's and sd-scripts' T5, whatever number a pipeline has it under
_T5_TYPES = ("t5", "umt5")


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A model, or a pipeline of models.

    Attributes:
        path: What was opened.
        components: By name; a plain model has one, called "".
        side_files: ``(relative name, path)`` of everything that is not weights: tokenizer, templates, schedulers, code.
        left_behind: Files that are not carried: other formats' weights, links that lead out of the folder.
    """

    path: Path
    components: Mapping[str, Component]
    side_files: tuple[tuple[str, Path], ...]
    left_behind: tuple[str, ...] = ()

    def __repr__(self) -> str:
        tensors = sum(len(component.tensors) for component in self.components.values())
        return f"<Checkpoint {str(self.path)!r}: {tensors} tensors>"

    @property
    def is_pipeline(self) -> bool:
        """Whether it has named components."""
        return "" not in self.components

    @property
    def is_graph(self) -> bool:
        """Whether it is an ONNX graph: weights by names of its own, in the orientation of its operators."""
        return any(component.is_graph for component in self.components.values())

    @property
    def is_quantised(self) -> bool:
        """Whether a weight of a component is stored as codes that are read."""
        return any(component.is_quantised for component in self.components.values())

    @property
    def main(self) -> Component:
        """The plain model.

        Raises:
            FitError: it is a pipeline.
        """
        if self.is_pipeline:
            raise FitError("a pipeline of several models where one model was expected", file=self.path)
        return self.components[""]

    def component(self, name: str) -> Component | None:
        """The component that an adapter calls `name`: a plain model has whatever name it is given.

        Adapters call the network that removes noise a U-Net, a transformer or nothing in particular, whatever it is.
        """
        found = self.components.get(name, self.components.get(""))
        if found is None and name in COMPONENTS:
            found = next((self.components[other] for other in COMPONENTS if other in self.components), None)
        if found is None and name == _T5:
            found = next((one for one in self.components.values() if one.config.get("model_type") in _T5_TYPES), None)
        return found

    def name_of(self, component: str) -> str:
        """What the base calls the network that an adapter calls `component`; empty if there is none, or it is a plain model."""
        found = self.component(component)
        if found is None or not found.parts or not component:
            return found.name if found is not None else ""
        part = _part_of(component, found.parts)
        return part if part in found.parts else ""

    def names_of(self, component: str) -> Names | None:
        """The names of what an adapter calls `component`; None if there is no such network, also within the file."""
        found = self.component(component)
        if found is not None and component and found.parts:
            return found.parts.get(_part_of(component, found.parts))
        return None if found is None else found.names

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(component.nbytes for component in self.components.values())

    def check_unchanged(self) -> None:
        """Raise ProofError if a weight file changed since it was opened."""
        for component in self.components.values():
            for shard in component.shards:
                shard.file.check_unchanged()


def _part_of(component: str, parts: Mapping[str, Names]) -> str:
    """What a file's parts call a component of an adapter."""
    if component in COMPONENTS:
        return "denoiser"
    if component == _T5 and component not in parts:
        return next((part for part, names in parts.items() if "t5" in names.prefix), component)
    return component


def _component(name: str, path: Path, weights: ShardSet) -> Component:
    """One network of the model at `path`; a file stands for itself, without the config.json and the index beside it."""
    if not weights.tensors:
        raise MalformedError("no tensors", file=weights.shards[0].path)
    if not path.is_dir():
        return Component(
            name, weights.folder, weights.shards, None, "", weights.config, self_contained=weights.self_contained
        )
    config, file = weights.config, weights.folder / "config.json"
    if exists(file, links=True) and not weights.self_contained:
        config = read_object(file)
        if config and not stays_inside(file):
            raise MalformedError("is a link out of its folder", file=file)
    index_name = weights.index_path.name if weights.index_path else ""
    return Component(
        name, weights.folder, weights.shards, weights.index, index_name, config, self_contained=weights.self_contained
    )


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a model in any container: a weight file, a Hugging Face folder, a diffusers pipeline. Only headers are read.

    Raises:
        NotFoundError: nothing there, or no weights in the folder.
        MalformedError: a header, index or config is not what its format says.
        FitError: an adapter.
    """
    where = to_path(path)
    try:
        opened = open_weights(where)
    except MalformedError:
        refuse_known(where, (), networks=False)
        raise
    components = {name: _component(name, where, weights) for name, weights in opened.items()}
    first = next(iter(components.values()))
    if len(components) == 1 and not first.is_graph:  # a graph may have an adapter's factors among its weights
        names = first.tensors
        refuse_known(where, names, networks=False)
        if what := named_adapter(names):
            raise FitError(f"an adapter where a full model was expected: {what}", file=where)
    if not where.is_dir():
        return Checkpoint(where, components, ())
    files = [shard.path for component in components.values() for shard in component.shards]
    if (where / "adapter_config.json").exists() and all(file.name.startswith("adapter_model") for file in files):
        raise FitError("an adapter where a full model was expected", file=where)
    return Checkpoint(where, components, *side_files(where, set(files)))
