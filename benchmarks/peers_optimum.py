# SPDX-License-Identifier: Apache-2.0
"""optimum-onnx beside this project, for `peers.py`: which folders each exports, how right the graph is, time and memory."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from measure import ROOT, Sample, run

__all__ = ["costs", "exports"]

BASE, LORA, DORA = (ROOT / "examples" / name for name in ("base", "lora", "dora"))
_TASK = ["--task", "text-generation-with-past"]
IDS = np.array([[5, 9, 30, 41, 7, 22]])


def exports(cli: Path, call: Callable[..., object], work: Path) -> Mapping[str, Mapping[str, str]]:
    """By what is given and by program: whether a graph came of it, its operators, and its distance from the model itself."""
    merged = work / "optimum-merged"
    assert not call([sys.executable, "-m", "surgery_cli", "merge", BASE, LORA, "-o", merged]).code
    cases = {
        "a merged model": (merged, None, [merged]),
        "the folder of a LoRA": (LORA, LORA, [BASE, LORA]),
        "a LoRA beside its base's config.json": (_beside(LORA, work), LORA, [BASE, LORA]),
        "a DoRA beside its base's config.json": (_beside(DORA, work), DORA, [BASE, DORA]),
    }
    rows = dict[str, dict[str, str]]()
    for number, (title, (folder, adapter, asked)) in enumerate(cases.items()):
        exact = _logits(merged if adapter is None else BASE, adapter)
        here, there = work / f"onnx-here{number}", work / f"onnx-there{number}"
        ours = call([sys.executable, "-m", "surgery_cli", "export-onnx", *asked, "-o", here])
        theirs = call([cli, "export", "onnx", "--model", folder, *_TASK, there])
        rows[title] = {"surgery": _outcome(ours, here, exact), "optimum": _outcome(theirs, there, exact)}
        print(title, theirs.text[-800:], file=sys.stderr, flush=True)
    return rows


def _beside(adapter: Path, work: Path) -> Path:
    """The layout in which transformers itself attaches an adapter: its files, and the base's configuration."""
    folder = work / f"beside-{adapter.name}"
    shutil.copytree(adapter, folder)
    for file in (*BASE.glob("tokenizer*"), BASE / "config.json"):
        shutil.copy(file, folder)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(BASE)}))
    return folder


def _logits(base: Path, adapter: Path | None) -> np.ndarray:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return np.asarray(model(torch.tensor(IDS)).logits)


def _outcome(ran: object, folder: Path, exact: np.ndarray) -> str:
    import onnx
    import onnxruntime

    if ran.code:
        return f"refused, exit {ran.code}"
    path = folder / "model.onnx"
    session = onnxruntime.InferenceSession(str(path))
    given = {value.name: _input(value) for value in session.get_inputs()}
    off = float(np.abs(session.run(["logits"], given)[0] - exact).max())
    products = sum(node.op_type in ("MatMul", "Gemm") for node in onnx.load(path, load_external_data=False).graph.node)
    return f"{'right' if off < 1e-4 else f'logits off by {off:.1g}'}, {products} products"


def _input(value: object) -> np.ndarray:
    kind = {"tensor(int64)": np.int64, "tensor(float)": np.float32}[value.type]
    if value.name == "input_ids":
        return IDS
    if value.name == "position_ids":
        return np.arange(IDS.shape[1])[None]
    if value.name.startswith("past"):
        return np.zeros((1, value.shape[1], 0, value.shape[3]), kind)
    assert value.name == "attention_mask", value.name
    return np.ones_like(IDS)


def costs(cli: Path, work: Path) -> Mapping[str, Sample]:
    """An export of a random Llama of 211 M parameters in bfloat16, as whole processes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, num_key_value_heads=8, tie_word_embeddings=False, **sizes))
    base = work / "larger"
    model.to(torch.bfloat16).save_pretrained(base)
    for file in BASE.glob("tokenizer*"):
        shutil.copy(file, base)
    ours = [sys.executable, "-m", "surgery_cli", "export-onnx", str(base), "-o", str(work / "larger-here")]
    theirs = [str(cli), "export", "onnx", "--model", str(base), *_TASK, str(work / "larger-there")]
    return {
        "surgery": run(ours, work / "log"),
        "optimum": run(theirs, work / "log", {"PYTHONPATH": ""}),
    }
