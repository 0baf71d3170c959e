# SPDX-License-Identifier: Apache-2.0
"""The contract of a graph with its runner, stored in the file: padding, cache, virtual tokens, and its weight files.

A graph that is run against its contract silently gives wrong results (padding on the wrong side: logits off by 3 to 7),
so the runner relies on the contract alone, and `verify` checks it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from surgery.onnx.graph.pair_names import MASK, STATES, SWITCH
from surgery.onnx.graph.weight_files import WeightFile
from surgery_formats.errors import MalformedError
from surgery_formats.files.bounded_json import parse_object
from surgery_formats.models.families.inserted import from_fields
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnx

__all__ = [
    "FLOAT_CODES",
    "KEEP",
    "PAD_SWITCH",
    "TEXT",
    "Contract",
    "Slot",
    "contract_of",
    "from_metadata",
]

TEXT = "TEXT"
"""Kind of a prompt given as text: the input continues it and gets no beginning-of-sequence token."""

PAD_SWITCH = "pad_attention_mask"
"""Optional input of graphs with a default past; an empty vector means that the mask already counts virtual tokens."""

FLOAT_CODES = "float8_e4m3fn"
"""Type of codes that are no integers."""

KEEP = "num_logits_to_keep"
"""Optional input of decoders: of how many last positions logits are computed; 0 for all. transformers.js's name for it."""

_RUN_INPUTS = frozenset(
    [
        *(
            "input_ids",
            "inputs_embeds",
            "attention_mask",
            "position_ids",
            "token_type_ids",
            "input_features",
            "pixel_values",
        ),
        *(STATES, MASK, SWITCH, KEEP, PAD_SWITCH),
    ]
)
_PASTS = ("past_key_values.", "past_conv.")
_KEY = "surgery.contract"
_SCHEMA = 1
_LARGEST = 1 << 48  # bound on numbers, including file sizes
_LAYERS = 4096
_PAIR = 2
_CODE_BITS = (4, 8)
_DTYPES = ("fp32", "fp16", "bf16")
_LATER = (
    "replaceable",
    "inserted",
    "quantised",
    "encoder",
    "convolutions",
    "state",
    "embedder",
    "sized_late",
)  # fields that are left out where empty, so that runners of before take the graph
_ADAPTER_TEXTS = ("name", "mode", "kind", "id", "file", "encoder_file", "strength", "tokenizer", "problem_type")
_TEXTS = ("task", "target", "prefill", "prompt_kind", "base", "encoder", "embedder")


@dataclass(frozen=True, slots=True)
class Slot:
    """Optional inputs, of rank 0 by default, through which an adapter can be swapped in.

    Attributes:
        weight: Stored name of the weight that the slot adds to; of several with one input their joint name.
        A: Input ``(in, rank)``; ``(V, rank)`` for an embedding.
        B: Input ``(rank, out)``, with the scale folded in.
        parts: Of several weights: the name of each and its columns of B, in order. Factors lie side by side in A, and as
            blocks on the diagonal of B.
    """

    weight: str
    A: str
    B: str
    parts: tuple[tuple[str, int], ...] = ()

    @property
    def weights(self) -> tuple[str, ...]:
        """Stored names of the weights that it adds to."""
        return tuple(name for name, _ in self.parts) or (self.weight,)

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Slot:
        """The slot that a graph states."""
        parts = tuple((part[0], part[1]) for part in entry.get("parts", ()))
        return cls(**{**entry, "parts": parts})

    @property
    def is_sound(self) -> bool:
        """Whether all fields have their types."""
        names = (self.weight, self.A, self.B, *(name for name, _ in self.parts))
        return all(isinstance(name, str) for name in names) and all(
            type(width) is int and 0 < width < _LARGEST for _, width in self.parts
        )

    def as_fields(self) -> dict[str, Any]:
        """The slot as plain values; `parts` only where there are some, so that runners of before take the graph."""
        stated = asdict(self)
        return stated if self.parts else {key: value for key, value in stated.items() if key != "parts"}


@dataclass(frozen=True, slots=True)
class Contract:
    """Everything a runner must know.

    Attributes:
        kind: ``decoder``, which writes token by token over a cache, or ``encoder``, which runs once: also a causal model
            with another head than a language model's.
        task: As the Hub names it, see `surgery_formats.models.families.tasks.TASKS`.
        target: ``cuda``, ``cpu`` or ``portable``.
        dtype: Type of logits and cache: ``fp32``, ``fp16``, ``bf16``.
        padding: Side on which the rows of a batch are padded: ``right`` (GroupQueryAttention), ``left`` (Attention-23
            with positions by index), ``any`` (encoders).
        cache: ``shared``: past and present may be one buffer of `max_length`; ``growing``: present is past plus the new
            tokens; ``none``.
        layers: Number of layers with a cache.
        kv_heads: Key and value heads per layer.
        head_dim: Values per head.
        vocabulary: Width of the logits.
        max_length: Number of positions of the rotary tables (or learned positions).
        rope_switch: Number of tokens beyond which rotary angles change (LongRoPE), or 0. A sequence that grows past it
            must be prefilled again, because cached keys keep the old angles.
        sized_late: Whether sizes inside a step are known at run time alone, so that no CUDA graph can be recorded of it
            (mixtures of experts).
        prefill_batch: Whether several rows may be prefilled at once on top of a past; otherwise rows go one by one, or
            through `prefill`.
        prefill: File of a graph over the same weights that takes several rows with a past, or empty.
        virtual_tokens: Tokens of a soft prompt: a default past before every call, or, in an encoder, tokens that the
            graph itself puts in front; 0 for none.
        prompt_kind: ``PREFIX_TUNING``, ``PROMPT_TUNING``, ``P_TUNING``, ``TEXT``, or empty.
        vocabulary_rows: First id and number of the soft prompt's rows after the vocabulary, or None.
        slots: Slots for LoRA adapters.
        replaceable: Parameters that are optional inputs under their own names, see `surgery.onnx.export.replaced`.
        inserted: Modules that adapters insert, see `surgery_formats.models.families.inserted.as_fields`; those whose rank is 0
            are optional inputs among the replaceable ones.
        quantised: Weights that are codes in blocks, by how they are stored: ``{"bits", "block", "symmetric", "weights"}``, under
            their stored names; ``type`` where codes are no integers, whose block may be 0: all inputs.
        weights: Files that hold the initializers.
        base: Content id of the base.
        adapters: The adapters merged, swapped or prefixed: ``{"name", "mode", "kind", "id"}`` and, depending on the
            mode, ``weight``, ``file``, ``virtual_tokens``, ``rows`` (first id and number), ``id2label`` of a classifier
            of its own.
        encoder: File of the graph whose result a decoder reads, or empty.
        convolutions: Layers with a short convolution instead of a cache: ``past_conv.N`` and ``present_conv.N`` ``(B, *state)``,
            zero at first.
        state: Channels and tokens of these, or nothing.
        embedder: File of the graph that makes a decoder's ``inputs_embeds`` of token ids, or empty if it takes the ids.
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
    replaceable: tuple[str, ...] = ()
    inserted: tuple[Mapping[str, Any], ...] = ()
    quantised: tuple[Mapping[str, Any], ...] = ()
    weights: tuple[WeightFile, ...] = ()
    base: str = ""
    sized_late: bool = False
    adapters: tuple[Mapping[str, Any], ...] = ()
    encoder: str = ""
    convolutions: tuple[int, ...] = ()
    state: tuple[int, ...] = ()
    embedder: str = ""

    @property
    def has_float_codes(self) -> bool:
        """Whether weights are fp8, which a session should turn into numbers once, at load."""
        return any("type" in entry for entry in self.quantised)

    @property
    def slot_inputs(self) -> tuple[str, ...]:
        """Both inputs of every slot."""
        return tuple(name for slot in self.slots for name in (slot.A, slot.B))

    @property
    def strengths(self) -> frozenset[str]:
        """The inputs that adapters inside the graph are multiplied by."""
        return frozenset(str(one["strength"]) for one in self.adapters if "strength" in one)

    def is_run_input(self, name: str) -> bool:
        """Whether an input is for what is run, a past or a strength: none that the file of an adapter fills."""
        return name in _RUN_INPUTS or name in self.strengths or name.startswith(_PASTS)

    def as_metadata(self) -> dict[str, str]:
        """Render the contract as ``metadata_props`` of a graph."""
        stated = {key: value for key, value in asdict(self).items() if value or key not in _LATER}
        stated["slots"] = [slot.as_fields() for slot in self.slots]
        return {_KEY: json.dumps({"schema": _SCHEMA, **stated}, sort_keys=True, separators=(",", ":"))}


def from_metadata(props: Mapping[str, str], file: str | os.PathLike[str] = "model.onnx") -> Contract | None:
    """Read the contract in a graph's ``metadata_props``; None for a graph of another exporter.

    The file is untrusted; types and ranges of the result have been checked.

    Raises:
        MalformedError: the contract cannot be read, or one of its fields is invalid.
    """
    if (text := props.get(_KEY)) is None:
        return None
    entries = parse_object(text.encode("utf-8", "surrogatepass"), file=file)
    try:
        if entries.pop("schema") != _SCHEMA:
            raise MalformedError("the graph's contract has another version", file=file, hint="export it again")
        known = {field.name for field in fields(Contract)}
        if unknown := sorted(set(entries) - known):
            raise MalformedError(f"the graph's contract has an unknown field '{show(unknown[0], 60)}'", file=file)
        entries["slots"] = tuple(Slot.of(slot) for slot in entries.get("slots", ()))
        entries["weights"] = tuple(WeightFile(**weight_file) for weight_file in entries.get("weights", ()))
        for name in ("adapters", "replaceable", "inserted", "quantised"):
            entries[name] = tuple(entries.get(name, ()))
        rows = entries.get("vocabulary_rows")
        entries["vocabulary_rows"] = None if rows is None else tuple(rows)
        entries["convolutions"] = tuple(entries.get("convolutions", ()))
        entries["state"] = tuple(entries.get("state", ()))
        contract = Contract(**entries)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise MalformedError("the graph's contract cannot be read", file=file, hint="export it again") from error
    if (fault := _fault(contract)) is not None:
        raise MalformedError(f"the graph's contract has no valid '{fault}'", file=file, hint="export it again")
    return contract


def contract_of(model: onnx.ModelProto, file: str | os.PathLike[str] = "model.onnx") -> Contract | None:
    """The contract of a graph that is in memory, see `from_metadata`."""
    return from_metadata({entry.key: entry.value for entry in model.metadata_props}, file)


def _fault(contract: Contract) -> str | None:
    """Return the name of the first field with an invalid type or range, or None."""
    hints = get_type_hints(Contract)
    numbers = {name: getattr(contract, name) for name, kind in hints.items() if kind is int}
    numbers |= {f"weights[{n}].size": entry.size for n, entry in enumerate(contract.weights)}
    for name, value in numbers.items():
        if type(value) is not int or not 0 <= value < (_LAYERS + 1 if name == "layers" else _LARGEST):
            return name
    for name in ("kind", "padding", "cache"):
        if getattr(contract, name) not in get_args(hints[name]):
            return name
    if contract.dtype not in _DTYPES:
        return "dtype"
    for name in ("prefill_batch", "sized_late"):
        if type(getattr(contract, name)) is not bool:
            return name
    if contract.kind == "decoder" and (
        contract.cache == "none" or not all((contract.kv_heads, contract.head_dim, contract.vocabulary))
    ):
        return "cache"
    texts: dict[str, tuple[Any, ...]] = {name: (getattr(contract, name),) for name in _TEXTS}
    if not all(slot.is_sound for slot in contract.slots):
        return "slots"
    texts["replaceable"] = contract.replaceable
    texts["weights"] = tuple(text for entry in contract.weights for text in (entry.name, entry.header))
    for name, values in texts.items():
        if not all(isinstance(text, str) for text in values):
            return name
    if not all(isinstance(entry, Mapping) and _names_texts(entry) for entry in contract.adapters):
        return "adapters"
    try:
        for entry in contract.inserted:
            from_fields(entry)
    except (ValueError, TypeError, AttributeError):
        return "inserted"
    if not all(map(_is_quantised, contract.quantised)):
        return "quantised"
    if not all(type(layer) is int and 0 <= layer < contract.layers for layer in contract.convolutions):
        return "convolutions"
    if len(contract.state) != (_PAIR if contract.convolutions else 0) or not all(
        type(size) is int and 0 < size < _LARGEST for size in contract.state
    ):
        return "state"
    rows = contract.vocabulary_rows
    if rows is not None:
        first, count = (*rows, None, None)[:2]
        if len(rows) != _PAIR or type(first) is not int or type(count) is not int:
            return "vocabulary_rows"
        if not (0 <= first < _LARGEST and 0 < count <= contract.max_length):
            return "vocabulary_rows"
    return None


def _names_texts(adapter: Mapping[str, Any]) -> bool:
    """Whether all names in the entry of an adapter are texts."""
    return all(isinstance(adapter.get(name, ""), str) for name in _ADAPTER_TEXTS)


def _is_quantised(entry: Any) -> bool:
    if not isinstance(entry, Mapping) or set(entry) - {"type"} != {"bits", "block", "symmetric", "weights"}:
        return False
    bits, block, symmetric, names = (entry[key] for key in ("bits", "block", "symmetric", "weights"))
    floats = entry.get("type") == FLOAT_CODES
    if "type" in entry and not (floats and bits == 8 and symmetric is True):
        return False
    known = (
        bits in _CODE_BITS
        and type(block) is int
        and (0 if floats else 1) <= block < _LARGEST
        and type(symmetric) is bool
    )
    return known and isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
