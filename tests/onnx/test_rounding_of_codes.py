# SPDX-License-Identifier: Apache-2.0
"""How codes are chosen: scales of the least error, and errors made up for along known inputs."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from surgery.verbs.export_onnx import export_onnx
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, UsageError
from surgery_formats.linalg.feedback import feedback
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.base import read_rows
from surgery_formats.storage.block_format import BlockFormat
from surgery_formats.storage.nbits import NBits
from tests.oracles import recipes
from tests.support import trained
from tests.support.block_codes import decoded

WIDE = {"hidden_size": 64, "intermediate_size": 96}
MODULE = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return recipes.build("llama", tmp_path_factory.mktemp("llama") / "base", **WIDE)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Of a few directions and some noise, as those of real models."""
    draw = np.random.default_rng(4)
    rows = draw.normal(size=(256, 6)) @ draw.normal(size=(6, 64)) + 0.05 * draw.normal(size=(256, 64))
    path = tmp_path_factory.mktemp("inputs") / "inputs.safetensors"
    save_file({f"{MODULE}.activations": rows.astype(np.float32)}, path)
    return path, rows


def error_of_outputs(base, folder, rows):
    values = read_rows(open_checkpoint(base).main.parameters[f"{MODULE}.weight"].storage)
    return np.linalg.norm(rows @ (decoded(folder)[f"{MODULE}.weight"][:, :64] - values).T) / np.linalg.norm(
        rows @ values.T
    )


@pytest.mark.parametrize("scales", ["minmax", "search"])
def test_errors_are_made_up_for_along_the_inputs_of_a_calibration(base, inputs, scales, tmp_path):
    path, rows = inputs
    export_onnx(base, output=tmp_path / "nearest", weights_type="int4", scales=scales)
    result = export_onnx(base, output=tmp_path / "out", weights_type="int4", scales=scales, calibration=path)
    assert error_of_outputs(base, tmp_path / "out", rows) < 0.5 * error_of_outputs(base, tmp_path / "nearest", rows)
    plain = {
        t.weight: e.error
        for t, e in export_onnx(base, output=tmp_path / "again", weights_type="int4", scales=scales).ledger.coded
    }
    moved = {t.weight for t, e in result.ledger.coded if e.error != plain[t.weight]}
    assert moved == {f"{MODULE}.weight"}


def test_a_calibration_of_another_model_is_refused(base, inputs, tmp_path):
    path, rows = inputs
    save_file({"model.layers.9.mlp.up_proj.activations": rows.astype(np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(FitError, match="a module that the model lacks"):
        export_onnx(base, output=tmp_path / "out", weights_type="int4", calibration=tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="looks at no inputs"):
        export_onnx(base, output=tmp_path / "out", weights_type="int4", calibration=path, rounding="nearest")


def test_errors_vanish_where_the_update_listens(base, tmp_path):
    """The rows of A of a merged LoRA: what it was trained to hear comes through."""
    adapter = trained.train("llama", base, trained.MERGED["lora all-linear"], tmp_path / "adapter")
    from safetensors.numpy import load_file

    factors = load_file(adapter / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.{MODULE}.lora_{side}.weight"] for side in "AB")
    merged = read_rows(open_checkpoint(base).main.parameters[f"{MODULE}.weight"].storage) + 1.5 * B @ A
    errors = {}
    for rounding in ("nearest", "feedback"):
        export_onnx(base, [adapter], output=tmp_path / rounding, weights_type="int4", rounding=rounding)
        errors[rounding] = np.linalg.norm((decoded(tmp_path / rounding)[f"{MODULE}.weight"][:, :64] - merged) @ A.T)
    assert errors["feedback"] < 0.5 * errors["nearest"]


def coded(encoding, values):
    rounded = np.empty_like(values)
    parts = encoding.put(0, values, rounded)
    return rounded, parts


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_type", [DType.F16, DType.BF16])
def test_looking_for_scales_never_leaves_more_error(bits, symmetric, scale_type):
    values = np.random.default_rng(bits).standard_t(3, size=(16, 96)).astype(np.float32)
    errors = []
    for search in (False, True):
        form = BlockFormat(bits, 32, symmetric, search, scale_type)
        rounded, _ = coded(NBits(values.shape, form), values)
        errors.append(float(((rounded - values) ** 2).sum()))
    assert errors[1] <= errors[0] * 1.0001
    assert bits == 8 or errors[1] < errors[0] * 0.97


def test_inputs_that_matter_more_have_less_error():
    """What a squared error weighs decides between scales: inputs of great importance are nearer, the others further off."""
    values = np.random.default_rng(7).standard_t(3, size=(64, 64)).astype(np.float32)
    importance = np.where(np.arange(64) % 8 == 0, 1e4, 1.0).astype(np.float32)
    form, errors = BlockFormat(4, 32, search=True), []
    for weights in (None, importance):
        rounded, _ = coded(NBits(values.shape, form, importance=lambda weights=weights: weights), values)
        errors.append(((rounded - values) ** 2).sum(0))
    even, weighted = errors
    assert (weighted * importance).sum() < 0.8 * (even * importance).sum()
    assert weighted.sum() > even.sum()


@pytest.mark.parametrize("turned", [False, True])
def test_blocks_of_rows_give_the_bytes_of_the_whole(turned):
    values = np.random.default_rng(1).normal(size=(24, 80)).astype(np.float32)
    form = BlockFormat(4, 32, symmetric=False)
    whole = NBits((80, 24) if turned else (24, 80), form, turned)
    rounded, parts = coded(whole, values.T.copy() if turned else values)
    stored = {part.part: bytearray() for part in parts}
    block = NBits((24, 80), form)
    for start in range(0, 24, 8):
        numbers = np.empty((8, 80), np.float32)
        for part in block.put(start, values[start : start + 8], numbers):
            assert part.offset == len(stored[part.part])
            stored[part.part] += bytes(part.data)
        assert np.array_equal(numbers, (rounded.T if turned else rounded)[start : start + 8])
    assert {part.part: bytes(part.data) for part in parts} == {n: bytes(raw) for n, raw in stored.items()}
    assert [part.nbytes for part in block.parts("x")] == [len(stored[n]) for n in range(3)]
    assert form.nbytes(24, 80) == sum(map(len, stored.values()))


def test_values_that_are_all_zero_or_huge_stay_finite():
    values = np.zeros((3, 64), np.float32)
    values[1], values[2, 0] = 1e30, -3e38
    for symmetric in (True, False):
        rounded, _ = coded(NBits(values.shape, BlockFormat(4, 32, symmetric)), values)
        assert np.isfinite(rounded).all()
        assert not rounded[0].any()


def test_feedback_of_a_weight_is_given_up_with_its_last_row():
    made = []

    def inputs():
        made.append(feedback(np.eye(2, 64), 0.1))
        return made[-1]

    encoding = NBits((4, 64), BlockFormat(4, 32), inputs=inputs)
    values = np.ones((2, 64), np.float32)
    for start in (0, 2, 0):
        encoding.put(start, values, np.empty_like(values))
    assert len(made) == 2
