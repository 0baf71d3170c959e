# SPDX-License-Identifier: Apache-2.0
"""Read a GGUF LoRA as llama.cpp applies it: ``convert_lora_to_gguf.py`` and ``llama-adapter.cpp`` of llama-cpp-python 0.3.36.

Factors lie under the names of the tensors they change, ``lora_a`` (rank, in) and ``lora_b`` (out, rank); those of the
token embedding are ``lora_a`` (tokens, rank) and ``lora_b`` (width, rank). The scale is alpha by the rank of each pair; without
alpha, or with 0, it is 1. Rows of queries and keys lie as the architecture has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from surgery_formats.adapters.alphas import stated_alpha
from surgery_formats.adapters.grammar.files import weights_at
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Adapter, Ignored, ModuleKind, Site
from surgery_formats.containers.gguf.config import model_config
from surgery_formats.containers.gguf.header import Header, read_header
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.files.raw import open_file
from surgery_formats.storage.base import read_values
from surgery_formats.storage.gguf.claim import weights
from surgery_formats.storage.gguf.names import ARCHITECTURE_KEY, ARCHITECTURES, named_weight
from surgery_formats.tensors.computed import computed
from surgery_formats.tensors.ggml import BY_NAME
from surgery_formats.tensors.tensor import StoredTensor, Tensor
from surgery_formats.text import show
from surgery_formats.updates import Factor, LoRA, PairedRows, Stacked, Update

__all__ = ["read_gguf"]

_LEAVES = (".lora_a", ".lora_b")
_HEADS = {"attn_q": "queries", "attn_k": "keys"}


def read_gguf(path: Path) -> Adapter:
    """Read one file. Only its header is read.

    Raises:
        NotFoundError, MalformedError: not such a file, or a pair that lacks a factor.
        FitError: an architecture or a type of adapter that is not known.
    """
    file = weights_at(path) or path
    header = read_header(open_file(file))
    name = _architecture(header)
    pairs: dict[str, dict[str, StoredTensor]] = {}
    ignored: list[Ignored] = []
    for tensor in header.tensors:
        leaf = next((leaf for leaf in _LEAVES if tensor.name.endswith(leaf)), "")
        if leaf:
            pairs.setdefault(tensor.name.removesuffix(leaf), {})[leaf] = tensor
        elif tensor.name.endswith("_norm.weight"):
            ignored.append(Ignored(tensor, "llama.cpp passes over norms in an adapter"))
        else:
            raise MalformedError("neither lora_a, lora_b nor a norm", file=file, tensor=tensor.name)
    alpha = _alpha(header)
    updates: dict[Site, tuple[Update, ...]] = {}
    for stored, pair in pairs.items():
        site, update = _update(name, stored, pair, alpha, header)
        updates[site] = (update,)
    issues = []
    if not alpha:
        issues.append("no alpha in its header: llama.cpp takes the scale to be 1")
    if ignored:
        issues.append(f"{len(ignored)} norms in it do nothing: llama.cpp passes over them")
    return Adapter(
        path=path,
        format="gguf",
        kind="LORA",
        updates=dict(sorted(updates.items())),
        tensors=header.tensors,
        ignored=tuple(ignored),
        base_name=_text(header, "general.base_model.0.name"),
        config={ARCHITECTURE_KEY: name},
        metadata={key: value for key in ("general.name",) if (value := _text(header, key))},
        stated_issues=tuple(issues),
    )


def _architecture(header: Header) -> str:
    file = header.file.path
    kind, name = header.value("adapter.type"), header.value(ARCHITECTURE_KEY)
    if header.value("general.type") != "adapter":
        raise MalformedError("its general.type is not 'adapter'", file=file)
    if kind != "lora":
        raise FitError(f"the adapter.type '{show(kind, 40)}' is not read, 'lora' is", file=file)
    if "adapter.alora.invocation_tokens" in header.entries:
        raise FitError(
            "an activated LoRA: it acts behind its invocation tokens alone, and no weight can",
            file=file,
        )
    if name not in ARCHITECTURES:
        raise FitError(
            f"a GGUF of the architecture '{show(name, 40)}' is not read",
            file=file,
            hint=f"known are {', '.join(sorted(ARCHITECTURES))}",
        )
    return str(name)


def _alpha(header: Header) -> float:
    value = header.value("adapter.lora.alpha")
    return 0.0 if value is None else stated_alpha(value, header.file.path)


def _text(header: Header, key: str) -> str:
    value = header.value(key)
    return value if isinstance(value, str) else ""


def _update(
    name: str, stored: str, pair: Mapping[str, StoredTensor], alpha: float, header: Header
) -> tuple[Site, Update]:
    for have, lack in ((".lora_a", ".lora_b"), (".lora_b", ".lora_a")):
        if lack not in pair:
            raise MalformedError(f"without its '{lack[1:]}'", file=header.file.path, tensor=pair[have].name)
    a, b = (_plain(pair[leaf], header) for leaf in _LEAVES)
    stem, _, path = named_weight(name, stored)
    if path == stored and not stored.startswith("blk."):
        raise FitError(f"the architecture '{name}' has no such tensor", file=a.path, tensor=a.name)
    embedding = stem in ("token_embd", "position_embd")
    kind: ModuleKind = "experts" if len(a.shape) == 3 else "embedding" if embedding else "linear"
    site = Site(path, module_kind=kind)
    if len(a.shape) == 3:
        return site, _experts(a, b, alpha)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1 if embedding else 0] != b.shape[1] or 0 in a.shape:
        raise FitError(f"is {list(a.shape)}, its lora_b {list(b.shape)}", file=a.path, tensor=a.name)
    rank = b.shape[1]
    scale = alpha / rank if alpha else 1.0
    if embedding:
        down = Factor((b,), (rank, b.shape[0]), lambda values: values.T)
        return site, LoRA(down, Factor.of(a), scale, alpha or None)
    lora = LoRA(Factor.of(a), Factor.of(b), scale, alpha or None)
    if ARCHITECTURES[name].interleaved and stem in _HEADS:
        return site, PairedRows(lora, "queries" if stem == "attn_q" else "keys")
    return site, lora


def _plain(tensor: StoredTensor, header: Header) -> Tensor:
    """A factor of numbers, if it is stored as blocks (``--outtype q8_0``): their values."""
    if BY_NAME[tensor.packed_as].dtype is not None:
        return replace(tensor, packed_as="")
    sizes = BY_NAME[tensor.packed_as].sizes(tensor.shape)
    (storage,) = weights([tensor], model_config(header, ()))

    def make() -> Array:
        return read_values(storage, 0, storage.shape[0], DType.F32)

    return computed(tensor.name, sizes, [tensor], make)


def _experts(a: Tensor, b: Tensor, alpha: float) -> Stacked:
    """All experts of a projection: ``lora_a`` (E, rank, in), ``lora_b`` (E, out, rank)."""
    if len(b.shape) != 3 or a.shape[0] != b.shape[0] or a.shape[1] != b.shape[2] or 0 in a.shape:
        raise FitError(f"is {list(a.shape)}, its lora_b {list(b.shape)}", file=a.path, tensor=a.name)
    scale = alpha / a.shape[1] if alpha else 1.0
    pairs = zip(_each(a), _each(b), strict=True)
    return Stacked(tuple(LoRA(down, up, scale, alpha or None) for down, up in pairs))


def _each(tensor: Tensor) -> Iterable[Factor]:
    """The factor of each expert."""
    count, *shape = tensor.shape
    for number in range(count):
        if isinstance(tensor, StoredTensor):
            step = tensor.nbytes // count
            yield Factor.of(replace(tensor, shape=tuple(shape), offset=tensor.offset + number * step, nbytes=step))
        else:
            yield Factor((tensor,), tuple(shape), lambda values, at=number: values[at])
