# SPDX-License-Identifier: Apache-2.0
"""Read torchtune's own file (torchtune 0.6.1: ``training/checkpointing``, ``modules/peft``, ``models/convert_weights.py``).

Factors are ``lora_a.weight`` (rank, in), ``lora_b.weight`` (out, rank) and, of DoRA, ``magnitude`` (out,). alpha stands in
``adapter_config.json`` beside the file, or in the recipe alone. Rows of queries and keys lie in rotary pairs, except of the
models that torchtune takes as transformers has them; the ``config.json`` that it copies beside the file tells both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery_formats.adapters.alphas import agreed_alpha
from surgery_formats.adapters.torchtune.files import HEADS, KEY, MODULES, UNPAIRED, own_file
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.provenance import Provenance
from surgery_formats.containers.weight_files import open_shard
from surgery_formats.errors import FitError, MalformedError, NotFoundError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show
from surgery_formats.updates import DoRA, Factor, Fit, LoRA, PairedRows, Update

__all__ = ["read_torchtune"]


def read_torchtune(path: Path, alpha: float | None = None) -> Adapter:
    """Read a file, or the one in a folder.

    Args:
        path: Of either.
        alpha: For a file without a configuration.

    Raises:
        NotFoundError, MalformedError: no such file, or one that is not torchtune's.
        FitError: alpha is not known, or a module is none of a language model's.
    """
    file = own_file(path)
    if file is None:
        raise NotFoundError("no adapter_model.pt", file=path)
    shard = open_shard(file)
    modules: dict[str, dict[str, StoredTensor]] = {}
    for tensor in shard.tensors:
        key = KEY.fullmatch(tensor.name)
        if key is None:
            raise MalformedError("neither lora_a, lora_b nor magnitude", file=file, tensor=tensor.name)
        modules.setdefault(key["module"], {})[key["leaf"].partition(".")[0]] = tensor
    config = _beside(file, "adapter_config.json")
    model = _beside(file, "config.json")
    known = agreed_alpha(config.get("lora_alpha"), alpha, "adapter_config.json", file)
    updates: dict[Site, tuple[Update, ...]] = {}
    for module, parts in modules.items():
        lora = _update(parts, known, config, file)
        updates[Site(_path(module, parts), module_kind="linear")] = (_in_order(module, lora, model),)
    dora = any("magnitude" in parts for parts in modules.values())
    return Adapter(
        path=path,
        format="torchtune",
        kind="DORA" if dora else "LORA",
        updates=dict(sorted(updates.items())),
        tensors=shard.tensors,
        base_name=name if isinstance(name := config.get("base_model_name_or_path"), str) else "",
        config=config,
        stated_issues=() if config else ("no adapter_config.json beside it: alpha is the one that was given",),
        provenance=Provenance("torchtune (its keys)"),
    )


def _beside(file: Path, name: str) -> Mapping[str, Any]:
    other = file.with_name(name)
    return read_object(other) if other.is_file() else {}


def _path(module: str, parts: Mapping[str, StoredTensor]) -> str:
    if module == "output":
        return "lm_head.weight"
    first, _, rest = module.partition(".")
    number, _, rest = rest.partition(".")
    if first != "layers" or not number.isdecimal() or rest not in MODULES:
        tensor = next(iter(parts.values()))
        raise FitError("is no module of a language model of torchtune's", file=tensor.path, tensor=tensor.name)
    return f"model.layers.{number}.{MODULES[rest]}.weight"


def _update(parts: Mapping[str, StoredTensor], alpha: float, config: Mapping[str, Any], file: Path) -> LoRA | DoRA:
    for have, lack in (("lora_a", "lora_b"), ("lora_b", "lora_a"), ("magnitude", "lora_a")):
        if have in parts and lack not in parts:
            raise MalformedError(f"without its '{lack}.weight'", file=file, tensor=parts[have].name)
    a, b, m = parts["lora_a"], parts["lora_b"], parts.get("magnitude")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in a.shape:
        raise FitError(f"is {list(a.shape)}, its lora_b {list(b.shape)}", file=file, tensor=a.name)
    rank = a.shape[0]
    if config.get("r", rank) != rank:
        raise FitError(
            f"has rank {rank}, adapter_config.json says {show(config['r'], 20)}: which one scales it is not known",
            file=file,
            tensor=a.name,
        )
    lora = LoRA(Factor.of(a), Factor.of(b), alpha / rank, alpha)
    if m is None:
        return lora
    if m.shape != (b.shape[0],):
        raise FitError(f"{m.numel} magnitudes for {b.shape[0]} rows", file=file, tensor=m.name)
    return DoRA(lora, Factor.of(m))


def _in_order(module: str, update: LoRA | DoRA, model: Mapping[str, Any]) -> Update:
    """Queries and keys wait for the base, unless the model's configuration lies beside the file."""
    role = HEADS.get(module.partition(".")[2].partition(".")[2])
    if role is None:
        return update
    waiting = PairedRows(update, role, UNPAIRED)
    return waiting.fitted(Fit(update.shape, config=model)) if "num_attention_heads" in model else waiting
