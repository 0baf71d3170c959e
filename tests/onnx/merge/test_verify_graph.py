# SPDX-License-Identifier: Apache-2.0
"""A merged graph is verified by its values, against its base and its adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file

import surgery
from surgery_formats.errors import FitError, ProofError
from tests.support.graphs_by_value import graph_of, initializer
from tests.support.merged_graphs import PLACES, WEIGHTS, lora, merged_weights, values_in


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_verify_tells_a_merge_by_value(tmp_path: Path, base: Path, dtype: str) -> None:
    tensors = [initializer(f"val_{n}", value.T.astype(dtype)) for n, value in enumerate(WEIGHTS.values())]
    path = graph_of(tmp_path / "in" / "g.onnx", tensors)
    adapter = lora(tmp_path / "adapter", "q", "v")
    surgery.merge(path, adapter, graph_of=base, output=tmp_path / "out")
    checks = {
        check.name: check.detail for check in surgery.verify(tmp_path / "out", against=base, adapters=adapter).checks
    }
    assert checks["weights by value"] == "10 as base and adapters make them, 2 of these updated"
    assert "files" in checks
    assert surgery.verify(path, against=base).checks[0].detail == "10 as the base has them"
    with pytest.raises(ProofError, match=r"2 weights have other values than base and adapters make: .* is \d"):
        surgery.verify(path, against=base, adapters=adapter)
    with pytest.raises(ProofError, match="other values"):
        surgery.verify(tmp_path / "out", against=base)


def test_verify_refuses_weights_that_an_adapter_changed_beyond_recognition(tmp_path: Path, base: Path) -> None:
    tensors = [initializer(f"val_{n}", value.T) for n, value in enumerate(WEIGHTS.values())]
    path = graph_of(tmp_path / "in" / "g.onnx", tensors)
    surgery.merge(path, lora(tmp_path / "adapter", "q", "v", size=3), graph_of=base, output=tmp_path / "out")
    with pytest.raises(ProofError, match=r"2 weights have other values than base and adapters make: [^%]*$"):
        surgery.verify(tmp_path / "out", against=base)


def test_verify_looks_at_the_files_of_a_changed_graph_without_its_base(tmp_path: Path, base: Path) -> None:
    path = graph_of(tmp_path / "in" / "g.onnx", [initializer("w", WEIGHTS[PLACES["q"]].T)])
    surgery.merge(path, lora(tmp_path / "adapter", "q"), graph_of=base, output=tmp_path / "out")
    found = surgery.verify(tmp_path / "out")
    assert ([check.name for check in found.checks], len(found.notes)) == (["files", "computed tensors"], 1)
    raw = bytearray((tmp_path / "out" / "g.onnx").read_bytes())
    raw[raw.index(values_in(tmp_path / "out" / "g.onnx")["w"].tobytes())] ^= 1
    (tmp_path / "out" / "g.onnx").write_bytes(raw)
    with pytest.raises(ProofError, match="changed since"):
        surgery.verify(tmp_path / "out")
    with pytest.raises(FitError, match=r"no surgery_manifest\.json") as caught:
        surgery.verify(path)
    assert "against=" in str(caught.value.hint)


def test_verify_takes_sums_in_another_order(tmp_path: Path, base: Path) -> None:
    adapter = lora(tmp_path / "adapter", "q", "v")
    merged = merged_weights(base, adapter, tmp_path / "checkpoint")
    factors = load_file(adapter / "adapter_model.safetensors")
    for short in "qv":
        stem = PLACES[short].removesuffix(".weight")
        b, a = (factors[f"base_model.model.{stem}.lora_{x}.weight"].astype("f8") for x in "BA")
        merged[PLACES[short]] = (WEIGHTS[PLACES[short]] + 2 * (b @ a)).astype("f4")
    path = graph_of(
        tmp_path / "in" / "g.onnx", [initializer(f"v{n}", value.T) for n, value in enumerate(merged.values())]
    )
    assert surgery.verify(path, against=base, adapters=adapter).checks
