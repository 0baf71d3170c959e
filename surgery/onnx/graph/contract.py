# SPDX-License-Identifier: Apache-2.0
"""What a graph asks of whoever runs it, written into the file itself: padding, cache, virtual tokens, the weights it points at.

A graph that is run against its contract is wrong without a word (the wrong side of padding: logits off by 3 to 7), so the runner reads
this and nothing else, and `verify` checks it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from surgery_formats.errors import MalformedError
from surgery_formats.files.bounded_json import parse_object
from surgery_formats.text import show

__all__ = ["PAD_SWITCH", "TEXT", "Contract", "Slot", "WeightFile", "from_metadata"]

TEXT = "TEXT"
"""Kind of a prompt that is a text: what follows goes on with it, and has no token of a beginning."""

PAD_SWITCH = "pad_attention_mask"
"""Optional input of graphs with a default past; fed as an empty vector it says that the mask counts virtual tokens already."""

_KEY = "surgery.contract"
_SCHEMA = 1
_LARGEST = 1 << 48  # of a number, sizes of files among them
_LAYERS = 4096
_PAIR = 2
_DTYPES = ("fp32", "fp16", "bf16")
_TEXTS = ("task", "target", "prefill", "prompt_kind", "base")


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


def from_metadata(props: Mapping[str, str], file: str | os.PathLike[str] = "model.onnx") -> Contract | None:
    """The contract of a graph's ``metadata_props``; None if it has none (another exporter's graph).

    It is text of a stranger's file: whoever gets it from here need not look at types and ranges again.

    Args:
        props: Of the graph.
        file: For messages.

    Raises:
        MalformedError: it has one that cannot be read, or with a part that is none.
    """
    if (text := props.get(_KEY)) is None:
        return None
    found = parse_object(text.encode("utf-8", "surrogatepass"), file=file)
    try:
        if found.pop("schema") != _SCHEMA:
            raise MalformedError("the graph's contract is of another version", file=file, hint="export it again")
        known = {field.name for field in fields(Contract)}
        if unknown := sorted(set(found) - known):
            raise MalformedError(f"the graph's contract has an unknown part '{show(unknown[0], 60)}'", file=file)
        found["slots"] = tuple(Slot(**slot) for slot in found.get("slots", ()))
        found["weights"] = tuple(WeightFile(**one) for one in found.get("weights", ()))
        found["adapters"] = tuple(found.get("adapters", ()))
        rows = found.get("vocabulary_rows")
        found["vocabulary_rows"] = None if rows is None else tuple(rows)
        made = Contract(**found)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise MalformedError("the graph's contract cannot be read", file=file, hint="export it again") from error
    if (fault := _fault(made)) is not None:
        raise MalformedError(f"the graph's contract has no valid '{fault}'", file=file, hint="export it again")
    return made


def _fault(made: Contract) -> str | None:
    """The first part whose type or range is not what the class says; None if there is none."""
    hints = get_type_hints(Contract)
    numbers = {name: getattr(made, name) for name, kind in hints.items() if kind is int}
    numbers |= {f"weights[{n}].size": one.size for n, one in enumerate(made.weights)}
    for name, value in numbers.items():
        if type(value) is not int or not 0 <= value < (_LAYERS + 1 if name == "layers" else _LARGEST):
            return name
    for name in ("kind", "padding", "cache"):
        if getattr(made, name) not in get_args(hints[name]):
            return name
    if made.dtype not in _DTYPES:
        return "dtype"
    if type(made.prefill_batch) is not bool:
        return "prefill_batch"
    if made.kind == "decoder" and (made.cache == "none" or not all((made.kv_heads, made.head_dim, made.vocabulary))):
        return "cache"
    texts: dict[str, tuple[Any, ...]] = {name: (getattr(made, name),) for name in _TEXTS}
    texts["slots"] = tuple(text for slot in made.slots for text in (slot.weight, slot.A, slot.B))
    texts["weights"] = tuple(text for one in made.weights for text in (one.name, one.header))
    for name, values in texts.items():
        if not all(isinstance(text, str) for text in values):
            return name
    if not all(isinstance(one, Mapping) for one in made.adapters):
        return "adapters"
    rows = made.vocabulary_rows
    if rows is not None:
        first, count = (*rows, None, None)[:2]
        if len(rows) != _PAIR or type(first) is not int or type(count) is not int:
            return "vocabulary_rows"
        if not (0 <= first < _LARGEST and 0 < count <= made.max_length):
            return "vocabulary_rows"
    return None
