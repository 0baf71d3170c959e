# SPDX-License-Identifier: Apache-2.0
"""What a graph asks of whoever runs it, written into the file itself: padding, cache, virtual tokens, the weights it points at.

A graph that is run against its contract is wrong without a word (the wrong side of padding: logits off by 3 to 7), so the runner reads
this and nothing else, and `verify` checks it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from surgery_formats.errors import MalformedError

__all__ = ["PAD_SWITCH", "TEXT", "Contract", "Slot", "WeightFile", "from_metadata"]

TEXT = "TEXT"
"""Kind of a prompt that is a text: what follows goes on with it, and has no token of a beginning."""

PAD_SWITCH = "pad_attention_mask"
"""Optional input of graphs with a default past; fed as an empty vector it says that the mask counts virtual tokens already."""

_KEY = "surgery.contract"
_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file whose byte ranges the graph's initializers are.

    Attributes:
        name: Relative to the graph's folder.
        size: Bytes.
        header: xxh3-128 of the safetensors header (its eight bytes of length included), hexadecimal: names, types, shapes and places.
    """

    name: str
    size: int
    header: str


@dataclass(frozen=True, slots=True)
class Slot:
    """Optional inputs of rank 0 by default: an adapter that can be swapped in.

    Attributes:
        weight: Stored name of the weight it adds to.
        A: Input ``(in, rank)``; of an embedding ``(V, rank)``.
        B: Input ``(rank, out)``, the scale folded in.
    """

    weight: str
    A: str
    B: str


@dataclass(frozen=True, slots=True)
class Contract:
    """Everything a runner must know.

    Attributes:
        kind: ``decoder`` or ``encoder``.
        task: ``text-generation``, ``text-classification``, ``token-classification``, ``feature-extraction``.
        target: ``cuda``, ``cpu`` or ``portable``.
        dtype: Of logits and cache: ``fp32``, ``fp16``, ``bf16``.
        padding: Side on which rows of a batch are padded: ``right`` (GroupQueryAttention), ``left`` (Attention-23 with positions by place),
            ``any`` (encoders).
        cache: ``shared``: past and present may be one buffer of `max_length`; ``growing``: present is past with the new tokens behind it;
            ``none``.
        layers: With a cache.
        kv_heads: Per layer.
        head_dim: Per head.
        vocabulary: Width of the logits.
        max_length: Positions the rotary tables (or learned positions) reach to.
        rope_switch: Tokens beyond which rotary positions have other angles (LongRoPE); a sequence that grows past them must be prefilled
            anew, or its cached keys keep the old ones. 0 for none.
        prefill_batch: Whether several rows may be prefilled at once on top of a past; else rows go one by one, or through `prefill`.
        prefill: File of a graph over the same weights that takes several rows with a past, or empty.
        virtual_tokens: Default past of a soft prompt: tokens that every call stands on; of an encoder: put in front within the graph; 0 for
            none.
        prompt_kind: ``PREFIX_TUNING``, ``PROMPT_TUNING``, ``P_TUNING``, ``TEXT``, or empty.
        vocabulary_rows: First id and number of soft prompt rows behind the vocabulary, or None.
        slots: Where LoRA adapters go in.
        weights: Files the initializers lie in.
        base: Content id of the base.
        adapters: What was merged, swapped or prefixed: ``{"name", "mode", "kind", "id"}`` and, by mode, ``weight``, ``file``,
            ``virtual_tokens``, ``rows`` (first id and number).
    """

    kind: Literal["decoder", "encoder"]
    task: str
    target: str
    dtype: str
    padding: Literal["right", "left", "any"]
    cache: Literal["shared", "growing", "none"]
    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_length: int
    rope_switch: int = 0
    prefill_batch: bool = True
    prefill: str = ""
    virtual_tokens: int = 0
    prompt_kind: str = ""
    vocabulary_rows: tuple[int, int] | None = None
    slots: tuple[Slot, ...] = ()
    weights: tuple[WeightFile, ...] = ()
    base: str = ""
    adapters: tuple[Mapping[str, Any], ...] = ()

    def as_metadata(self) -> dict[str, str]:
        """``metadata_props`` of the graph."""
        return {_KEY: json.dumps({"schema": _SCHEMA, **asdict(self)}, sort_keys=True, separators=(",", ":"))}


def from_metadata(props: Mapping[str, str]) -> Contract | None:
    """The contract of a graph's ``metadata_props``; None if it has none (another exporter's graph).

    Raises:
        MalformedError: it has one that cannot be read.
    """
    if (text := props.get(_KEY)) is None:
        return None
    try:
        found = json.loads(text)
        if found.pop("schema") != _SCHEMA:
            raise MalformedError("the graph's contract is of another version", hint="export it again")
        known = {field.name for field in fields(Contract)}
        if not set(found) <= known:
            raise MalformedError(f"the graph's contract has unknown parts: {sorted(set(found) - known)}")
        found["slots"] = tuple(Slot(**slot) for slot in found.get("slots", ()))
        found["weights"] = tuple(WeightFile(**one) for one in found.get("weights", ()))
        found["adapters"] = tuple(found.get("adapters", ()))
        rows = found.get("vocabulary_rows")
        found["vocabulary_rows"] = None if rows is None else (int(rows[0]), int(rows[1]))
        return Contract(**found)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise MalformedError("the graph's contract cannot be read", hint="export it again") from error
