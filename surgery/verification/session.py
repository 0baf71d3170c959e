# SPDX-License-Identifier: Apache-2.0
"""An exported graph, checked against its contract and run on the CPU in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError

from surgery.onnx.graph.contract import Contract, contract_of
from surgery.onnx.graph.virtual_tokens import key_name
from surgery.onnx.graph.weight_files import WeightFile, check_weight_files
from surgery.onnx.run.ports import cpu_session
from surgery.reference import Cache
from surgery.verification.twin import SHORT_TYPES, float32_twin
from surgery_formats.errors import FitError, MalformedError, MissingPackageError, NotFoundError, ProofError
from surgery_formats.files.output.manifest import is_safe_name
from surgery_formats.files.raw import open_file
from surgery_formats.models.families.recipe import Model
from surgery_formats.text import show

__all__ = [
    "GraphFile",
    "Session",
    "check_sizes",
    "check_weights",
    "default_past",
    "embedder_of",
    "keys_in_front_of",
    "prompt_in_front",
    "read_graph",
]

_LIMIT = (1 << 31) - 1  # bytes of a protocol buffer
_ROTARY = "rotary"  # what the values of a table of angles are called
_DOMAINS = ("", "ai.onnx", "com.microsoft")

Arrays = dict[str, "np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class GraphFile:
    """A graph and its contract.

    Attributes:
        path: Path of the file.
        model: The graph, without reading its weights.
        contract: Its contract.
    """

    path: Path
    model: onnx.ModelProto
    contract: Contract

    @property
    def weight_files(self) -> tuple[WeightFile, ...]:
        """Files of the contract that the graph reads; none if the weights are inside."""
        read = {
            field.value
            for tensor in self.model.graph.initializer
            for field in tensor.external_data
            if field.key == "location"
        }
        return tuple(weight_file for weight_file in self.contract.weights if weight_file.name in read)

    @property
    def rounded(self) -> bool:
        """Whether it holds 16-bit scalars, or defaults of parameters, whose rounding no float32 twin can undo."""
        return any(
            tensor.data_type in SHORT_TYPES
            and not tensor.external_data
            and (math.prod(tensor.dims) == 1 or tensor.name in self.contract.replaceable)
            for tensor in self.model.graph.initializer
        )


def read_graph(path: Path) -> GraphFile:
    """Read a graph that this toolkit exported.

    Raises:
        InputError: no such file, or not a graph.
        FitError: a graph without a contract, or with operators of other domains.
    """
    source = open_file(path)
    if source.size > _LIMIT:
        raise MalformedError(f"has {source.size} bytes, more than a graph can have", file=path)
    try:
        model = onnx.ModelProto.FromString(bytes(source.read(0, source.size)))
    except DecodeError as error:
        raise MalformedError("not an ONNX graph", file=path) from error
    contract = contract_of(model, path)
    if contract is None:
        raise FitError("the graph has no contract: it was not written by surgery export-onnx", file=path)
    foreign = sorted({node.domain for node in model.graph.node} - set(_DOMAINS))
    if foreign or model.functions:
        raise FitError(f"has operators of '{show(foreign[0] if foreign else 'local functions')}'", file=path)
    return GraphFile(path, model, contract)


def embedder_of(graph: GraphFile) -> GraphFile | None:
    """The graph that makes the embeddings that `graph` takes, if it takes some.

    Raises:
        InputError: it is not there, or none.
    """
    name = graph.contract.embedder
    if not name:
        return None
    if not is_safe_name(name) or "/" in name or name == graph.path.name:
        raise MalformedError(f"the graph refers to '{show(name)}' for its embeddings", file=graph.path)
    own = read_graph(graph.path.parent / name)
    if own.contract.embedder:
        raise MalformedError("the graph of embeddings takes embeddings itself", file=own.path)
    return own


def default_past(graph: GraphFile) -> Cache | None:
    """The graph's default keys and values, those of a soft prompt.

    Raises:
        ProofError: the contract promises virtual tokens that the graph lacks.
    """
    contract = graph.contract
    if not contract.virtual_tokens:
        return None
    defaults = {tensor.name: tensor for tensor in graph.model.graph.initializer if not tensor.external_data}
    shape = (1, contract.kv_heads, contract.virtual_tokens, contract.head_dim)
    layers = []
    for layer in range(contract.layers):
        pair = []
        for part in ("key", "value"):
            tensor = defaults.get(f"past_key_values.{layer}.{part}")
            if tensor is None or tuple(tensor.dims) != shape:
                raise ProofError(
                    f"the contract promises {contract.virtual_tokens} virtual tokens, but the graph lacks their past",
                    file=graph.path,
                    tensor=f"past_key_values.{layer}.{part}",
                )
            pair.append(torch.from_numpy(onnx.numpy_helper.to_array(tensor).astype("float32")))
        layers.append((pair[0], pair[1]))
    return Cache(tuple(layers), torch.ones(1, contract.virtual_tokens, dtype=torch.bool))


def keys_in_front_of(graph: GraphFile) -> Cache | None:
    """The keys and values that an encoder's graph puts before every layer's, or None.

    Raises:
        ProofError: some are not of the sizes that the contract promises.
    """
    contract = graph.contract
    found = {tensor.name: tensor for tensor in graph.model.graph.initializer if not tensor.external_data}
    number = 0
    while key_name(number, "key") in found:
        number += 1
    if not contract.virtual_tokens or not number:
        return None
    shape = (1, contract.virtual_tokens, contract.kv_heads * contract.head_dim)
    layers = []
    for layer in range(number):
        pair = []
        for name in (key_name(layer, "key"), key_name(layer, "value")):
            if name not in found or tuple(found[name].dims) != shape:
                text = f"the contract promises {contract.virtual_tokens} virtual tokens, but the graph lacks their keys"
                raise ProofError(text, file=graph.path, tensor=name)
            values = torch.from_numpy(onnx.numpy_helper.to_array(found[name]).astype("float32"))
            pair.append(values.reshape(1, -1, contract.kv_heads, contract.head_dim).transpose(1, 2))
        layers.append((pair[0], pair[1]))
    return Cache(tuple(layers), torch.ones(1, contract.virtual_tokens, dtype=torch.bool))


def prompt_in_front(graph: GraphFile) -> torch.Tensor | None:
    """The embeddings ``(n, D)`` that an encoder's graph puts before every row, or None.

    Raises:
        ProofError: the contract promises virtual tokens that the graph lacks.
    """
    if not graph.contract.virtual_tokens:
        return None
    prompt = next((tensor for tensor in graph.model.graph.initializer if tensor.name == "soft_prompt"), None)
    if prompt is None or prompt.external_data or list(prompt.dims[:1]) != [graph.contract.virtual_tokens]:
        raise ProofError(
            f"the contract promises {graph.contract.virtual_tokens} virtual tokens, but the graph lacks them",
            file=graph.path,
        )
    return torch.from_numpy(onnx.numpy_helper.to_array(prompt).astype("float32"))


def check_sizes(graph: GraphFile, model: Model) -> None:
    """Compare the numbers of a contract with the model's: a runner allocates its buffers by them.

    Raises:
        ProofError: a number differs.
    """
    contract = graph.contract
    expected: dict[str, Any] = {"vocabulary": model.vocabulary}
    if model.generates:
        attention = [layer.attention for layer in model.layers]
        ropes = [layer.rope.parameters for layer in attention if layer.rope is not None]
        switches = [int(rope["original_max_position_embeddings"]) for rope in ropes if rope["rope_type"] == "longrope"]
        expected |= {
            "layers": len(model.caching),
            "convolutions": tuple(n for n, one in enumerate(attention) if one.convolution is not None),
            "rope_switch": max((n for n in switches if n < contract.max_length), default=0),
        }
        expected |= {"kv_heads": attention[0].kv_heads, "head_dim": attention[0].head_dim} if attention else {}
    types = {"fp32": 1, "fp16": 10, "bf16": 16}
    outputs = {port.name: port.type.tensor_type.elem_type for port in graph.model.graph.output}
    if any(kind != types[contract.dtype] for kind in outputs.values()):
        raise ProofError(f"the contract has {contract.dtype}, but the graph's outputs differ", file=graph.path)
    for name, size in expected.items():
        if getattr(contract, name) != size:
            text = f"the contract has {name} {getattr(contract, name)}, but the model has {size}"
            raise ProofError(text, file=graph.path)
    needed = {"logits"} if model.generates else set()
    needed |= {
        name.replace("past_key_values.", "present.", 1)
        for name in (port.name for port in graph.model.graph.input)
        if name.startswith("past_key_values.") and ".encoder." not in name  # made in a pair's first run, then kept
    }
    if missing := sorted(needed - outputs.keys()):
        raise ProofError(f"the graph lacks the output '{show(missing[0])}'", file=graph.path)
    _check_tables(graph)
    if model.embedding.positions and contract.max_length > model.max_positions:
        text = f"the contract has {contract.max_length} tokens, but the model has {model.max_positions}"
        raise ProofError(text, file=graph.path)


def _check_tables(graph: GraphFile) -> None:
    """Compare the contract's length with the rows of the rotary tables that attention reads by position.

    Raises:
        ProofError: a table is shorter.
    """
    numbers = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in graph.model.graph.initializer
        if not tensor.dims and not tensor.external_data
    }
    for node in graph.model.graph.node:
        if node.op_type != "Range" or not node.output[0].startswith(_ROTARY) or node.input[1] not in numbers:
            continue
        if (rows := int(numbers[node.input[1]])) < graph.contract.max_length:
            raise ProofError(
                f"the contract has {graph.contract.max_length} tokens, but the graph's table of angles has {rows}",
                file=graph.path,
            )


def check_weights(graph: GraphFile) -> None:
    """Compare the weight files with the contract, and all byte ranges of the graph with their sizes.

    Raises:
        ProofError: a file is missing, has another size or header, or the graph reads beyond it.
        MalformedError: an invalid byte range.
    """
    try:
        sizes = check_weight_files(graph.weight_files, graph.path.parent)
    except NotFoundError as error:
        raise ProofError("the graph's weight file is missing", file=error.file) from error
    for tensor in graph.model.graph.initializer:
        if not tensor.external_data:
            continue
        entry = {part.key: part.value for part in tensor.external_data}
        try:
            name, start, length = entry["location"], int(entry["offset"]), int(entry["length"])
        except (KeyError, ValueError) as error:
            raise MalformedError("invalid byte range", file=graph.path, tensor=tensor.name) from error
        if name not in sizes:
            raise ProofError(
                f"the graph reads '{show(name)}', which is not in its contract",
                file=graph.path,
                tensor=tensor.name,
            )
        if start < 0 or length < 0 or start + length > sizes[name]:
            raise ProofError("the graph reads beyond its weight file", file=graph.path, tensor=tensor.name)


class Session:
    """A graph in onnxruntime, in float32, on the CPU; adapters inside it have the strength 0, but for `strengths`, by input.

    Raises:
        ProofError: onnxruntime cannot load the graph.
    """

    def __init__(self, graph: GraphFile, strengths: Mapping[str, float] | None = None) -> None:
        self.slot_arrays: dict[str, Any] = {}
        """Arrays for slots and strengths, passed to every run."""
        self.contract = graph.contract
        self._path = graph.path
        model = graph.model if graph.contract.dtype == "fp32" else float32_twin(graph.model, graph.contract.head_dim)
        try:
            self._session = cpu_session(model, graph.path.parent)
        except MissingPackageError:
            raise
        except Exception as error:  # onnxruntime has a dozen types without a common base
            raise self._refused(error) from error
        own = embedder_of(graph)
        self._embedder = Session(own) if own is not None else None
        ports = self._session.get_inputs()
        self.inputs = {port.name for port in ports}
        self.on_grid = any(port.name == "position_ids" and len(port.shape) == 3 for port in ports)
        """Whether positions are places in time, height and width ``(3, B, S)``."""
        self.optional = {port.name for port in self._session.get_overridable_initializers()}
        empty = ([size if isinstance(size, int) else 0 for size in port.shape] for port in ports)
        self.slot_arrays = {
            port.name: np.zeros(shape, np.float32)
            for port, shape in zip(ports, empty, strict=True)
            if port.name in self.contract.slot_inputs  # those without a default
        }
        known = {**dict.fromkeys(graph.contract.strengths, 0.0), **(strengths or {})}
        given = known.keys() & (self.inputs | self.optional)
        self.slot_arrays |= {name: np.array([known[name]], np.float32) for name in given}
        self._outputs = [port.name for port in self._session.get_outputs()]

    def _refused(self, error: Exception) -> ProofError:
        return ProofError(f"onnxruntime cannot run the graph: {show(str(error), 300)}", file=self._path)

    def run(self, feed: Mapping[str, Any]) -> Arrays:
        """Run the graph; returns all outputs by name.

        Raises:
            ProofError: onnxruntime fails.
        """
        if "position_ids" in self.inputs and "position_ids" not in feed:
            positions = self._positions(feed)
            feed = {**feed, "position_ids": np.stack([positions] * 3) if self.on_grid else positions}
        if "token_type_ids" in self.inputs and "token_type_ids" not in feed and self._embedder is not None:
            feed = {**feed, "token_type_ids": np.zeros_like(feed["input_ids"])}
        if self._embedder is not None:
            ids = {"input_ids": feed["input_ids"]}
            feed = {name: value for name, value in feed.items() if name not in ids} | self._embedder.run(ids)
        try:
            return dict(zip(self._outputs, self._session.run(None, {**self.slot_arrays, **feed}), strict=True))
        except Exception as error:  # as above: a kernel that fails raises any of them
            raise self._refused(error) from error

    def _positions(self, feed: Mapping[str, Any]) -> np.ndarray[Any, Any]:
        """Positions of new tokens, counted over the mask as clients do."""
        mask, new = feed["attention_mask"], feed["input_ids"].shape[1]
        if self.contract.padding == "right" and new == 1:
            return np.asarray(mask.sum(1, keepdims=True) - 1)
        return np.ascontiguousarray(np.maximum(mask.cumsum(1) - 1, 0)[:, -new:])

    def past(self, batch: int) -> Arrays:
        """An empty cache."""
        contract = self.contract
        empty = np.zeros((batch, contract.kv_heads, 0, contract.head_dim), np.float32)
        begin = {name: empty for name in self.inputs if name.startswith("past_key_values.")}
        state = np.zeros((batch, *contract.state), np.float32)
        return begin | {f"past_conv.{layer}": state for layer in contract.convolutions}
