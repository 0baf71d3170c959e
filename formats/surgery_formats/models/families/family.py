# SPDX-License-Identifier: Apache-2.0
"""The record that every family file fills in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from surgery_formats.models.families.recipe import Model
from surgery_formats.models.families.settings import ModelSettings

__all__ = ["Family", "Fused", "Recipe", "Rename", "fused_experts", "role_of"]

Recipe = Callable[[ModelSettings], Model]
"""Maps config.json and the checkpoint's tensor names to what the model computes. Raises `FitError` for an unsupported
setting."""


@dataclass(frozen=True, slots=True)
class Rename:
    """Two spellings of the same run of path segments; files and adapters may use either.

    transformers renames modules between versions, but ``save_pretrained`` keeps the old names on disk, so adapters of
    both versions exist.
    """

    new: str
    old: str


@dataclass(frozen=True, slots=True)
class Fused:
    """A parameter that some checkpoints store in parts, stacked by rows.

    Attributes:
        whole: Parameter path below its module: ``experts.gate_up_proj`` (3-D, one matrix per expert).
        parts: Parameter paths of one expert's parts in row order; ``{e}`` stands for the expert's number.
    """

    whole: str
    parts: tuple[str, ...]


def fused_experts(gate: str, up: str, down: str) -> tuple[Fused, ...]:
    """How experts that are stored one by one are stacked by transformers 5, and by MLX (``switch_mlp``)."""
    w1, w3, w2 = (f"experts.{{e}}.{name}.weight" for name in (gate, up, down))
    return (
        Fused("experts.gate_up_proj", (w1, w3)),
        Fused("experts.down_proj", (w2,)),
        Fused("switch_mlp.gate_proj.weight", (w1,)),
        Fused("switch_mlp.up_proj.weight", (w3,)),
        Fused("switch_mlp.down_proj.weight", (w2,)),
    )


@dataclass(frozen=True, slots=True)
class Family:
    """Names of one model family.

    Attributes:
        names: ``model_type`` (or diffusers ``_class_name``) values.
        embedding: Module path of the token embedding.
        head: Module path of the language-model head.
        tied: Whether head and embedding are tied if config.json does not specify it.
        ties: Further ``(alias, source)`` module paths that always share one tensor.
        inseparable: Why tied head and embedding cannot be separated; empty if they can.
        conv1d: Last path segments of modules that store their weight ``(in, out)``.
        experts_transposed: Whether 3-D expert tensors are ``(E, in, out)`` rather than ``(E, out, in)``.
        gate_up_interleaved: Whether rows of gate and up alternate in stacks of both, instead of lying one below the other.
        renames: Spellings, see `Rename`.
        fused: Parameters stored in parts, see `Fused`.
        numbered: Names that programs give to single experts of a stack, and no file of the family has.
        derivable: Last path segments of tensors that are computed, not trained (``inv_freq``).
        other_flat: Maps a base's module paths to ``(another flattened name, module path)`` pairs, for networks that
            other tools know under other names.
        recipe: What models of this family compute (`surgery_formats.models.families.recipe`); None if unknown.
    """

    names: tuple[str, ...]
    embedding: str = ""
    head: str = ""
    tied: bool = False
    ties: tuple[tuple[str, str], ...] = ()
    inseparable: str = ""
    conv1d: tuple[str, ...] = ()
    experts_transposed: bool = False
    gate_up_interleaved: bool = False
    renames: tuple[Rename, ...] = ()
    fused: tuple[Fused, ...] = ()
    numbered: tuple[Fused, ...] = ()
    derivable: tuple[str, ...] = ("rotary_emb.inv_freq", "position_ids", "masked_bias", "rope_freqs.weight")
    other_flat: Callable[[Collection[str]], Iterator[tuple[str, str]]] | None = None
    recipe: Recipe | None = None

    @property
    def known(self) -> bool:
        """Whether this is the record of a family rather than the empty one."""
        return self.names != ("unknown",)

    def stores_transposed(self, parameter: str) -> bool:
        """Whether `parameter` (``...c_attn.weight``) is ``(in, out)`` on disk."""
        module, _, leaf = parameter.rpartition(".")
        return leaf == "weight" and module.rpartition(".")[2] in self.conv1d


_ROLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "norm",
        ("norm", "ln", "layernorm", "layer_norm", "ln_1", "ln_2", "ln_f", "ln_final", "input_layernorm", "group_norm"),
    ),
    ("expert", ("experts", "switch_mlp")),
    (
        "embedding",
        (
            *("embed", "embed_tokens", "wte", "wpe", "embeddings", "embed_positions", "shared", "embed_in", "embd"),
            *("token_embedding", "positional_embedding"),
        ),
    ),
    ("head", ("lm_head", "embed_out", "score", "classifier", "cls", "pooler", "qa_outputs")),
    (
        "attention",
        ("attn", "attention", "self_attn", "SelfAttention", "EncDecAttention", "attn1", "attn2", "crossattention"),
    ),
    (
        "mlp",
        ("mlp", "ff", "DenseReluDense", "feed_forward", "intermediate", "output", "fc1", "fc2", "block_sparse_moe"),
    ),
)  # in order of precedence: a norm inside an attention block is a norm; an expert's projection belongs to the expert


def role_of(parameter: str) -> str:
    """Classify a parameter by common names: attention, mlp, expert, embedding, head, norm or other."""
    segments = parameter.split(".")[:-1] or [parameter]
    for role, names in _ROLES:
        if role == "norm":
            if "norm" in segments[-1].lower() or segments[-1] in names:
                return role
        elif any(segment in names for segment in segments):
            return role
    return "other"
