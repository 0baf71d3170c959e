# SPDX-License-Identifier: Apache-2.0
"""What may be wrong with graphs, with outputs that have an account, and with recipes: more of `tests.oracles.bad_inputs`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from tests.oracles.bad_inputs import FILES, HUGE, MODEL, TEXTS, add, at, changed_bytes, text

__all__: list[str] = []


# --- graphs -------------------------------------------------------------------------------------------------------------------
def _graph(edit: Callable[[onnx.ModelProto], Any]) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        edit(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return change


def _external(**fields: str) -> Callable[[onnx.ModelProto], Any]:
    def edit(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        for entry in tensor.external_data:
            entry.value = fields.get(entry.key, entry.value)

    return edit


def _contract(**fields: Any) -> Callable[[onnx.ModelProto], Any]:
    def edit(model: onnx.ModelProto) -> None:
        entry = next(entry for entry in model.metadata_props if entry.value.startswith("{"))
        entry.value = json.dumps({**json.loads(entry.value), **fields})

    return edit


def _contract_text(text: str) -> Callable[[onnx.ModelProto], Any]:
    def edit(model: onnx.ModelProto) -> None:
        next(entry for entry in model.metadata_props if entry.value.startswith("{")).value = text

    return edit


for _name, _change in FILES.items():
    add(
        f"graph-{_name}",
        "graph",
        at("model.onnx", _change),
        (3, 4, 5),
        "model.onnx",
        some=0 if _name in ("empty", "cut-off") else 4,
    )
    add(f"slots-{_name}", "slots", at("model.onnx", _change), (3, 4, 5), "model.onnx", some=3)
    _reads = "(?!inspect|diff)" if _name == "noise" else ""
    add(f"graph-data-{_name}", "graph", at(MODEL, _change), (3, 4, 5), "model", only=_reads, some=4)
_RUN = "run|bench|verify"
for _name, _fields in {
    "outside": {"location": "../base/model.safetensors"}, "absolute": {"location": "/etc/passwd"}, "far": {"offset": str(1 << 62)},
    "negative": {"offset": "-8"}, "words": {"offset": "eight"}, "long": {"length": str(10**30)}, "short": {"length": "4"},
    "nothing": {"location": ""}, "gone": {"location": "gone.safetensors"},
}.items():  # fmt: skip
    add(f"graph-external-{_name}", "graph", _graph(_external(**_fields)), (3, 4, 5), "model.onnx", some=5)
for _name, _fields in {
    "layers": {"layers": HUGE}, "max_length": {"max_length": -1},
    "dtype": {"dtype": "frob"}, "slots": {"slots": 7}, "kv_heads": {"kv_heads": "1"},
}.items():  # fmt: skip
    add(f"graph-contract-{_name}", "graph", _graph(_contract(**_fields)), (3, 4, 5), "model.onnx", only=_RUN)
add("graph-contract-longer", "graph", _graph(_contract(max_length=10**6)), 5, "model.onnx", only="verify")
for _name, _words in {
    "cut-off": '{"version"',
    "deep": '{"a":' * 10_000,
    "list": "{} []",
    "nan": '{"layers": NaN}',
}.items():
    add(f"graph-contract-{_name}", "graph", _graph(_contract_text(_words)), (3, 4), "model.onnx", only=_RUN)
add("graph-without-logits", "graph", _graph(lambda m: m.graph.output.pop(0)), (3, 4, 5), "model.onnx", only=_RUN)
add("graph-without-an-input", "graph", _graph(lambda m: m.graph.input.pop(0)), (3, 4, 5), "model.onnx", only=_RUN)
add("graph-without-a-node", "graph", _graph(lambda m: m.graph.node.pop(4)), (3, 4, 5), "model.onnx", only=_RUN)
add(
    "graph-of-a-foreign-operator",
    "graph",
    _graph(lambda m: setattr(m.graph.node[3], "op_type", "Frob")),
    (3, 4, 5),
    "model.onnx",
    only="run|bench",
)
for _name in ("empty", "cut-off", "noise", "fifo", "folder", "loop", "dangling", "device"):
    add(f"adapter-file-{_name}", "onnx_adapter", FILES[_name], (3, 4), "onnx_adapter")

# --- outputs with an account --------------------------------------------------------------------------------------------------
_MANIFEST = "surgery_manifest.json"
for _name, _edit in TEXTS.items():
    if _name not in ("key-twice", "huge"):  # of 5 MB it may be
        add(f"manifest-{_name}", "merged", text(_MANIFEST, _edit), 3, _MANIFEST, only="verify|apply")
add(
    "output-misses-a-file",
    "merged",
    lambda folder: (folder / MODEL).unlink(),
    (3, 4, 5),
    "model",
    only="verify|unmerge",
)
add(
    "output-with-another-byte",
    "merged",
    changed_bytes(MODEL, lambda data: data[:-1] + b"x"),
    5,
    "merged",
    only="verify .*against",
)
add(
    "output-with-a-longer-file",
    "merged",
    changed_bytes("config.json", lambda data: data + b" "),
    5,
    "config.json",
    only="verify",
)
add(
    "output-misses-its-rounding",
    "merged",
    lambda folder: (folder / "base.rounding").unlink(),
    5,
    "base.rounding",
    only="verify",
)
add("rounding-cut-off", "merged", at("base.rounding", FILES["cut-off"]), (3, 4, 5), only=r"unmerge \{merged|verify")
add(
    "rounding-noise",
    "merged",
    at("base.rounding", FILES["noise"]),
    (3, 4, 5),
    "base.rounding",
    only=r"unmerge \{merged",
)

# --- recipes ------------------------------------------------------------------------------------------------------------------
for _name in ("noise", "fifo", "folder", "loop", "dangling", "device"):
    add(f"recipe-{_name}", "recipe", FILES[_name], (3, 4), "recipe")
_STEP = "steps:\n  - {verb: merge, base: b, adapters: a}\n"
for _name, (_words, _says) in {
    "empty": ("", ""),
    "scalar": ("7", ""),
    "list": ("[1, 2]", ""),
    "cut-off": ("steps: [{verb: merge", ""),
    "tag": ("steps: !!python/object/apply:os.system [ls]", ""),
    "anchor": ("steps: &a [*a]", ""),
    "key-twice": ("steps: []\nsteps: []", "steps"),
    "no-steps": ("inputs: {}", "steps"),
    "steps-empty": ("steps: []", ""),
    "verb-unknown": ("steps: [{verb: frob}]", "frob"),
    "verb-missing": ("steps: [{base: x}]", "verb"),
    "option-unknown": ("steps: [{verb: merge, base: x, frob: 1}]", "frob"),
    "option-of-apply": ("steps: [{verb: merge, base: x, overwrite: true}]", "overwrite"),
    "deep": ("[" * 5000, ""),
    "huge": (_STEP + "#" * (2 << 20), ""),
    "tabs": ("steps:\n\t- x", ""),
    "unused": ("steps:\n  - {verb: combine, adapters: a, as: x}\n  - {verb: merge, base: b, adapters: a}", ""),
    "dates": ("steps: 2020-01-01", ""),
    "unknown-top": (_STEP + "frob: 1", "frob"),
}.items():
    add(
        f"recipe-is-{_name}",
        "recipe",
        lambda path, words=_words: path.write_text(words),
        (2, 3, 4),
        _says or "recipe",
    )
