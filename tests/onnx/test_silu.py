# SPDX-License-Identifier: Apache-2.0
"""The forms of SiLU that a set of operators can have: the near ones are near, and each makes the same model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from surgery.onnx.graph.activation import activate
from surgery.onnx.graph.build import GraphOptions, build
from surgery.onnx.graph.graph import Graph
from surgery.onnx.graph.target import TARGETS
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import open_checkpoint
from tests.oracles import recipes
from tests.support.sessions import Plain


def units(form, io, x):
    """The error in units in the last place, at most."""
    graph = Graph()
    graph.input("x", io, ["n"])
    ctx = SimpleNamespace(graph=graph, io=io, target=replace(TARGETS["cpu"], silu=form))
    graph.rename(activate(ctx, "silu", "x", "at"), "y")
    graph.output("y", io, ["n"])
    (y,) = onnxruntime.InferenceSession(graph.model({}, 20).SerializeToString()).run(None, {"x": x})
    assert y.dtype == x.dtype
    exact = x / (1 + np.exp(-x.astype(np.float64)))
    return (np.abs(y - exact) / np.spacing(np.abs(exact).astype(x.dtype)).astype(np.float64)).max()


@pytest.mark.parametrize("form", ["division", "scaled"])
def test_the_near_forms_are_near(form):
    x = np.linspace(-10, 90, 40_001, dtype=np.float32)
    assert units(form, DType.F32, x) < 4
    assert units("quick_gelu", DType.F32, x) > 1000


def test_a_division_rounds_once_in_16_bits():
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    assert (
        units("division", DType.F16, x[(x > -17) & (x < 6e4)]) < 0.51
    )  # below results are zero, beyond they have no next number


@pytest.mark.parametrize("form", ["sigmoid", "division", "scaled"])
def test_every_form_is_the_same_model(tmp_path, form):
    component = open_checkpoint(recipes.build("llama", tmp_path / "llama")).main
    logits = {}
    for one in ("quick_gelu", form):
        model = build(component, GraphOptions(replace(TARGETS["portable"], silu=one), DType.F32)).graphs["model.onnx"]
        path = component.folder / f"{one}.onnx"
        path.write_bytes(model.data)
        logits[one] = Plain(path).step(np.array([[3, 5, 7, 11]]), np.ones((1, 4), np.int64))
    assert np.abs(logits[form] - logits["quick_gelu"]).max() < 1e-5 * np.abs(logits[form]).max()
