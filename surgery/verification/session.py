# SPDX-License-Identifier: Apache-2.0
"""An exported graph, checked against its contract and run on the CPU in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.onnx.graph.contract import Contract, WeightFile, from_metadata
from surgery.onnx.graph.weight_files import check_weight_files
from surgery.verification.twin import SHORT_TYPES, float32_twin
from surgery_formats.errors import FitError, MalformedError, NotFoundError, ProofError
from surgery_formats.files.raw import open_file
from surgery_formats.text import show

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch

    from surgery.reference import Cache
    from surgery_formats.models.families.recipe import Model

__all__ = ["GraphFile", "Session", "check_sizes", "check_weights", "default_past", "prompt_in_front", "read_graph"]

_LIMIT = (1 << 31) - 1  # of a protocol buffer
_DOMAINS = ("", "ai.onnx", "com.microsoft")

Arrays = dict[str, "np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class GraphFile:
    """A graph and its contract.

    Attributes:
        path: Of the file.
        model: Its contents, weights not read.
        contract: What it asks of whoever runs it.
    """

    path: Path
    model: onnx.ModelProto
    contract: Contract

    @property
    def weight_files(self) -> tuple[WeightFile, ...]:
        """Files of the contract that the graph reads; none where the weights are inside."""
        read = {
            part.value for one in self.model.graph.initializer for part in one.external_data if part.key == "location"
        }
        return tuple(one for one in self.contract.weights if one.name in read)

    @property
    def rounded(self) -> bool:
        """Whether it holds scalars of 16 bits, which no twin makes exact again."""
        return any(
            one.data_type in SHORT_TYPES and not one.external_data and math.prod(one.dims) == 1
            for one in self.model.graph.initializer
        )


def read_graph(path: Path) -> GraphFile:
    """Read a graph that this toolkit exported.

    Raises:
        InputError: no such file, or no graph.
        FitError: a graph without a contract, or with operators of others.
    """
    import onnx
    from google.protobuf.message import DecodeError

    opened = open_file(path)
    if opened.size > _LIMIT:
        raise MalformedError(f"{opened.size} bytes are no graph", file=path)
    try:
        model = onnx.ModelProto.FromString(bytes(opened.read(0, opened.size)))
    except DecodeError as error:
        raise MalformedError("not an ONNX graph", file=path) from error
    contract = from_metadata({one.key: one.value for one in model.metadata_props}, path)
    if contract is None:
        raise FitError("the graph has no contract: it is not of `surgery export-onnx`", file=path)
    foreign = sorted({node.domain for node in model.graph.node} - set(_DOMAINS))
    if foreign or model.functions:
        raise FitError(f"operators of '{show(foreign[0] if foreign else 'local functions')}'", file=path)
    return GraphFile(path, model, contract)


def default_past(graph: GraphFile) -> Cache | None:
    """Keys and values that the graph takes where it is given none: those of a soft prompt.

    Raises:
        ProofError: the contract promises virtual tokens, and the graph does not have them.
    """
    import onnx
    import torch

    from surgery.reference import Cache

    contract = graph.contract
    if not contract.virtual_tokens:
        return None
    given = {tensor.name: tensor for tensor in graph.model.graph.initializer if not tensor.external_data}
    shape = (1, contract.kv_heads, contract.virtual_tokens, contract.head_dim)
    found = []
    for layer in range(contract.layers):
        pair = []
        for part in ("key", "value"):
            tensor = given.get(f"past_key_values.{layer}.{part}")
            if tensor is None or tuple(tensor.dims) != shape:
                raise ProofError(
                    f"the contract promises {contract.virtual_tokens} virtual tokens, and the graph lacks their past",
                    file=graph.path,
                    tensor=f"past_key_values.{layer}.{part}",
                )
            pair.append(torch.from_numpy(onnx.numpy_helper.to_array(tensor).astype("float32")))
        found.append((pair[0], pair[1]))
    return Cache(tuple(found), torch.ones(1, contract.virtual_tokens, dtype=torch.bool))


def prompt_in_front(graph: GraphFile) -> torch.Tensor | None:
    """Embeddings ``(n, D)`` that an encoder's graph puts before every row; None where it puts none.

    Raises:
        ProofError: the contract promises virtual tokens, and the graph does not have them.
    """
    import onnx
    import torch

    if not graph.contract.virtual_tokens:
        return None
    held = next((one for one in graph.model.graph.initializer if one.name == "soft_prompt"), None)
    if held is None or held.external_data or list(held.dims[:1]) != [graph.contract.virtual_tokens]:
        raise ProofError(
            f"the contract promises {graph.contract.virtual_tokens} virtual tokens, and the graph lacks them",
            file=graph.path,
        )
    return torch.from_numpy(onnx.numpy_helper.to_array(held).astype("float32"))


def check_sizes(graph: GraphFile, model: Model) -> None:
    """Compare the numbers of a contract with the model's: a runner makes its buffers by them.

    Raises:
        ProofError: one differs.
    """
    contract = graph.contract
    wanted: dict[str, Any] = {"vocabulary": model.vocabulary}
    if model.kind == "decoder":
        attention = [layer.attention for layer in model.layers]
        ropes = [one.rope.parameters for one in attention if one.rope is not None]
        switches = [int(one["original_max_position_embeddings"]) for one in ropes if one["rope_type"] == "longrope"]
        wanted |= {
            "layers": len(attention),
            "rope_switch": max((n for n in switches if n < contract.max_length), default=0),
        }
        wanted |= {"kv_heads": attention[0].kv_heads, "head_dim": attention[0].head_dim} if attention else {}
    types = {"fp32": 1, "fp16": 10, "bf16": 16}
    outputs = {one.name: one.type.tensor_type.elem_type for one in graph.model.graph.output}
    if any(kind != types[contract.dtype] for kind in outputs.values()):
        raise ProofError(
            f"the contract says {contract.dtype}, the graph's outputs are of another type", file=graph.path
        )
    for name, size in wanted.items():
        if getattr(contract, name) != size:
            raise ProofError(
                f"the contract says {name} {getattr(contract, name)}, the model has {size}", file=graph.path
            )
    if model.embedding.positions and contract.max_length > model.max_positions:
        raise ProofError(
            f"the contract says {contract.max_length} tokens, the model has {model.max_positions}", file=graph.path
        )


def check_weights(graph: GraphFile) -> None:
    """Compare the weight files with what the contract says of them, and every byte range of the graph with their sizes.

    Raises:
        ProofError: a file is missing, has another size or another header, or the graph reads beyond it.
        MalformedError: a range that is none.
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
            raise MalformedError("a byte range that is none", file=graph.path, tensor=tensor.name) from error
        if name not in sizes:
            raise ProofError(
                f"the graph reads '{show(name)}', which its contract does not name",
                file=graph.path,
                tensor=tensor.name,
            )
        if start < 0 or length < 0 or start + length > sizes[name]:
            raise ProofError("the graph reads beyond its weight file", file=graph.path, tensor=tensor.name)


class Session:
    """A graph in onnxruntime, in float32, on the CPU.

    Raises:
        ProofError: onnxruntime refuses it.
    """

    def __init__(self, graph: GraphFile) -> None:
        import onnxruntime

        self.given: Mapping[str, Any] = {}
        """Fed to every run besides: what fills slots."""
        self.contract = graph.contract
        self._path = graph.path
        model = graph.model if graph.contract.dtype == "fp32" else float32_twin(graph.model, graph.contract.head_dim)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(graph.path.parent.resolve())
        )
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has a dozen of its own, without a common name
            raise self._refused(error) from error
        self.inputs = {one.name for one in self._session.get_inputs()}
        self._outputs = [one.name for one in self._session.get_outputs()]

    def _refused(self, error: Exception) -> ProofError:
        return ProofError(f"onnxruntime does not run the graph: {show(str(error), 300)}", file=self._path)

    def run(self, feed: Mapping[str, Any]) -> Arrays:
        """Every output by name.

        Raises:
            ProofError: onnxruntime fails.
        """
        try:
            return dict(zip(self._outputs, self._session.run(None, {**self.given, **feed}), strict=True))
        except Exception as error:
            raise self._refused(error) from error

    def past(self, batch: int) -> Arrays:
        """An empty cache."""
        import numpy as np

        contract = self.contract
        empty = np.zeros((batch, contract.kv_heads, 0, contract.head_dim), np.float32)
        return {name: empty for name in self.inputs if name.startswith("past_key_values.")}
