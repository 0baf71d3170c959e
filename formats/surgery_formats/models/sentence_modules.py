# SPDX-License-Identifier: Apache-2.0
"""The modules of sentence-transformers beside a model: modules.json, and the folder of each.

What a module does is told by its class, whose code is never run; one that is not known is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery_formats.containers.weight_files import open_shard
from surgery_formats.errors import FitError, MalformedError, NotFoundError
from surgery_formats.files.bounded_json import parse_object, read_object
from surgery_formats.files.output.manifest import is_safe_name
from surgery_formats.files.raw import open_file, stays_inside
from surgery_formats.models.families.recipe import Activation, Projection
from surgery_formats.models.families.recipe_sentence import (
    POOLING_MODES,
    DenseStep,
    PoolingMode,
    SentenceHead,
    UnitStep,
)
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["SentenceModules", "read_sentence_modules"]

_MODULES = "modules.json"
_LIMIT = 1 << 20  # bytes of it
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_LEGACY: Mapping[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # in the order in which their results lie side by side
_ACTIVATIONS: Mapping[str, Activation | None] = {
    "Identity": None,
    "Tanh": "tanh",
    "ReLU": "relu",
    "Sigmoid": "sigmoid",
    "SiLU": "silu",
    "GELU": "gelu",
}


@dataclass(frozen=True)
class SentenceModules:
    """What follows the model.

    Attributes:
        head: What is computed; its tensors are called ``sentence.N.linear.weight``, N being the module's number.
        tensors: Those tensors as they are stored, by name.
        files: Their files, by the name that they have below the model's folder.
        warnings: Where releases of sentence-transformers differ.
    """

    head: SentenceHead
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, Path]
    warnings: tuple[str, ...] = ()


def read_sentence_modules(folder: Path, hidden: int) -> SentenceModules:
    """Read the modules beside a model whose states have `hidden` values.

    Raises:
        NotFoundError: there is no modules.json, or a file that it needs.
        MalformedError: a file cannot be read.
        FitError: a module, or a setting of one, that is not known; modules in another order; sizes that do not fit.
    """
    entries = _listed(folder / _MODULES)
    kinds = [_kind(entry, folder) for entry in entries]
    kinds = [(kind, at) for kind, at in kinds if kind != "Dropout"]  # does nothing but in training
    names = [kind for kind, _ in kinds]
    if names[:2] != ["Transformer", "Pooling"] or set(names[2:]) - {"Dense", "Normalize"}:
        raise FitError(
            f"the modules are {show(', '.join(names), 120)}; Transformer, Pooling, then Dense and Normalize are supported",
            file=folder / _MODULES,
        )
    if kinds[0][1] != folder:
        raise FitError("the model lies in a folder of its own", file=kinds[0][1], hint="export that folder")
    modes = _modes(kinds[1][1], hidden)
    width, steps, tensors = hidden * len(modes), list[DenseStep | UnitStep](), dict[str, StoredTensor]()
    for number, (kind, at) in enumerate(kinds[2:], 2):
        if kind == "Normalize":
            _check_place(read_object(at / "config.json") if (at / "config.json").exists() else {}, at)
            steps.append(UnitStep())
            continue
        step, own = _dense(at, f"sentence.{number}", width)
        steps.append(step)
        tensors |= own
        width = step.projection.outputs
    files = {tensor.path.relative_to(folder).as_posix(): tensor.path for tensor in tensors.values()}
    return SentenceModules(SentenceHead(modes, tuple(steps), width), tensors, files, _doubts(kinds[1][1], modes))


def _listed(file: Path) -> list[Mapping[str, Any]]:
    if not file.exists():
        raise NotFoundError(
            "no such file, so nothing tells how states are pooled",
            file=file,
            hint='`task="feature-extraction"` gives them all',
        )
    source = open_file(file)
    if source.size > _LIMIT:
        raise MalformedError(f"has {source.size} bytes", file=file)
    document = parse_object(b'{"": %s}' % source.read(0, source.size), file=file)  # which parses objects
    listed = document[""]
    if len(document) > 1 or not isinstance(listed, list) or not all(isinstance(entry, Mapping) for entry in listed):
        raise MalformedError("not a list of modules", file=file)
    return listed


def _kind(entry: Mapping[str, Any], folder: Path) -> tuple[str, Path]:
    """The last part of a module's class, and its folder."""
    kind, path = entry.get("type"), entry.get("path", "")
    if not isinstance(kind, str) or not isinstance(path, str) or (path and not is_safe_name(path)):
        raise MalformedError("a module without a type or a path", file=folder / _MODULES)
    if not kind.startswith("sentence_transformers."):
        raise FitError(f"the module {show(kind, 100)} is code of its own", file=folder / _MODULES)
    at = folder / path if path else folder
    if not stays_inside(at):
        raise MalformedError("a module lies outside the folder", file=at)
    return kind.rpartition(".")[2], at


def _modes(at: Path, hidden: int) -> tuple[PoolingMode, ...]:
    config = read_object(at / "config.json")
    width = config.get("embedding_dimension", config.get("word_embedding_dimension", hidden))
    if width != hidden:
        raise FitError(f"pools {show(width, 40)} values, but the model has {hidden}", file=at / "config.json")
    if config.get("include_prompt", True) is not True:
        raise FitError(
            "include_prompt is off: a graph does not know which tokens are the prompt", file=at / "config.json"
        )
    if unknown := [key for key, on in config.items() if key.startswith("pooling_mode_") and on and key not in _LEGACY]:
        raise FitError(f"{show(unknown[0], 60)} is not a known pooling", file=at / "config.json")
    asked = config.get("pooling_mode", [mode for key, mode in _LEGACY.items() if config.get(key)] or "mean")
    modes = [asked] if isinstance(asked, str) else asked
    if not isinstance(modes, list) or not modes or any(mode not in POOLING_MODES for mode in modes):
        raise FitError(f"pooling_mode is {show(asked, 60)}", file=at / "config.json")
    return tuple(modes)


def _doubts(at: Path, modes: Sequence[PoolingMode]) -> tuple[str, ...]:
    """Where a mode is on by default in releases before 6."""
    config, mean = read_object(at / "config.json"), "pooling_mode_mean_tokens"
    if "pooling_mode" in config or mean in config or not any(config.get(key) for key in _LEGACY):
        return ()
    return (
        f"{at.name}/config.json has no {mean}: pooled as by sentence-transformers 6, {' and '.join(modes)}; releases "
        "before it add the mean",
    )


def _dense(at: Path, name: str, width: int) -> tuple[DenseStep, dict[str, StoredTensor]]:
    file = at / "config.json"
    config = read_object(file)
    _check_place(config, at)
    if config.get("use_residual", False) is not False:
        raise FitError("use_residual is on", file=file)
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    leaf = str(activation).rpartition(".")[2]
    if not str(activation).startswith("torch.nn.modules.") or leaf not in _ACTIVATIONS:
        raise FitError(f"activation_function is {show(activation, 80)}", file=file)
    inputs, outputs, bias = config.get("in_features"), config.get("out_features"), config.get("bias", True)
    if inputs != width:
        raise FitError(f"is for {show(inputs, 40)} values, but gets {width}", file=file)
    if type(outputs) is not int or outputs < 1:
        raise FitError(f"out_features is {show(outputs, 40)}; it must be a whole number above 0", file=file)
    if type(bias) is not bool:
        raise FitError(f"bias is {show(bias, 40)}; it must be true or false", file=file)
    weights = next((at / leaf for leaf in _WEIGHTS if (at / leaf).exists()), None)
    if weights is None:
        raise NotFoundError(f"no {_WEIGHTS[0]}", file=at)
    if not stays_inside(weights):
        raise MalformedError("the weights of a module lie outside the folder", file=weights)
    stored = {tensor.name: tensor for tensor in open_shard(weights).tensors}
    shapes = {"linear.weight": (outputs, width)} | ({"linear.bias": (outputs,)} if bias else {})
    if {key: tensor.shape for key, tensor in stored.items()} != shapes:
        raise FitError("has other tensors than its config.json says", file=weights)
    step = Projection(f"{name}.linear.weight", width, outputs, f"{name}.linear.bias" if bias else "")
    return DenseStep(step, _ACTIVATIONS[leaf]), {f"{name}.{key}": tensor for key, tensor in stored.items()}


def _check_place(config: Mapping[str, Any], at: Path) -> None:
    """Refuse a module that works on something else than the embedding of the text."""
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise FitError(f"{key} is {show(config[key], 60)}", file=at / "config.json")
