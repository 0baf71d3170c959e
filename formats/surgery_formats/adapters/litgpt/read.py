# SPDX-License-Identifier: Apache-2.0
"""Read litgpt's LoRA (litgpt 0.5.13: ``lora.py``, ``scripts/merge_lora.py``, ``scripts/convert_hf_checkpoint.py``).

A layer is ``lora_A`` (rank, in) and ``lora_B`` (out, rank), its scale ``lora_alpha / lora_r``. Queries, keys and values are one
matrix: ``attn.qkv.lora_A`` has the A of each trained part, one below the other, ``lora_B`` the rows of each. Which parts were
trained stands in ``hyperparameters.yaml``, how many rows each has in ``model_config.yaml``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from surgery_formats.adapters.alphas import agreed_alpha
from surgery_formats.adapters.litgpt.files import HYPERPARAMETERS, MODEL_CONFIG, MODULES, QKV, flat_yaml, own_file
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.provenance import Provenance
from surgery_formats.containers.torch import TORCH
from surgery_formats.errors import FitError, MalformedError, NotFoundError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show
from surgery_formats.updates import Factor, LoRA

__all__ = ["part_rows", "read_litgpt"]

_LAYER = re.compile(r"transformer\.h\.(\d{1,5})\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d{1,5})\.(fc_1|fc_2|proj)")
_MIXTRAL = {"fc_1": "w1", "fc_2": "w3", "proj": "w2"}


def read_litgpt(path: Path, alpha: float | None = None) -> Adapter:
    """Read a folder, or the file in it.

    Args:
        path: Of either.
        alpha: For a file without hyperparameters.yaml.

    Raises:
        NotFoundError, MalformedError: no such file, or one that is not litgpt's.
        FitError: the scale or the parts of a matrix are not known, or its names are none of Llama's.
    """
    file = own_file(path)
    if file is None or not file.is_file():
        raise NotFoundError("no lit_model.pth.lora", file=path)
    (shards,) = TORCH.open(file).values()
    modules: dict[str, dict[str, StoredTensor]] = {}
    for tensor in shards.tensors.values():
        module, _, leaf = tensor.name.rpartition(".")
        if leaf not in ("lora_A", "lora_B") or not module:
            raise MalformedError("neither lora_A nor lora_B", file=file, tensor=tensor.name)
        modules.setdefault(module, {})[leaf] = tensor
    settings, model = flat_yaml(file.with_name(HYPERPARAMETERS)), flat_yaml(file.with_name(MODEL_CONFIG)) or {}
    known = agreed_alpha((settings or {}).get("lora_alpha"), alpha, HYPERPARAMETERS, file)
    updates = {}
    for module, parts in modules.items():
        for lack in {"lora_A", "lora_B"} - parts.keys():
            raise MalformedError(f"without its '{lack}'", file=file, tensor=next(iter(parts.values())).name)
        for name, lora in _loras(module, parts["lora_A"], parts["lora_B"], known, settings or {}, model):
            updates[Site(f"{name}.weight", module_kind="linear")] = (lora,)
    return Adapter(
        path=path,
        format="litgpt",
        kind="LORA",
        updates=dict(sorted(updates.items())),
        tensors=tuple(shards.tensors.values()),
        base_name=str((settings or {}).get("checkpoint_dir", "")),
        config={**model, **(settings or {})},
        stated_issues=() if settings else ("no hyperparameters.yaml beside it: alpha is the one that was given",),
        provenance=Provenance("litgpt (its keys)"),
    )


def _loras(
    module: str, a: StoredTensor, b: StoredTensor, alpha: float, settings: Mapping[str, Any], model: Mapping[str, Any]
) -> Iterator[tuple[str, LoRA]]:
    """The modules of transformers that one of litgpt's is, each with its LoRA."""
    if len(a.shape) != 2 or len(b.shape) != 2 or 0 in (*a.shape, *b.shape):
        raise FitError(f"is {list(a.shape)}, its lora_B {list(b.shape)}", file=a.path, tensor=a.name)
    rank = b.shape[1]
    if settings.get("lora_r", rank) != rank:
        raise FitError(
            f"has rank {rank}, hyperparameters.yaml says {show(settings['lora_r'], 20)}", file=b.path, tensor=b.name
        )
    layer = _LAYER.fullmatch(module)
    if layer is not None and layer[2] == "attn.qkv":
        yield from _parts(f"model.layers.{layer[1]}.self_attn", a, b, alpha, settings, model)
        return
    name = "lm_head" if module == "lm_head" else _name(layer)
    if not name:
        old = layer is not None and layer[2] == "attn.attn"
        raise FitError(
            "was written before litgpt 0.5, whose order of rows its file does not tell"
            if old
            else "is no module of a model with Llama's names",
            file=a.path,
            tensor=a.name,
        )
    if a.shape[0] != rank:
        raise FitError(f"is {list(a.shape)}, its lora_B {list(b.shape)}", file=a.path, tensor=a.name)
    yield name, LoRA(Factor.of(a), Factor.of(b), alpha / rank, alpha)


def _name(layer: re.Match[str] | None) -> str:
    if layer is None:
        return ""
    stem = f"model.layers.{layer[1]}"
    if expert := _EXPERT.fullmatch(layer[2]):
        return f"{stem}.block_sparse_moe.experts.{expert[1]}.{_MIXTRAL[expert[2]]}"
    if layer[2] == "mlp.gate":
        return f"{stem}.block_sparse_moe.gate"
    return f"{stem}.{MODULES[layer[2]]}" if layer[2] in MODULES else ""


def part_rows(model: Mapping[str, Any], tensor: StoredTensor) -> dict[str, int]:
    """Rows of queries, keys and values, by model_config.yaml.

    Raises:
        FitError: it does not tell them.
    """
    heads, width = _count(model.get("n_head")), _count(model.get("n_embd"))
    groups = _count(model.get("n_query_groups") or heads)
    size = width // heads if model.get("head_size") is None and heads else _count(model.get("head_size"))
    if not (heads and groups and size):
        raise FitError(
            "queries, keys and values are one matrix, and no model_config.yaml tells their rows",
            file=tensor.path,
            tensor=tensor.name,
            hint="put the model's model_config.yaml beside the file",
        )
    return {"q_proj": heads * size, "k_proj": groups * size, "v_proj": groups * size}


def _count(value: object) -> int:
    """A size that a model can have; 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31 else 0


def _parts(
    stem: str, a: StoredTensor, b: StoredTensor, alpha: float, settings: Mapping[str, Any], model: Mapping[str, Any]
) -> Iterator[tuple[str, LoRA]]:
    rank = b.shape[1]
    rows = part_rows(model, b)
    trained = [part for part, switch in QKV.items() if settings.get(switch) is True]
    if not any(switch in settings for switch in QKV.values()):
        trained = list(QKV) if a.shape[0] == 3 * rank else []
    if not trained or a.shape[0] != len(trained) * rank or b.shape[0] != sum(rows[part] for part in trained):
        raise FitError(
            f"is {list(a.shape)}, its lora_B {list(b.shape)}: not the parts {', '.join(trained) or 'q, k and v'} "
            "that its configuration has",
            file=a.path,
            tensor=a.name,
        )
    at = 0
    for number, part in enumerate(trained):
        down = Factor((a,), (rank, a.shape[1]), _rows(number * rank, (number + 1) * rank))
        up = Factor((b,), (rows[part], rank), _rows(at, at + rows[part]))
        at += rows[part]
        yield f"{stem}.{part}", LoRA(down, up, alpha / rank, alpha)


def _rows(start: int, stop: int) -> Callable[[Array], Array]:
    def view(values: Array) -> Array:
        return values[start:stop]

    return view
