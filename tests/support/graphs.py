"""Tiny decoders made by hand, with the inputs, outputs and contract of real ones: two layers, rotary positions, four query heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from surgery.onnx.graph.contract import Contract, Slot

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, LONGEST = 2, 32, 4, 2, 16, 40, 64
FLOAT, INT64, INT32, BOOL = 1, 7, 6, 9
CONTRACT = Contract(
    kind="decoder", task="text-generation", target="cpu", dtype="fp32", padding="right", cache="shared", layers=LAYERS,
    kv_heads=KV_HEADS, head_dim=HEAD_DIM, vocabulary=VOCABULARY, max_length=LONGEST, prefill_batch=False,
)  # fmt: skip


class Graph:
    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.rng = np.random.default_rng(7)

    def add(self, kind: str, inputs: list[str], outputs: list[str] | None = None, domain: str = "", **attributes: Any):
        made = outputs or [f"{kind}_{len(self.nodes)}"]
        self.nodes.append(helper.make_node(kind, inputs, made, domain=domain, **attributes))
        return made[0]

    def constant(self, name: str, value: Any) -> str:
        self.initializers.setdefault(name, numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, name: str, *shape: int, scale: float = 1.0) -> str:
        return self.constant(name, (scale * self.rng.normal(size=shape) / shape[0] ** 0.5).astype(np.float32))


def decoder(
    folder: Path,
    attention: str = "grouped",
    *,
    contract: Contract | None = None,
    prefix: Mapping[str, np.ndarray] | None = None,
    optional_past: bool = False,
    slots: bool = False,
    position_ids: bool = False,
) -> Path:
    """Write ``model.onnx``; `attention` is ``grouped`` (GroupQueryAttention) or ``plain`` (Attention-23)."""
    g, value = Graph(), helper.make_tensor_value_info
    g.inputs += [value("input_ids", INT64, ["batch", "seq"]), value("attention_mask", INT64, ["batch", "total"])]
    angles = np.outer(np.arange(LONGEST), 1e2 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    cos, sin = (g.constant(n, f(angles).astype(np.float32)) for n, f in (("cos", np.cos), ("sin", np.sin)))
    x = g.add("Gather", [g.weight("embedding", VOCABULARY, HIDDEN, scale=6.0), "input_ids"])
    if attention == "grouped":
        total = g.add("Gather", [g.add("Shape", ["attention_mask"]), g.constant("one", np.array(1, np.int64))], axis=0)
        total = g.add("Cast", [total], to=INT32)
        count = g.add("ReduceSum", ["attention_mask", g.constant("axis1", np.array([1], np.int64))], keepdims=0)
        last = g.add("Cast", [g.add("Sub", [count, "one"])], to=INT32)
    else:
        mask, places = _causal(g)
        if position_ids:
            g.inputs.append(value("position_ids", INT64, ["batch", "seq"]))
            places = "position_ids"
    found_slots = []
    for layer in range(LAYERS):
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        present = [f"present.{layer}.{kind}" for kind in ("key", "value")]
        g.inputs += [value(n, FLOAT, ["batch", KV_HEADS, "past", HEAD_DIM]) for n in past]
        g.outputs += [value(n, FLOAT, ["batch", KV_HEADS, "both", HEAD_DIM]) for n in present]
        q = g.add("MatMul", [x, g.weight(f"q{layer}", HIDDEN, HEADS * HEAD_DIM)])
        k = g.add("MatMul", [x, g.weight(f"k{layer}", HIDDEN, KV_HEADS * HEAD_DIM)])
        v = g.add("MatMul", [x, g.weight(f"v{layer}", HIDDEN, KV_HEADS * HEAD_DIM)])
        if slots:
            a, b = f"q{layer}.lora_A", f"q{layer}.lora_B"
            g.constant(a, np.zeros((HIDDEN, 0), np.float32))
            g.constant(b, np.zeros((0, HEADS * HEAD_DIM), np.float32))
            g.inputs += [value(a, FLOAT, [HIDDEN, f"r{layer}"]), value(b, FLOAT, [f"r{layer}", HEADS * HEAD_DIM])]
            q = g.add("Add", [q, g.add("MatMul", [g.add("MatMul", [x, a]), b])])
            found_slots.append(Slot(f"q{layer}", a, b))
        if attention == "grouped":
            y = f"attention{layer}"
            g.add(
                "GroupQueryAttention", [q, k, v, *past, last, total, cos, sin], [y, *present], "com.microsoft",
                num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1, scale=HEAD_DIM**-0.5,
            )  # fmt: skip
        else:
            q = g.add("RotaryEmbedding", [q, cos, sin, places], num_heads=HEADS)
            k = g.add("RotaryEmbedding", [k, cos, sin, places], num_heads=KV_HEADS)
            y = f"attention{layer}"
            g.add("Attention", [q, k, v, mask, *past], [y, *present], q_num_heads=HEADS, kv_num_heads=KV_HEADS)
        x = g.add("Add", [x, g.add("MatMul", [y, g.weight(f"o{layer}", HEADS * HEAD_DIM, HIDDEN)])])
    g.add("MatMul", [x, g.weight("head", HIDDEN, VOCABULARY)], ["logits"])
    g.outputs.insert(0, value("logits", FLOAT, ["batch", "seq", VOCABULARY]))
    if optional_past:
        prefix = prefix or {
            f"past_key_values.{n}.{kind}": np.zeros((1, KV_HEADS, 0, HEAD_DIM), np.float32)
            for n in range(LAYERS)
            for kind in ("key", "value")
        }
    for name, array in (prefix or {}).items():
        g.constant(name, array)
    graph = helper.make_graph(g.nodes, "tiny", g.inputs, g.outputs, list(g.initializers.values()))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    known = contract or CONTRACT
    if attention == "plain":
        known = replace(known, padding="left", cache="growing", prefill_batch=True)
    known = replace(known, slots=tuple(found_slots))
    if prefix:
        known = replace(known, virtual_tokens=next(iter(prefix.values())).shape[2])
    helper.set_model_props(model, known.as_metadata())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _causal(g: Graph) -> tuple[str, str]:
    """``(mask (B, 1, S, T), places (B, S))``: a place sees the marked places up to its own."""
    zero, one = g.constant("zero", np.array(0, np.int64)), g.constant("one", np.array(1, np.int64))
    axes = {n: g.constant(f"axes{n}", np.array(v, np.int64)) for n, v in (("0", [0]), ("1", [1]), ("12", [1, 2]))}
    before = g.add("Squeeze", [g.add("Shape", ["past_key_values.0.key"], start=2, end=3)])
    new = g.add("Squeeze", [g.add("Shape", ["input_ids"], start=1, end=2)])
    both = g.add("Squeeze", [g.add("Shape", ["attention_mask"], start=1, end=2)])
    keys = g.add("Range", [zero, both, one])
    queries = g.add("Add", [g.add("Range", [zero, new, one]), before])
    seen = g.add("LessOrEqual", [g.add("Unsqueeze", [keys, axes["0"]]), g.add("Unsqueeze", [queries, axes["1"]])])
    valid = g.add("Cast", [g.add("Unsqueeze", ["attention_mask", axes["12"]])], to=BOOL)
    mask = g.add("And", [valid, seen])
    shape = g.add("Shape", ["input_ids"])
    return mask, g.add("Expand", [g.add("Unsqueeze", [queries, axes["0"]]), shape])


def prefix(seed: int, tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"past_key_values.{layer}.{kind}": rng.normal(size=(1, KV_HEADS, tokens, HEAD_DIM)).astype(np.float32)
        for layer in range(LAYERS)
        for kind in ("key", "value")
    }


def factors(seed: int, rank: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {}
    for layer in range(LAYERS):
        found[f"q{layer}.lora_A"] = rng.normal(size=(HIDDEN, rank)).astype(np.float32)
        found[f"q{layer}.lora_B"] = rng.normal(size=(rank, HEADS * HEAD_DIM)).astype(np.float32) / 8
    return found


def plain_logits(path: Path, row: list[int], past: Mapping[str, np.ndarray] | None = None, **more: Any) -> np.ndarray:
    """``(S, V)`` of one row by one plain call of onnxruntime: no cache, no padding, none of our runner."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    before = 0 if past is None else next(iter(past.values())).shape[2]
    feeds = {"input_ids": np.array([row]), "attention_mask": np.ones((1, before + len(row)), np.int64), **more}
    for layer in range(LAYERS):
        for kind in ("key", "value"):
            name = f"past_key_values.{layer}.{kind}"
            feeds[name] = np.zeros((1, KV_HEADS, 0, HEAD_DIM), np.float32) if past is None else past[name]
    if any(one.name == "position_ids" for one in session.get_inputs()):
        feeds["position_ids"] = before + np.arange(len(row))[None]
    return session.run(["logits"], feeds)[0][0]


def load(path: Path) -> onnx.ModelProto:
    return onnx.load(path)
