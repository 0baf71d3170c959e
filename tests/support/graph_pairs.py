# SPDX-License-Identifier: Apache-2.0
"""The golden graphs (tests/golden/onnx_graphs): what each is made of, and how it answers in onnxruntime."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from safetensors.numpy import load_file

__all__ = ["PAIRS", "Pair", "answer", "difference", "exported_here", "feed", "pair"]

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "onnx_graphs"
HEAD = 16
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


@dataclass(frozen=True)
class Pair:
    """One exporter's graph of one base."""

    name: str
    base_name: str
    exporter: str
    dtype: str
    version: str
    folder: Path

    @property
    def graph(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def adapters(self) -> list[str]:
        """What there is for its base."""
        return sorted(path.name for path in self.place.iterdir() if path.is_dir() and path.name != "base")

    @property
    def place(self) -> Path:
        return GOLDEN / "bases" / self.base_name

    @property
    def base(self) -> Path:
        return self.place / "base"

    def adapter(self, name: str) -> Path:
        return self.place / name

    def run(self) -> dict[str, Any]:
        """Inputs and the base's answer."""
        return load_file(self.place / "run.safetensors")

    def expected(self, adapter: str) -> dict[str, Any]:
        """PEFT's answer with an adapter, and the weights of its merge."""
        return load_file(self.place / f"{adapter}.safetensors")


def pair(folder: Path) -> Pair:
    document = json.loads((folder / "pair.json").read_text())
    package, version = next(iter(document["versions"].items()))
    made_by = f"{package} {version}"
    return Pair(folder.name, document["base"], document["exporter"], document["dtype"], made_by, folder)


def exported_here(place: Path) -> dict[str, Pair]:
    """Graphs of export-onnx, which has no golden ones: their weights are the base's own file."""
    import surgery
    from surgery._version import __version__

    found = {}
    for base, target in (("llama", "cpu"), ("qwen2", "portable"), ("bert", "cpu")):
        name = f"export-{base}-{target}"
        surgery.export_onnx(GOLDEN / "bases" / base / "base", output=place / name, target=target)
        exporter = f"export-onnx for {target}"
        found[name] = Pair(name, base, exporter, "float32", f"surgery {__version__}", place / name)
    return found


PAIRS = {path.parent.name: pair(path.parent) for path in sorted(GOLDEN.glob("*/pair.json"))}


def answer(graph: Path, inputs: dict[str, Any], more: dict[str, Any] | None = None) -> Any:
    """The first output of a graph, without a past; every input it asks for is made of these."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    given = {key.removeprefix("inputs."): value for key, value in inputs.items() if key.startswith("inputs.")}
    feeds = {one.name: feed(one, given) for one in session.get_inputs()} | (more or {})
    return session.run([session.get_outputs()[0].name], feeds)[0]


def feed(wanted: Any, given: dict[str, Any]) -> Any:
    kind = TYPES[wanted.type]
    if wanted.name in given:
        return given[wanted.name].astype(kind)
    if wanted.name == "position_ids":
        return np.broadcast_to(np.arange(given["input_ids"].shape[1]), given["input_ids"].shape).astype(kind)
    if wanted.name == "token_type_ids":
        return np.zeros(given["input_ids"].shape, kind)
    if wanted.name.startswith("past_key_values"):
        width = wanted.shape[3] if isinstance(wanted.shape[3], int) else HEAD  # the builder calls it kv_cache_dim
        return np.zeros([len(given["input_ids"]), wanted.shape[1], 0, width], kind)
    raise AssertionError(f"the golden run has no {wanted.name}")


def difference(first: Any, second: Any) -> float:
    """The largest difference between two answers."""
    return float(np.abs(np.asarray(first, np.float64) - np.asarray(second, np.float64)).max())
