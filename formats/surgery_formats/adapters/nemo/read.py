# SPDX-License-Identifier: Apache-2.0
"""Read NeMo's ``.nemo`` of a LoRA (NeMo 1.x: ``parallel_adapters.py``, ``mcore_mixins.py``, ``nemo/export/utils/lora_converter.py``).

A tar archive holds ``model_config.yaml`` and ``model_weights.ckpt``, a torch file of ``linear_in`` (rank, in) and ``linear_out``
(out, rank) by adapter; what they add is multiplied by ``alpha / adapter_dim``. Queries, keys and values are one weight whose rows lie
group by group: the heads of queries of a group, its key, its value. The first layer of the MLP is gate over up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from surgery_formats.adapters.nemo.config import CONFIG_LIMIT, NemoConfig, nemo_config
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.provenance import Provenance
from surgery_formats.containers.stored_zip import Member
from surgery_formats.containers.tar import tar_members
from surgery_formats.containers.torch.pickle_file import read_torch, state_dict
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.files.raw import File, open_file
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import listing, show
from surgery_formats.updates import Factor, LoRA

__all__ = ["read_nemo"]

_KEY = re.compile(
    r"(?:model\.)?(?:module\.)?(?P<old>language_model\.encoder\.|)(?:decoder\.)?layers\.(?P<layer>\d{1,5})\."
    r"(?P<module>(?:self_attention|mlp)\.adapter_layer\.[a-z0-9_]+(?:\.[a-z]+_adapter)?)\.linear_(?P<side>in|out)\.weight"
)
_SIDES = {"in": "linear_in", "out": "linear_out"}
_AT = "self_attention.adapter_layer."
_OF_MLP = "mlp.adapter_layer."
_WHOLE: Mapping[str, str] = {
    f"{_AT}lora_unfused_kqv_adapter.q_adapter": "self_attn.q_proj",
    f"{_AT}lora_unfused_kqv_adapter.k_adapter": "self_attn.k_proj",
    f"{_AT}lora_unfused_kqv_adapter.v_adapter": "self_attn.v_proj",
    f"{_AT}lora_dense_attention_adapter": "self_attn.o_proj",
    f"{_OF_MLP}lora_unfused_hto4h_adapter.gate_adapter": "mlp.gate_proj",
    f"{_OF_MLP}lora_unfused_hto4h_adapter.up_adapter": "mlp.up_proj",
    f"{_OF_MLP}lora_4htoh_adapter": "mlp.down_proj",
}
"""Adapters of one module, and transformers' names for it."""
_QKV, _GATE_UP = f"{_AT}lora_kqv_adapter", f"{_OF_MLP}lora_hto4h_adapter"


def read_nemo(path: Path, alpha: float | None = None) -> Adapter:
    """Read one file.

    Args:
        path: Of it.
        alpha: Where its configuration does not tell it in numbers.

    Raises:
        NotFoundError, MalformedError: not such a file.
        FitError: a model, weights of several ranks, or an adapter that is not read.
    """
    file = open_file(path)
    weights, settings = _parts(file)
    text = file.read(settings.offset, settings.nbytes).decode("utf-8", "replace")
    tensors = _tensors(file, weights)
    modules: dict[tuple[str, str], dict[str, StoredTensor]] = {}
    old = False
    for name, tensor in tensors.items():
        key = _KEY.fullmatch(name)
        if key is None:
            raise FitError("is no factor of a LoRA of a decoder's layers", file=path, tensor=name)
        old |= bool(key["old"])
        parts = modules.setdefault((key["layer"], key["module"]), {})
        if key["side"] in parts:
            raise MalformedError("a second factor of the same adapter", file=path, tensor=name)
        parts[key["side"]] = tensor
    if not modules:
        raise FitError("no adapter in its weights", file=path)
    config = nemo_config(text, path, alpha)
    if old and config.groups != config.heads:
        raise FitError("a model before Megatron Core whose heads share keys: how its rows lie is not known", file=path)
    updates = {}
    for (layer, module), parts in modules.items():
        for lack in _SIDES.keys() - parts.keys():
            raise MalformedError(f"without its {_SIDES[lack]}", file=path, tensor=next(iter(parts.values())).name)
        for name, lora in _loras(module, parts["in"], parts["out"], config):
            site = Site(f"model.layers.{layer}.{name}.weight", module_kind="linear")
            if site in updates:
                raise MalformedError(f"a second LoRA of '{site}'", file=path, tensor=parts["in"].name)
            updates[site] = (lora,)
    return Adapter(
        path=path,
        format="nemo",
        kind="LORA",
        updates=dict(sorted(updates.items())),
        tensors=tuple(tensors.values()),
        config={"adapter_dim": config.rank, "alpha": config.alpha, "restore_from_path": config.base},
        provenance=Provenance("NeMo (its archive)"),
    )


def _parts(file: File) -> tuple[Member, Member]:
    """Weights and configuration."""
    if bytes(file.read(0, min(2, file.size))) == b"\x1f\x8b":
        raise FitError("this archive is compressed", file=file.path, hint="gunzip it, and keep the ending .nemo")
    members = tar_members(file)
    weights, settings = members.get("model_weights.ckpt"), members.get("model_config.yaml")
    if settings is None:
        raise MalformedError("no model_config.yaml in it", file=file.path)
    if settings.nbytes > CONFIG_LIMIT:
        raise MalformedError(f"a model_config.yaml of {settings.nbytes} bytes", file=file.path)
    if weights is None:
        others = sorted(name for name in members if name != settings.name)
        if any(name.startswith("model_weights/") for name in others):
            raise FitError("a distributed checkpoint (model_weights/), which is not read", file=file.path)
        if any(name.endswith("/model_weights.ckpt") for name in others):
            raise FitError(
                "its weights are those of several ranks (tensor or pipeline parallel)",
                file=file.path,
                hint="make one of them first, with NeMo's lora_to_tp1.py",
            )
        raise MalformedError(f"no model_weights.ckpt in it, but {listing(others) or 'nothing else'}", file=file.path)
    return weights, settings


def _tensors(file: File, member: Member) -> dict[str, StoredTensor]:
    """The tensors of the torch file inside, with the positions that they have in the archive."""
    inner = state_dict(read_torch(file.window(member.offset, member.nbytes)))
    return {name: replace(tensor, file=file, offset=member.offset + tensor.offset) for name, tensor in inner.items()}


def _loras(module: str, a: StoredTensor, b: StoredTensor, config: NemoConfig) -> Iterator[tuple[str, LoRA]]:
    """The modules of transformers that one adapter changes, each with its LoRA."""
    rank = config.rank
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank or 0 in (*a.shape, *b.shape):
        raise FitError(
            f"is {list(a.shape)}, its linear_out {list(b.shape)}; the rank is {rank}", file=a.path, tensor=a.name
        )
    alpha = float(rank) if config.alpha is None else config.alpha
    whole = LoRA(Factor.of(a), Factor.of(b), alpha / rank, config.alpha)
    if module in _WHOLE:
        yield _WHOLE[module], whole
    elif module == _QKV:
        rows = config.head * (config.heads + 2 * config.groups)
        if whole.shape != (rows, config.hidden):
            raise FitError(f"is {list(b.shape)}: not the {rows} rows of q, k and v", file=b.path, tensor=b.name)
        each = config.heads // config.groups  # heads of queries in a group
        for name, first, last in (("q", 0, each), ("k", each, each + 1), ("v", each + 1, each + 2)):
            yield f"self_attn.{name}_proj", replace(whole, B=_of_groups(b, config.groups, config.head, first, last))
    elif module == _GATE_UP:
        inner = config.inner
        if b.shape[0] == inner and config.activation.endswith("glu"):  # in layers of their own, the first is the gate
            raise FitError(
                f"has the rows of one layer, and an activation '{show(config.activation, 20)}' takes two: which is meant "
                "the file does not tell",
                file=b.path,
                tensor=b.name,
            )
        if b.shape[0] == inner:
            yield "mlp.up_proj", whole
        elif b.shape[0] == 2 * inner:
            for number, name in enumerate(("gate", "up")):
                yield f"mlp.{name}_proj", replace(whole, B=_of_groups(b, 1, inner, number, number + 1))
        else:
            raise FitError(f"is {list(b.shape)}: neither {inner} rows nor twice", file=b.path, tensor=b.name)
    else:
        raise FitError(f"'{show(module)}' is no adapter that is read", file=a.path, tensor=a.name)


def _of_groups(b: StoredTensor, groups: int, height: int, first: int, last: int) -> Factor:
    """Rows of the blocks from `first` up to `last` in every group; a block has `height` rows."""
    rank = b.shape[1]

    def view(values: Array) -> Array:
        return values.reshape(groups, -1, height, rank)[:, first:last].reshape(-1, rank)

    return Factor((b,), (groups * (last - first) * height, rank), view)
