# SPDX-License-Identifier: Apache-2.0
"""Adapters inside a graph: ``surgery verify`` compares it with strengths of 0, and with what named adapters add."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

import surgery
from surgery_formats.errors import ProofError

EXAMPLES = Path(__file__).parents[2] / "examples"
Paths = tuple[Path, Path, Path]


@pytest.fixture
def inputs(tmp_path: Path) -> Paths:
    """A base and two adapters."""
    style, facts = tmp_path / "style", tmp_path / "facts"
    shutil.copytree(EXAMPLES / "lora", style)
    surgery.resize(EXAMPLES / "lora", rank=2, output=facts)
    return EXAMPLES / "base", style, facts


def gated(inputs: Paths, folder: Path, **options: object) -> Path:
    base, style, facts = inputs
    surgery.export_onnx(base, output=folder / "plain", **options)
    weighted = {style: 0.7, facts: 0.0}
    surgery.insert(folder / "plain" / "model.onnx", weighted, base=base, output=folder / "out", gated=True)
    return folder / "out"


@pytest.mark.parametrize("options", [{}, {"target": "portable"}])
def test_strengths_are_compared_at_0_and_at_what_is_named(
    inputs: Paths, tmp_path: Path, options: dict[str, str]
) -> None:
    base, style, facts = inputs
    out = gated(inputs, tmp_path, **options)
    for adapters in ({}, {style: 1.0}, {style: -0.4, facts: 2.0}):
        found = surgery.verify(out, against=base, adapters=adapters)
        unnamed = [path.name for path in (style, facts) if path not in adapters]
        said = [note for note in found.notes if "inside the graph" in note]
        assert len(said) == bool(unnamed)
        assert all(name in note for note in said for name in unnamed)
        assert any(check.name.startswith("prefill") and check.difference is not None for check in found.checks)


def test_strengths_that_are_exchanged_are_a_fault(inputs: Paths, tmp_path: Path) -> None:
    base, style, _ = inputs
    out = gated(inputs, tmp_path)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    other = {"strength.style": "strength.facts", "strength.facts": "strength.style"}
    for node in model.graph.node:
        node.input[:] = [other.get(name, name) for name in node.input]
    (out / "model.onnx").write_bytes(model.SerializeToString())
    (out / "surgery_manifest.json").unlink()
    surgery.verify(out, against=base)  # both at 0
    with pytest.raises(ProofError, match="a logit differs by"):
        surgery.verify(out, against=base, adapters={style: 1.0})


def test_a_changed_factor_is_a_fault(inputs: Paths, tmp_path: Path) -> None:
    base, style, facts = inputs
    out = gated(inputs, tmp_path)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    factor = next(
        one for one in model.graph.initializer if "lora" in one.name and not one.external_data and len(one.dims) == 2
    )
    values = onnx.numpy_helper.to_array(factor)
    factor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values * 1.05).astype(values.dtype), factor.name))
    (out / "model.onnx").write_bytes(model.SerializeToString())
    (out / "surgery_manifest.json").unlink()
    with pytest.raises(ProofError, match="a logit differs by"):
        surgery.verify(out, against=base, adapters={style: 1.0, facts: 1.0})


def test_a_file_that_is_inside_twice_has_two_strengths(inputs: Paths, tmp_path: Path) -> None:
    base, style, _ = inputs
    again = tmp_path / "again"
    shutil.copytree(style, again)
    out = gated((base, style, again), tmp_path)
    surgery.verify(out, against=base, adapters={style: -0.4, again: 0.2})
    (note,) = [note for note in surgery.verify(out, against=base, adapters={again: 0.2}).notes if "inside" in note]
    assert note.startswith("style inside the graph")
