# SPDX-License-Identifier: Apache-2.0
"""Build finished graphs with contracts from a recipe and tensor headers; no weights are read, no files written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import xxhash

from surgery.onnx.graph.coded import GraphCodes, by_format
from surgery.onnx.graph.context import Context
from surgery.onnx.graph.contract import Contract
from surgery.onnx.graph.decoder import decoder, embedding_graph
from surgery.onnx.graph.dims import BATCH
from surgery.onnx.graph.encoder import encoder
from surgery.onnx.graph.graph import Graph
from surgery.onnx.graph.lower import check_opset, lower
from surgery.onnx.graph.opset import least_opset
from surgery.onnx.graph.packed import PackedGraph
from surgery.onnx.graph.pair import pair_contexts
from surgery.onnx.graph.pair_names import BEGUN, ENCODER, FIRST, MERGED
from surgery.onnx.graph.rotary import longest
from surgery.onnx.graph.target import OperatorSet, standard
from surgery.onnx.graph.virtual_tokens import Virtual, front_model
from surgery.onnx.graph.weight_files import WeightFile
from surgery.onnx.graph.weights import GraphTensor, GraphWeights, Replaceable
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.files.raw import File
from surgery_formats.models.component import Component
from surgery_formats.models.families.parameters import model_of
from surgery_formats.models.families.recipe import (
    Attention,
    ClassifierHead,
    Experts,
    HiddenHead,
    Model,
    PooledHead,
    Rope,
)
from surgery_formats.models.families.tasks import task_of
from surgery_formats.tensors.unwritten import UnwrittenFile

__all__ = ["EMBEDDER", "GraphOptions", "GraphSet", "build", "takes_grouped", "weight_file"]

EMBEDDER = "embed_tokens.onnx"
"""The graph that makes embeddings of token ids, as transformers.js and optimum name it."""

_HEAD_UNIT = 8  # GroupQueryAttention needs heads of a multiple of this many values
_LABELS = {DType.F32: "fp32", DType.F16: "fp16", DType.BF16: "bf16"}


@dataclass(frozen=True)
class GraphOptions:
    """Options for building a graph.

    Attributes:
        target: The operators to use.
        io: Type of arithmetic, logits and cache.
        max_length: Number of positions; None for as many as the model supports.
        prefill: Whether to build a second graph for several rows on top of a past, if the first one does not take them; of
            an encoder-decoder, whether to build the decoder's two runs apart too.
        overrides: Tensors that replace the checkpoint's, by stored name: those that a merge changed.
        coded: Weights that are stored as codes in blocks, by stored name.
        slotted: Weights that get a slot for a LoRA, see `Context`.
        required: Whether slots are inputs without a default.
        packed: Whether weights of the same input share a slot.
        replaceable: Parameters that become optional inputs.
        virtual: Soft prompts.
        contract: Further fields of the contract.
        position_ids: Whether a decoder takes positions as an input.
        keep_logits: Whether it takes the number of last positions whose logits are computed as an optional input.
        inputs_embeds: Whether a decoder takes embeddings instead of ids, and a graph of its own makes them of ids.
        opset: Set of operators; None for the least that the graph needs.
    """

    target: OperatorSet
    io: DType
    max_length: int | None = None
    prefill: bool = True
    overrides: Mapping[str, GraphTensor] = field(default_factory=dict)
    coded: Mapping[str, GraphCodes] = field(default_factory=dict)
    slotted: frozenset[str] = frozenset()
    required: bool = False
    packed: bool = False
    replaceable: Replaceable = field(default_factory=Replaceable)
    virtual: Virtual = field(default_factory=Virtual)
    contract: Mapping[str, Any] = field(default_factory=dict)
    position_ids: bool = False
    keep_logits: bool = False
    inputs_embeds: bool = False
    opset: int | None = None


@dataclass(frozen=True)
class GraphSet:
    """The graphs by file name, the main one last.

    Attributes:
        graphs: ``model.onnx``, preceded by ``prefill.onnx`` if there is one.
        contract: Contract of the main graph.
        model: The recipe that was built.
        nodes: Number of nodes of the main graph.
        files: Weight files that hold its initializers.
        inputs: Types of the inputs that replace parameters.
        sizes: Rows of A and columns of B, by the weight of a slot.
        encoder: Contract of the encoder of an encoder-decoder, whose main graph is the decoder; else None.
    """

    graphs: Mapping[str, PackedGraph]
    contract: Contract
    model: Model
    nodes: int
    files: tuple[File | UnwrittenFile, ...]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    encoder: Contract | None = None


def build(component: Component, options: GraphOptions, model: Model | None = None) -> GraphSet:
    """Build the graphs of a checkpoint.

    Raises:
        FitError: an unknown architecture, or a tensor that is missing, left over, misshapen or of an unsupported type.
    """
    if options.opset is not None:
        check_opset(options.opset)
        # For runtimes from before these: GatedRMSNorm (1.30), and norms inside GroupQueryAttention (1.28).
        options = replace(options, target=replace(options.target, gate="apart", qk_norm="standard"))
    model = model or model_of(
        component.config, frozenset(component.parameters) | frozenset(options.overrides) | frozenset(options.coded)
    )
    if options.virtual.front:
        model = front_model(model)
    blocks = options.inputs_embeds and model.images == "blocks"
    if blocks or not model.generates or not all(takes_grouped(layer.attention) for layer in model.layers):
        options = replace(options, target=standard(options.target))
    length = _length(model, options)
    if model.encoder is not None:
        return _pair(component, model, replace(options, target=standard(options.target)), length)
    graphs: dict[str, PackedGraph] = {}
    contract = _contract(model, options, length)
    embedding_files: list[File | UnwrittenFile] = []
    if options.inputs_embeds:
        ctx = _new_context(component, model, replace(options, slotted=frozenset(), keep_logits=False))
        embedding_graph(ctx, model)
        embedding_files += ctx.weights.files
        own = replace(
            contract, kind="encoder", task="feature-extraction", padding="any", cache="none", layers=0, state=()
        )
        own = replace(own, convolutions=(), **_built_parts(ctx))
        graphs[EMBEDDER] = _finished(ctx, own, options)
        contract = replace(contract, embedder=EMBEDDER)
        options = replace(options, virtual=replace(options.virtual, embedded=True))
    if options.target.attention == "gqa":
        contract = replace(contract, prefill_batch=False)
        if options.prefill:
            contract = replace(contract, prefill="prefill.onnx")
            graphs["prefill.onnx"] = _prefill(component, model, options, length, contract)
    ctx = _context(component, model, options, length)
    contract = replace(contract, **_built_parts(ctx))
    graphs["model.onnx"] = _finished(ctx, contract, options)
    inputs = {name: ctx.graph.numpy_type(dtype) for name, dtype in ctx.weights.inputs.items()}
    files = tuple(dict.fromkeys([*ctx.weights.files, *embedding_files]))
    return GraphSet(graphs, contract, model, ctx.graph.nodes, files, inputs, _slot_sizes(ctx))


def _prefill(component: Component, model: Model, options: GraphOptions, length: int, contract: Contract) -> PackedGraph:
    """The graph for several rows on top of a past; what built it is gone before the main graph is built."""
    ctx = _context(component, model, replace(options, target=standard(options.target)), length)
    own = replace(contract, padding="any", cache="growing", prefill_batch=True, prefill="", **_built_parts(ctx))
    return _finished(ctx, own, options)


def takes_grouped(attention: Attention) -> bool:
    """Whether GroupQueryAttention has this: heads of a multiple of eight values, no bias on the scores, its own keys alone."""
    own = attention.alibi is None and attention.convolution is None and attention.shared is None
    return own and attention.head_dim % _HEAD_UNIT == 0


def _pair(component: Component, model: Model, options: GraphOptions, length: int) -> GraphSet:
    """The graphs of an encoder-decoder."""
    assert model.encoder is not None
    parts = pair_contexts(model, lambda: _new_context(component, model, options), length)
    _check_slots(options, *parts)
    if options.opset is not None:
        for ctx in parts:
            lower(ctx.graph, options.opset, ctx.io)
    reach = _length(model.encoder, replace(options, max_length=None))
    contract = _contract(model.encoder, options, reach)
    encoder_contract = replace(contract, **_built_parts(parts.encoder))
    contract = replace(
        _contract(model, options, length),
        padding=contract.padding,
        encoder=ENCODER,
        **_built_parts(parts.first),
    )
    codes = parts.encoder.weights.used_codes | parts.first.weights.used_codes
    contract = replace(contract, quantised=by_format(codes.values()))  # of all graphs: the model is told by this one
    graphs = {ENCODER: _finished(parts.encoder, encoder_contract, options)}
    if options.prefill:
        graphs[FIRST] = _finished(parts.first, contract, options)
        graphs[BEGUN] = _finished(parts.begun, contract, options)
    graph = parts.merged()
    nodes = least_opset(graph.proto, options.io)
    graphs[MERGED] = PackedGraph.of(graph.model(contract.as_metadata(), options.opset or nodes))
    inputs = {name: ctx.graph.numpy_type(dtype) for ctx in parts for name, dtype in ctx.weights.inputs.items()}
    files = tuple(dict.fromkeys(file for ctx in parts for file in ctx.weights.files))
    number = parts.first.graph.nodes + parts.begun.graph.nodes
    sizes = {weight: size for ctx in (parts.encoder, parts.first) for weight, size in _slot_sizes(ctx).items()}
    return GraphSet(graphs, contract, model, number, files, inputs, sizes, encoder_contract)


def _finished(ctx: Context, contract: Contract, options: GraphOptions) -> PackedGraph:
    if options.opset is not None:
        lower(ctx.graph, options.opset, ctx.io)
    opset = options.opset or least_opset(ctx.graph.proto, ctx.io)
    ctx.real = str  # it leads back to the context, whose graph would stay until garbage is collected
    return PackedGraph.of(ctx.graph.model(contract.as_metadata(), opset))


def _built_parts(ctx: Context) -> dict[str, Any]:
    """Parts of the contract that are known only after building."""
    return {
        "slots": tuple(ctx.slots),
        "replaceable": tuple(ctx.weights.inputs),
        "weights": tuple(weight_file(file) for file in ctx.weights.files),
        "quantised": by_format(ctx.weights.used_codes.values()),
    }


def _slot_sizes(ctx: Context) -> dict[str, tuple[int, int]]:
    """Rows of A and columns of B, by slot."""
    shapes = {port.name: [dim.dim_value for dim in port.type.tensor_type.shape.dim] for port in ctx.graph.proto.input}
    return {slot.weight: (shapes[slot.A][0], shapes[slot.B][1]) for slot in ctx.slots}


def _new_context(component: Component, model: Model, options: GraphOptions) -> Context:
    graph = Graph()
    weights = GraphWeights(graph, component, options.io, options.overrides, options.replaceable, options.coded)
    return Context(
        graph,
        weights,
        options.target,
        options.io,
        slotted=options.slotted,
        required=options.required,
        packed=options.packed,
        head=component.head,
        virtual=options.virtual,
        batch=_batch(model),
        position_ids=options.position_ids,
        images=model.images if options.inputs_embeds else "row",
        keep_logits=options.keep_logits and model.generates and model.encoder is None,
    )


def _context(component: Component, model: Model, options: GraphOptions, length: int) -> Context:
    ctx = _new_context(component, model, options)
    if model.kind == "decoder":
        decoder(ctx, model, length)
    else:
        encoder(ctx, model, length)
    if options.target.linear == "matmul":
        ctx.graph.describe(options.io)
    ctx.weights.check(model.unused)
    _check_slots(options, ctx)
    return ctx


def _check_slots(options: GraphOptions, *contexts: Context) -> None:
    """Refuse graphs of which none has a slot that is wanted.

    Raises:
        FitError: there is no such slot.
    """
    missing = options.slotted | options.replaceable.names
    for ctx in contexts:
        missing -= {name for slot in ctx.slots for name in slot.weights} | ctx.weights.inputs.keys()
    if missing:
        raise FitError(
            "the graph has no slot for this weight", tensor=min(missing), hint="merge the adapter instead: `merge=`"
        )


def _length(model: Model, options: GraphOptions) -> int:
    limit = model.max_positions
    if options.max_length is not None and options.max_length < 1:
        raise FitError(f"max_length is {options.max_length}", hint="it is at least 1")
    stated = model.embedding.positions or model.embedding.sinusoid
    if stated and options.max_length is not None and options.max_length > limit:
        raise FitError(
            f"the model has {limit} positions, but {options.max_length} were requested",
            tensor=model.embedding.positions or None,
            hint=f"`max_length={limit}` or less",
        )
    ropes = [layer.attention.rope for layer in model.layers if layer.attention.rope is not None]
    return min((longest(rope, options.max_length, limit) for rope in ropes), default=options.max_length or limit)


def _contract(model: Model, options: GraphOptions, length: int) -> Contract:
    first = model.layers[0].attention if model.layers else None
    grouped = options.target.attention == "gqa"
    contract = Contract(
        kind="decoder" if model.generates else "encoder",
        task=task_of(model),
        target=options.target.name,
        dtype=_LABELS[options.io],
        padding="right" if _wants_right(model, options.target) else "any",
        cache="none" if not model.generates else ("shared" if grouped else "growing"),
        layers=len(model.caching) if model.generates else 0,
        kv_heads=first.kv_heads if first else 0,
        head_dim=first.head_dim if first else 0,
        vocabulary=model.vocabulary,
        max_length=length - options.virtual.front - options.virtual.keyed,
        sized_late=any(isinstance(layer.mlp, Experts) for layer in model.layers),
        rope_switch=max((_switch(layer.attention.rope, length) for layer in model.layers), default=0),
    )
    convolved = [layer.attention for layer in model.layers if layer.attention.convolution is not None]
    if convolved and model.generates:
        if options.virtual.past:
            raise FitError("prompts in front of a model with short convolutions are not supported", file="config.json")
        places = (n for n, layer in enumerate(model.layers) if layer.attention.convolution is not None)
        width, kernel = convolved[0].output.inputs, max(one.convolution.kernel for one in convolved if one.convolution)
        contract = replace(contract, convolutions=tuple(places), state=(width, kernel))
    return replace(contract, **options.contract)


def _switch(rope: Rope | None, length: int) -> int:
    """Number of tokens beyond which LongRoPE uses other angles; 0 if the graph never gets there."""
    if rope is None or rope.parameters["rope_type"] != "longrope":
        return 0
    original = int(rope.parameters["original_max_position_embeddings"])
    return original if length > original else 0


def _wants_right(model: Model, target: OperatorSet) -> bool:
    """Whether padding must be on the right: for GroupQueryAttention, positions by index, first-token heads."""
    head = model.head
    if model.kind == "decoder" and not isinstance(head, PooledHead):
        return target.attention == "gqa"
    if (isinstance(head, ClassifierHead) and head.tokens == "first") or (isinstance(head, HiddenHead) and head.pooler):
        return True
    record = model.embedding
    if record.stem is not None or record.patches is not None:  # neither has padding that is told
        return False
    if isinstance(head, PooledHead):
        return True
    return bool(record.positions or record.sinusoid) and record.position_rule == "absolute"


def _batch(model: Model) -> str | int:
    """Size of the batch: one row where rows of different length cannot be told apart, for want of a padding token."""
    one = isinstance(model.head, ClassifierHead) and model.head.tokens == "last" and model.head.padding_token is None
    return 1 if one else BATCH


def weight_file(file: File | UnwrittenFile) -> WeightFile:
    """The identity of a weight file, which is checked when a graph is loaded."""
    return WeightFile(file.path.name, file.size, xxhash.xxh3_128_hexdigest(_header(file)))


def _header(file: File | UnwrittenFile) -> bytes:
    """The safetensors header, including its length."""
    if isinstance(file, UnwrittenFile):
        return file.header
    return bytes(file.read(0, int.from_bytes(file.read(0, 8), "little") + 8))
