# SPDX-License-Identifier: Apache-2.0
"""Small parameters that swapped adapters hold trained in full: heads, biases and norms, as optional inputs of a graph.

The base's values are the default, so a run without an adapter is the base. A head that the base lacks is zero there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.engine.merge.output_config import task_config
from surgery.onnx.graph.weights import LABELS, Replaceable
from surgery_formats.binding.edits import Edit, prepared
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, InputError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.models.component import Component
from surgery_formats.models.families.parameters import model_of, parameters
from surgery_formats.models.families.recipe import ClassifierHead, Model
from surgery_formats.storage.base import read_rows
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.apply import apply_chain
from surgery_formats.updates import is_replacing

__all__ = ["headed", "is_small", "label_facts", "own_labels", "replaceable", "replaced_array"]

Array = npt.NDArray[Any]


def is_small(edit: Edit, component: Component) -> bool:
    """Whether an edit is one of a bias or a norm, or gives a matrix other than the vocabulary's in full."""
    if len(edit.source.sizes) == 1:
        return True
    return edit.replaced is not None and not edit.operations and edit.name not in (component.embedding, component.head)


def own_labels(adapter: Adapter, component: Component, model: Model) -> dict[str, Edit]:
    """The parameters of a classifier that an adapter gives in full, of which it may have another number of rows."""
    found = {}
    for site, chain in adapter.updates.items():
        if site.path in _last_step(model) and len(chain) == 1 and is_replacing(chain[0]):
            found[site.path] = Edit(component.name, site.path, Plain.of(chain[0].stored), ())
    return found


def replaced_array(edit: Edit) -> Array:
    """The parameter as the adapter makes it, float32.

    Raises:
        FitError: a value is not finite.
    """
    source, rows = edit.source, edit.source.shape[0]
    block = np.array(read_rows(source), np.float32).reshape(source.shape)
    apply_chain(prepared(edit.operations, source, DType.F32, rows), block, 0, rows)
    if not np.isfinite(block).all():
        raise FitError("holds NaN or Inf", tensor=edit.name)
    return block.reshape(source.sizes)


def headed(
    component: Component, model: Model, adapters: Iterable[tuple[Adapter, Mapping[str, Edit]]], task: str = ""
) -> tuple[Component, Model]:
    """Add the head that the base lacks, with as many labels as the first adapter has, and the biases that it lacks.

    The configuration then names the adapters' task, which the graph has unless it is made for another `task`.
    """
    from surgery.onnx.export.merged import with_biases

    known, labels, learned = parameters(model), 0, ""
    added: dict[str, Edit] = {}
    for adapter, edits in adapters:
        new = {name: edit for name, edit in edits.items() if name not in known}
        heads = [edit for name, edit in new.items() if edit.replaced is not None and name.endswith(".weight")]
        if heads and not labels:
            labels, learned = heads[0].source.sizes[0], adapter.task
        added = {**new, **added}
    if not added:
        return component, model
    names = {*component.parameters, *added}
    config = task_config(component.config, learned, labels) if labels else component.config
    if config == component.config:
        return component, with_biases(model, names)
    return component.with_config(config), with_biases(model_of(config, names, task), names)


def replaceable(model: Model, edits: Iterable[Mapping[str, Edit]]) -> Replaceable:
    """The parameters of a graph that become optional inputs."""
    every = {name: edit for some in edits for name, edit in some.items()}
    shapes = parameters(model)
    absent = frozenset(name for name, edit in every.items() if edit.added)
    free: dict[str, tuple[int | str, ...]] = {
        name: (LABELS, *shapes[name][1:]) for name in _last_step(model) if name in every
    }
    return Replaceable(frozenset(every), free, absent)


def _last_step(model: Model) -> tuple[str, ...]:
    if not isinstance(model.head, ClassifierHead):
        return ()
    projection, _ = model.head.steps[-1]
    return tuple(name for name in (projection.weight, projection.bias) if name)


def label_facts(adapter: Adapter, edits: Mapping[str, Edit], model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    """``id2label`` of an adapter with a classifier of its own, for the contract; empty for others.

    The names are those of the configuration beside the adapter, else the base's if it has as many labels.

    Raises:
        FitError: the adapter has another number of labels than the base, and not all that depends on it.
    """
    last = _last_step(model)
    given = [name for name in last if name in edits]
    if not given:
        return {}
    labels = edits[given[0]].source.sizes[0]
    shapes = parameters(model)
    for name in given:
        if (sizes := edits[name].source.sizes) != (labels, *shapes[name][1:]):
            raise FitError(
                f"has the shape {list(sizes)}, but its place is {['labels', *shapes[name][1:]]}",
                file=adapter.path,
                tensor=edits[name].source.sources[0].name,
                hint="is this the base it was trained on?",
            )
    if missing := [name for name in last if name not in edits and shapes[name][0] != labels]:
        raise FitError(
            f"the adapter has {labels} labels, but not its own '{missing[0]}', which has {shapes[missing[0]][0]}",
            file=adapter.path,
        )
    beside = _config_beside(adapter.path)
    named = next((names for names in map(_names, (beside, config)) if len(names) == labels), ())
    facts: dict[str, Any] = {"id2label": {str(i): name for i, name in enumerate(named or _numbered(labels))}}
    problem = beside.get("problem_type")
    return facts | ({"problem_type": problem} if isinstance(problem, str) else {})


def _numbered(labels: int) -> list[str]:
    return [f"LABEL_{i}" for i in range(labels)]


def _names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of labels, or nothing if they are not numbered from 0."""
    named = config.get("id2label")
    if not isinstance(named, Mapping) or set(named) != {str(i) for i in range(len(named))}:
        return ()
    return tuple(str(named[str(i)]) for i in range(len(named)))


def _config_beside(path: Path) -> Mapping[str, Any]:
    """The model's config.json that trainers write beside an adapter; empty if there is none."""
    folder = path if path.is_dir() else path.parent
    try:
        return read_object(folder / "config.json")
    except InputError:
        return {}
