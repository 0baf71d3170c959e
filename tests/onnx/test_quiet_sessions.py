# SPDX-License-Identifier: Apache-2.0
"""What onnxruntime writes to a client's terminal when it opens our graphs: a line for each input with a default, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import surgery
from tests.oracles import recipes

BASE, LORA, PROMPT = "examples/base", "examples/lora", "examples/prompt"
WARNED = re.compile(
    r"[\d: .-]*\[W:onnxruntime:[^\]]*graph\.cc:\d+ Graph\] Initializer (\S+) appears in graph inputs .*"
)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
SILENT: dict[str, dict[str, Any]] = {
    "logits of all positions": {},
    "merged": {"merge": [LORA]},
    "required slots": {"swap": [LORA], "required": True},
    "required packed slots": {"swap": [LORA], "required": True, "packed": True},
    "prompt behind the vocabulary": {"prefix": [PROMPT], "prompt_form": "rows"},
    "int4": {"weights_type": "int4"},
    "MatMul": {"linear": "matmul", "target": "portable"},
    "opset 17": {"opset": 17},
    "embeddings": {"inputs_embeds": True},
    "fp16": {"target": "portable", "dtype": "fp16"},
}


def opened(graph: Path, capfd: pytest.CaptureFixture[str]) -> tuple[list[str], str, list[str]]:
    """The inputs that are warned of, all else that is written, and the inputs with a default."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2  # warnings: what a client has that sets nothing
    capfd.readouterr()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    written = COLOUR.sub("", "".join(capfd.readouterr()))
    defaults = [port.name for port in session.get_overridable_initializers()]
    return WARNED.findall(written), WARNED.sub("", written).strip(), defaults


@pytest.mark.parametrize("kind", SILENT)
def test_a_graph_without_inputs_that_have_a_default_opens_without_a_word(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    surgery.export_onnx(BASE, output=tmp_path / "out", **{"logits": "all", **SILENT[kind]})
    for graph in (tmp_path / "out").glob("*.onnx"):
        assert opened(graph, capfd) == ([], "", [])


@pytest.mark.parametrize(
    "options",
    [{}, {"swap": [LORA]}, {"swap": [LORA], "packed": True}, {"prefix": [PROMPT]}],
    ids=["logits", "slots", "packed", "prompt"],
)
def test_each_input_with_a_default_is_one_line(
    tmp_path: Path, options: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    surgery.export_onnx(BASE, output=tmp_path / "out", **options)
    warned, other, defaults = opened(tmp_path / "out" / "model.onnx", capfd)
    assert sorted(warned) == sorted(defaults)
    assert "num_logits_to_keep" in defaults
    assert other == ""


@pytest.mark.parametrize("family", ["bert_sentence", "t5", "whisper", "mixtral"])
def test_other_families_open_without_a_word(tmp_path: Path, family: str, capfd: pytest.CaptureFixture[str]) -> None:
    base = recipes.build(family, tmp_path / "base")
    surgery.export_onnx(base, output=tmp_path / "out", logits="all")
    graphs = sorted((tmp_path / "out").glob("*.onnx"))
    assert graphs
    for graph in graphs:
        assert opened(graph, capfd) == ([], "", [])
