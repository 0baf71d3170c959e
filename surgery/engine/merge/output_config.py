# SPDX-License-Identifier: Apache-2.0
"""config.json of an output: the base's own bytes, unless the weights now say something else."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery.engine.plan import PlannedTensor, SideFile, is_coded
from surgery.engine.quantised.mixed_config import SIDE_FILES, leave_alone, leave_alone_beside
from surgery_formats.binding.bind import Binding
from surgery_formats.dtypes import DType
from surgery_formats.files.bounded_json import json_bytes, read_object
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.storage.quantised import CONFIG_KEYS

__all__ = ["coded_modules", "corrected_config", "corrected_quantisation_files", "task_config"]

_TASKS = {
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
_HEADS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")


def corrected_config(
    binding: Binding, outputs: Sequence[PlannedTensor], dtype: DType | None, *, rewritten: bool = False
) -> list[SideFile]:
    """config.json of every component that has one: vocabulary size, tie, stored type and task heads made true.

    Args:
        binding: Of the merge.
        outputs: All tensors that it writes.
        dtype: The element type that was asked for.
        rewritten: Whether weights leave their container, with which those that are self-contained lose their configuration.
    """
    side_files = []
    for component in binding.checkpoint.components.values():
        if component.self_contained and not rewritten:
            side_files += _beside(component, binding.checkpoint)
            continue
        if not component.config:
            continue
        config = copy.deepcopy(dict(component.config))
        written = [tensor for tensor in outputs if tensor.component == component.name and not tensor.part]
        _vocabulary(config, component, written)
        _channels(config, component, written)
        _quantisation(config, component, written)
        if component.name in binding.untied:
            _holder(config, "tie_word_embeddings")["tie_word_embeddings"] = False
        if dtype is not None and (key := next((k for k in ("dtype", "torch_dtype") if k in config), None)):
            config[key] = dtype.torch_name
        _task_head(config, binding, written)
        name = f"{component.name}/config.json" if component.name else "config.json"
        own = not (component.self_contained or component.made) and (component.folder / "config.json").exists()
        if config == component.config and own:
            side_files.append(SideFile(name, source=component.folder / "config.json"))
        else:
            side_files.append(SideFile(name, data=json_bytes(config)))
    return side_files


def _beside(component: Component, checkpoint: Checkpoint) -> list[SideFile]:
    """A config.json that lies beside weights which do not need it, as it is."""
    beside = component.folder / "config.json"
    return [SideFile("config.json", source=beside)] if checkpoint.path.is_dir() and beside.exists() else []


def _holder(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The object that holds a text model's `key`: the config itself, or its ``text_config``."""
    inner = config.get("text_config")
    return inner if key not in config and isinstance(inner, dict) else config


def _vocabulary(config: dict[str, Any], component: Component, outputs: Sequence[PlannedTensor]) -> None:
    embedding = next((tensor for tensor in outputs if tensor.weight == component.embedding), None)
    if embedding is None or embedding.step.sizes == component.parameters[component.embedding].sizes:
        return
    _holder(config, "vocab_size")["vocab_size"] = embedding.step.sizes[0]


def _channels(config: dict[str, Any], component: Component, outputs: Sequence[PlannedTensor]) -> None:
    """The channels that a network of diffusers takes, where an adapter gave its first weight more columns.

    It puts out as many as before, which it takes for as many as it takes in, unless it is told.
    """
    for tensor in outputs if "in_channels" in config else ():
        before = component.parameters[tensor.weight].sizes if tensor.weight in component.parameters else ()
        grew = len(before) > 1 and tensor.step.sizes[0] == before[0] and tensor.step.sizes[1] > before[1]
        if grew and config.get("in_channels") == before[1]:
            if config.get("out_channels") is None:
                config["out_channels"] = before[1]
            config["in_channels"] = tensor.step.sizes[1]
            return


def _quantisation(config: dict[str, Any], component: Component, outputs: Sequence[PlannedTensor]) -> None:
    """A model of which weights are quantised no more says so: of all of them, or which.

    Raises:
        FitError: its readers cannot mix.
    """
    plain, quantised = coded_modules(component, outputs)
    if not plain:
        return
    holder, key = next(
        ((holder, key) for key in CONFIG_KEYS for holder in (config, _holder(config, key)) if key in holder), ({}, "")
    )
    if not quantised:
        for each in CONFIG_KEYS:
            _holder(config, each).pop(each, None)
    elif isinstance(holder.get(key), dict):
        head = component.head.removesuffix(".weight")
        leave_alone(holder[key], plain, quantised, "" if head in quantised else head)


def corrected_quantisation_files(
    binding: Binding, files: Sequence[SideFile], outputs: Sequence[PlannedTensor]
) -> list[SideFile]:
    """The side files, those that say how the model is quantised made true, or left out where nothing is any more."""
    component = binding.checkpoint.components.get("")
    plain, quantised = coded_modules(component, outputs) if component is not None else ([], [])
    kept = []
    for file in files:
        if plain and file.name in SIDE_FILES and file.source is not None:
            if quantised:
                config = dict(read_object(file.source))
                leave_alone_beside(file.name, config, plain, quantised)
                kept.append(SideFile(file.name, data=json_bytes(config)))
        else:
            kept.append(file)
    return kept


def coded_modules(component: Component, outputs: Iterable[PlannedTensor]) -> tuple[list[str], list[str]]:
    """Paths of the modules that were quantised and are not any more, and of those that still are."""
    coded = {owner.name for owner in component.owners.values() if owner.elements is None}
    plain: list[str] = []
    quantised: list[str] = []
    for tensor in outputs:
        if tensor.component == component.name and not tensor.part and tensor.weight in coded:
            (quantised if is_coded(tensor.step) else plain).append(tensor.weight.removesuffix(".weight"))
    return plain, quantised


def _task_head(config: dict[str, Any], binding: Binding, outputs: Sequence[PlannedTensor]) -> None:
    """An adapter that brings a classifier makes the model one."""
    heads = [
        tensor
        for tensor in outputs
        if tensor.outcome == "added"
        and tensor.name.split(".")[-2:-1] in (["score"], ["classifier"], ["qa_outputs"])
        and tensor.name.endswith(".weight")
    ]
    task = next((adapter.task for adapter, _ in binding.adapters if adapter.task), "")
    if heads:
        config.update(task_config(config, task, heads[0].shape[0]))


def task_config(config: Mapping[str, Any], task: str, labels: int) -> dict[str, Any]:
    """The configuration of a model that was given a head for a task; the same for a task that is not known.

    Args:
        config: The model's own.
        task: As the Hub names it.
        labels: Rows of the head.
    """
    changed, architectures = dict(config), config.get("architectures")
    if task not in _TASKS or not isinstance(architectures, list):
        return changed
    changed["architectures"] = [_renamed(str(name), _TASKS[task]) for name in architectures]
    labelled = config.get("id2label")
    if task != "question-answering" and not (isinstance(labelled, dict) and len(labelled) == labels):
        changed["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        changed["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    return changed


def _renamed(architecture: str, suffix: str) -> str:
    stem = next((architecture.removesuffix(head) for head in _HEADS if architecture.endswith(head)), architecture)
    return stem.removesuffix("Model") + suffix
