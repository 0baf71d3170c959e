# SPDX-License-Identifier: Apache-2.0
"""One network of a checkpoint: its stored tensors, its parameters, and what its configuration and its family say of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery_formats.containers.base import Shard
from surgery_formats.containers.onnx.container import ONNX
from surgery_formats.dtypes import DType
from surgery_formats.models.eras import class_ties, eras_of, expert_counts
from surgery_formats.models.families.diffusion_roles import diffusion_role
from surgery_formats.models.families.family import Family, role_of
from surgery_formats.models.families.registry import family_of
from surgery_formats.models.layouts.parts import parts_of
from surgery_formats.models.names import Names
from surgery_formats.models.tied_parameters import ties_by_place
from surgery_formats.storage.base import Storage
from surgery_formats.storage.parameter import Parameter, Parameters
from surgery_formats.storage.plain import Plain
from surgery_formats.storage.quantised import is_coded
from surgery_formats.storage.registry import claimed_weights
from surgery_formats.storage.unread import Unread, unread_weights
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.tensors.views import transpose, whole

__all__ = ["Component"]

_WITH_HEAD = ("CausalLM", "LMHead", "MaskedLM", "ConditionalGeneration", "PreTraining")


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint.

    Attributes:
        name: Sub-folder (``unet``), or empty for a plain model.
        folder: Where it lies.
        shards: Weight files in order, each with its tensors in file order.
        index: The raw ``*.index.json``, if there is one.
        index_name: Its file name.
        config: config.json, or empty.
        uninterpreted: Whether every stored tensor is a weight of its own, whatever storage would claim it.
        self_contained: Whether the weights carry the configuration, see `ShardSet.self_contained`.
        made: Digest of what was made of the files (`surgery_formats.models.rebuilt`); empty for the files as they are.
    """

    name: str
    folder: Path
    shards: tuple[Shard, ...]
    index: Mapping[str, Any] | None
    index_name: str
    config: Mapping[str, Any]
    uninterpreted: bool = False
    self_contained: bool = False
    made: str = ""

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every stored tensor, in file order."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @cached_property
    def owners(self) -> dict[str, Storage]:
        """From every stored tensor to the weight that it is, or is a part of."""
        claimed = {} if self.uninterpreted or self.is_graph else claimed_weights(self.tensors, self.config)
        counts = expert_counts(self.config)
        return {name: claimed.get(name) or _plain(tensor, counts) for name, tensor in self.tensors.items()}

    @property
    def is_graph(self) -> bool:
        """Whether its weights are those of an ONNX graph."""
        return bool(self.shards) and self.shards[0].container == ONNX.name

    @cached_property
    def is_quantised(self) -> bool:
        """Whether a weight is stored as codes that are read."""
        return any(is_coded(weight) for weight in self.owners.values())

    @cached_property
    def unread(self) -> Unread | None:
        """Weights that are codes in a format which no storage reads: their tensors stand alone, and mean nothing so."""
        plain = {name: tensor for name, tensor in self.tensors.items() if self.owners[name].elements is tensor}
        return unread_weights(plain, self.config, self.tensors.keys() - plain.keys())

    def check_read(self) -> None:
        """Raise FitError if the values of some weights cannot be read: see `unread`."""
        if self.unread is not None:
            raise self.unread.error()

    @cached_property
    def parameters(self) -> Parameters:
        """Every logical weight by name, in the order of their first stored tensors."""
        return Parameters({owner.name: owner for owner in self.owners.values()}, self._parameter)

    def _parameter(self, storage: Storage) -> Parameter:
        view = whole(storage.shape)
        if (
            len(storage.sizes) == 2
            and not self.is_graph
            and self.family.stores_transposed(storage.name) != storage.transposed
        ):
            view = transpose(view)
        return Parameter(storage.name, storage, view, self.name)

    @cached_property
    def family(self) -> Family:
        """What its names mean."""
        return family_of(self.config)

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding, by config.json or by the family's default."""
        for config in (self.config, self.config.get("text_config")):
            if isinstance(config, Mapping) and isinstance(flag := config.get("tie_word_embeddings"), bool):
                return flag
        return self.family.tied or (bool(self.family.head) and f"{self.family.head}.weight" not in self.parameters)

    @cached_property
    def embedding(self) -> str:
        """Name of the token embedding, or empty."""
        return self._stored(f"{self.family.embedding}.weight") if self.family.embedding else ""

    @cached_property
    def dtype(self) -> DType:
        """The type of the token embedding, else of the first weight of numbers; of codes, that of `plain_dtype`."""
        weight = self._typical
        if weight is None:
            return DType.F32
        return self.plain_dtype if is_coded(weight) else weight.dtype

    @property
    def _typical(self) -> Storage | None:
        if self.embedding:
            return self.parameters[self.embedding].storage
        return next((weight for weight in self.owners.values() if weight.is_float), None)

    @cached_property
    def plain_dtype(self) -> DType:
        """The type of 16 bits that quantised weights have once they are dequantised: of config.json, else the embedding's."""
        named = (
            config.get(key)
            for config in (self.config, self.config.get("text_config"))
            for key in ("dtype", "torch_dtype")
            if isinstance(config, Mapping)
        )
        halves = {DType.F16.torch_name: DType.F16, DType.BF16.torch_name: DType.BF16}
        stored = DType.F32 if self._typical is None else self._typical.dtype
        found = next((halves[name] for name in named if name in halves), stored)
        return found if found in halves.values() else DType.BF16

    @cached_property
    def head(self) -> str:
        """Name of the head's weight, stored or tied; empty for a model without one."""
        name = f"{self.family.head}.weight"
        if not self.family.head or not self.embedding:
            return ""
        if name in self.parameters:
            return name
        return self._of_its_release(name) or (name if self.tied and self._has_head else "")

    @property
    def _has_head(self) -> bool:
        architectures = self.config.get("architectures")
        names = architectures if isinstance(architectures, list) else []
        marked = any(mark in str(name) for name in names for mark in _WITH_HEAD)
        return marked or f"{self.family.head}.weight" in class_ties(self.config)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Names that share another's bytes: ``lm_head.weight`` -> ``model.embed_tokens.weight``."""
        whole = {owner.name: owner.sources[0] for owner in self.owners.values() if len(owner.sources) == 1}
        aliases = dict(self._preferred(tie.alias, tie.source) for tie in ties_by_place(whole))
        if self.tied and self.head and self.head not in self.parameters:
            aliases[self.head] = self.embedding
        own = self.parameters
        return aliases | {alias: to for alias, to in self.family.ties if to in own and alias not in own}

    def _preferred(self, alias: str, source: str) -> tuple[str, str]:
        """Of two names of the same bytes the embedding's is the source, whichever was stored first."""
        return (source, alias) if alias == self.embedding else (alias, source)

    @cached_property
    def names(self) -> Names:
        """Resolves an adapter's names."""
        own = Names(self.parameters.without(self.aliases), self.aliases, self.family, self.name, self.config)
        inner = self.parts.get("denoiser")
        return replace(own, inner=inner) if inner is not None and inner.prefix else own

    @cached_property
    def parts(self) -> Mapping[str, Names]:
        """The networks of a file, by what adapters call them: `denoiser`, `text_encoder`, `vae`. Of most models none."""
        if self.name or "model_type" in self.config or "_class_name" in self.config:
            return {}
        names = self.parameters.without(self.aliases)
        return {
            part.component: Names(
                names.below(part.prefix),
                {
                    a.removeprefix(part.prefix): to.removeprefix(part.prefix)
                    for a, to in self.aliases.items()
                    if a.startswith(part.prefix) and to.startswith(part.prefix)
                },
                family_of({}),
                prefix=part.prefix,
            )
            for part in parts_of(self.parameters)
        }

    def within(self, name: str) -> tuple[str, str]:
        """What adapters call the network that a weight is of, and its name there: of most models the component's."""
        for part, names in self.parts.items():
            if name.startswith(names.prefix):
                return part, name.removeprefix(names.prefix)
        return self.name, name

    def role(self, name: str) -> str:
        """What part of its network a parameter, or a module, is: attention, MLP ...; ``other`` where its name does not tell."""
        part, inner = self.within(name)
        diffuses = "_class_name" in self.config or part in ("denoiser", "vae")
        return diffusion_role(inner) if diffuses else role_of(inner)

    def _stored(self, name: str) -> str:
        if name in self.parameters:
            return name
        bare = name.partition(".")[2]  # a bare model's checkpoint lacks the first segment
        return bare if bare in self.parameters else self._of_its_release(name)

    def _of_its_release(self, name: str) -> str:
        """The stored name of a parameter that transformers calls `name` today, or empty."""
        return eras_of(self.config, frozenset(self.parameters)).renamings.get(name, "")

    def with_config(self, config: Mapping[str, Any]) -> Component:
        """The same weights under another configuration, which need not say any more how they are stored."""
        other = replace(self, config=config)
        vars(other)["owners"] = self.owners
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.file.size for shard in self.shards)


def _plain(tensor: StoredTensor, counts: frozenset[int] = frozenset()) -> Plain:
    """A tensor as a weight of its own.

    A tensor of three axes is a stack of experts, unless its name ends in ``.weight``: then it is a convolution, if it
    does not have as many matrices as the configuration counts experts and no module of the name of a convolution.
    """
    convolves = tensor.name.endswith(".weight") and (
        len(tensor.shape) != 3 or tensor.shape[0] not in counts or "conv" in tensor.name or 1 in tensor.shape[1:]
    )
    return Plain.of(tensor, stacked=not convolves)
