# SPDX-License-Identifier: Apache-2.0
"""Casts by onnxruntime give numpy's bits, and importing onnxruntime through this package sends nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, checker, load_from_string

from surgery_formats import fast_casts
from surgery_formats.halves import narrow, widen


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_casts, "_seen", 1 << 30)
    monkeypatch.setattr(fast_casts, "_FEWEST", 1)


def rounded(values: np.ndarray) -> bytes:
    with np.errstate(all="ignore"):
        return values.astype(np.float16).tobytes()


def test_onnxruntime_casts_both_ways_here(loaded: None) -> None:
    assert fast_casts.fast_cast("narrow", 8) is not None
    assert fast_casts.fast_cast("widen", 8) is not None


@pytest.mark.parametrize("seed", range(4))
def test_any_bits_are_narrowed_as_numpy_does(loaded: None, seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 1 << 32, 1 << 16, np.uint32)
    bits[: 1 << 15] = (bits[: 1 << 15] & 0x87FFFFFF) | 0x38000000  # about the smallest normal numbers of float16
    values = bits.view(np.float32)
    for chosen in (values, values[np.isfinite(values)], values[~np.isnan(values)]):
        out = np.empty(chosen.size, np.float16)
        with np.errstate(all="ignore"):
            narrow(chosen, out)
        assert out.tobytes() == rounded(chosen)


def test_every_float16_is_widened_as_numpy_does(loaded: None) -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    for chosen in (values, values[np.isfinite(values)]):
        out = np.empty(chosen.size, np.float32)
        widen(chosen, out)
        assert out.tobytes() == chosen.astype(np.float32).tobytes()


def test_few_numbers_are_left_to_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_casts, "_seen", 0)
    assert fast_casts.fast_cast("narrow", 1 << 20) is None
    monkeypatch.setattr(fast_casts, "_seen", 1 << 30)
    assert fast_casts.fast_cast("narrow", 100) is None


def test_a_cast_with_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_casts, "_session", lambda source, target: lambda values, out: out.fill(0))
    fast_casts.casts_like_numpys.cache_clear()
    try:
        assert fast_casts.casts_like_numpys() == {}
    finally:
        fast_casts.casts_like_numpys.cache_clear()


def test_the_graph_of_a_cast_is_what_onnx_would_write() -> None:
    model = load_from_string(fast_casts.cast_graph(TensorProto.FLOAT, TensorProto.FLOAT16))
    checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Cast"]
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT16


def test_onnxruntime_starts_no_thread_and_writes_no_file_of_telemetry(tmp_path: Path) -> None:
    """Since 1.29 it sends events by default, from a thread that it starts when it is imported."""
    code = (
        "import surgery, os, sys, onnxruntime; from surgery.engine.processes import can_fork;"
        "sys.exit(os.environ['ORT_DISABLE_TELEMETRY'] != '1' or not can_fork())"
    )
    given = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    env = given | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "OPENBLAS_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0
    assert not list(tmp_path.iterdir())
