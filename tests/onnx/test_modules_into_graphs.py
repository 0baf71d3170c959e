# SPDX-License-Identifier: Apache-2.0
"""Bottlenecks in graphs of every exporter: nothing without an adapter, and the reference's answer with one.

The reference is the library's own forward within 2e-6 (`test_inserted_modules.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import save_file

import surgery
from surgery.onnx.export.adapters import sort_adapters
from surgery.reference import Reference, forward, open_reference
from surgery.verification.inserted import with_adapter_modules
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.support.graph_pairs import PAIRS, Pair, difference, feed
from tests.support.kit import ROOT

AT = {
    "bert": ("bert.encoder.layer.{}.attention.output", "bert.encoder.layer.{}.output"),
    "llama": ("model.layers.{}.attention_adapters", "model.layers.{}.output_adapters"),
    "gpt2": ("transformer.h.{}.attention_adapters", "transformer.h.{}.output_adapters"),
}
FORMS: dict[str, dict[str, Any]] = {
    "pfeiffer": {"original_ln_before": True, "non_linearity": "gelu"},
    "houlsby": {"non_linearity": "swish", "scaling": 1.5},
    "parallel": {"is_parallel": True, "non_linearity": "relu"},
    "norms": {"original_ln_before": True, "residual_before_ln": False, "non_linearity": "gelu_new", "ln_after": True},
}
NAMES = [
    name
    for name, pair in PAIRS.items()
    if pair.base.parent.name in AT and name != "genai-llama-slots"  # an adapter is baked into that
]


def bottleneck(folder: Path, base: Path, form: str) -> Path:
    """A random adapter as the library saves it."""
    config = json.loads((base / "config.json").read_text())
    kind, width = config["model_type"], config.get("hidden_size") or config["n_embd"]
    own = {"mh_adapter": True, "output_adapter": True, "reduction_factor": width // 4, **FORMS[form]}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"config": own, "model_type": kind, "name": "x"}))
    draw, tensors = np.random.default_rng(3), {}
    sizes = {"adapter_down.0.weight": (4, width), "adapter_down.0.bias": (4,)}
    sizes |= {"adapter_up.weight": (width, 4), "adapter_up.bias": (width,)}
    sizes |= {f"adapter_norm_after.{leaf}": (width,) for leaf in ("weight", "bias") if own.get("ln_after")}
    for layer in range(config.get("num_hidden_layers") or config["n_layer"]):
        for at in AT[kind]:
            for name, size in sizes.items():
                tensors[f"{at.format(layer)}.adapters.x.{name}"] = (0.3 * draw.normal(size=size)).astype(np.float32)
    save_file(tensors, folder / "adapter.safetensors")
    return folder


def reference(base: Path, *adapters: Path) -> Reference:
    return with_adapter_modules(open_reference(open_checkpoint(base).main), sort_adapters(list(adapters)).insert)


def expected(pair: Pair, *adapters: Path) -> np.ndarray:
    given = {name.removeprefix("inputs."): torch.from_numpy(value) for name, value in pair.run().items()}
    return forward(reference(pair.base, *adapters), given["input_ids"], real=given.get("attention_mask")).logits.numpy()


def answered(graph: Path, pair: Pair, adapter: Path | None = None) -> np.ndarray:
    """The first output, of the nodes as they are."""
    options, run = onnxruntime.SessionOptions(), onnxruntime.RunOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    given = {name.removeprefix("inputs."): value for name, value in pair.run().items() if name.startswith("inputs.")}
    feeds = {port.name: feed(port, given) for port in session.get_inputs()}
    if adapter is not None:
        loaded = onnxruntime.LoraAdapter()
        loaded.Load(str(adapter))
        run.add_active_adapter(loaded)
    return session.run([session.get_outputs()[0].name], feeds, run)[0]


CASES = [(name, "pfeiffer") for name in NAMES]
CASES += [(name, form) for form in FORMS for name in ("script-bert", "fused-bert", "genai-llama") if form != "pfeiffer"]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_bottlenecks_are_silent_until_filled(name: str, form: str, tmp_path: Path):
    pair = PAIRS[name]
    adapter = bottleneck(tmp_path / "a", pair.base, form)
    surgery.insert(pair.graph, adapter, base=pair.base, output=tmp_path / "out")
    graph = tmp_path / "out" / "model.onnx"
    before = answered(pair.graph, pair)
    assert answered(graph, pair).tobytes() == before.tobytes()
    of_graph, wanted = difference(before, expected(pair)), expected(pair, adapter)
    found = difference(answered(graph, pair, tmp_path / "out" / "adapters" / "a.onnx_adapter"), wanted)
    assert found <= max(1e-5, 2 * of_graph) < difference(before, wanted)


def test_an_adapter_of_another_base_is_told(tmp_path: Path):
    pair = PAIRS["optimum-llama"]
    adapter = bottleneck(tmp_path / "a", pair.base, "houlsby")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "model_name": "others/llama"}))
    result = surgery.insert(pair.graph, adapter, base=pair.base, dry_run=True)
    assert result.warnings == (f"a: was trained on 'others/llama', the base given is '{pair.base.name}'",)
    assert result.replaced == ()


def test_run_takes_modules_in_a_graph_that_others_made(tmp_path: Path):
    pair = PAIRS["optimum-llama"]
    adapter = bottleneck(tmp_path / "a", pair.base, "houlsby")
    surgery.insert(pair.graph, adapter, base=pair.base, output=tmp_path / "out")
    (tmp_path / "out" / "config.json").write_bytes((pair.base / "config.json").read_bytes())  # for the longest text
    ids = [5, 17, 3, 38, 12]
    file = tmp_path / "out" / "adapters" / "a.onnx_adapter"
    found = surgery.run(tmp_path / "out", ids, max_new=4, adapters=file).texts[0].tokens
    seen = list(ids)
    for _ in range(4):
        logits = forward(reference(pair.base, adapter), torch.tensor([seen])).logits
        seen.append(int(logits[0, -1].argmax()))
    assert list(found) == seen[len(ids) :]


def test_a_graph_of_ours_gets_modules_and_proves_them(tmp_path: Path):
    pair = PAIRS["dynamo-llama"]
    adapter = bottleneck(tmp_path / "a", pair.base, "pfeiffer")
    surgery.export_onnx(pair.base, output=tmp_path / "own", target="portable")
    surgery.insert(tmp_path / "own" / "model.onnx", adapter, base=pair.base, output=tmp_path / "out")
    assert surgery.verify(tmp_path / "out").checks[-1].name.endswith("slots filled")


def test_what_a_foreign_graph_cannot_hold_is_refused(tmp_path: Path):
    pair = PAIRS["dynamo-llama"]
    golden = ROOT / "tests" / "golden" / "bottlenecks"
    for case, text in (
        ("llama-invertible", "an invertible adapter"),
        ("llama-nothing-kept", "`original_ln_after` off"),
    ):
        with pytest.raises(FitError, match=text) as caught:
            surgery.insert(pair.graph, golden / case, base=pair.base, output=tmp_path / "out")
        assert "`surgery export-onnx BASE ADAPTER`" in caught.value.hint
    adapter = bottleneck(tmp_path / "a", pair.base, "houlsby")
    with pytest.raises(FitError, match="modules are optional inputs"):
        surgery.insert(pair.graph, adapter, base=pair.base, output=tmp_path / "out", gated=True)
    surgery.insert(pair.graph, adapter, base=pair.base, output=tmp_path / "once")
    with pytest.raises(FitError, match="has a module here already"):
        surgery.insert(tmp_path / "once" / "model.onnx", adapter, base=pair.base, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
