# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's arrays: what its own converter wrote merges to what its runtime computes, and what we write is the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from surgery import combine, convert, merge
from surgery_formats.adapters.registry import format_at, read_adapter
from surgery_formats.adapters.tensorrt_llm import TENSORRT_LLM
from surgery_formats.errors import FitError, MalformedError, NotFoundError, ProofError, SurgeryError
from tests.support.adapter_files import GOLDEN, assert_expected, draw, llama, merged, write_base, write_peft

HERE = GOLDEN / "tensorrt_llm"
BASE = GOLDEN / "litgpt/base"
CASES = ("all", "ranks", "half", "brain", "dora")
WEIGHTS, CONFIG = "model.lora_weights.npy", "model.lora_config.npy"
LINEAR = [[1, 0, 2]]
"""A row of attn_q in layer 0, of rank 2; its weight is (32, 32)."""


def write(folder: Path, rows: list[list[int]], values: np.ndarray) -> Path:
    folder.mkdir()
    np.save(folder / WEIGHTS, values)
    np.save(folder / CONFIG, np.array([rows], np.int32))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_merges_to_what_the_runtime_computes(name: str, tmp_path: Path) -> None:
    assert format_at(HERE / name) is TENSORRT_LLM
    assert read_adapter(HERE / name / WEIGHTS).updates.keys() == read_adapter(HERE / name).updates.keys()
    assert read_adapter(HERE / name).unconsumed() == ()
    assert_expected(BASE, merged(BASE, HERE / name, tmp_path / "out"), HERE / name / "expected.safetensors")


@pytest.mark.parametrize(("name", "dtype"), [("all", "keep"), ("ranks", "keep"), ("half", "fp16"), ("brain", "bf16")])
def test_to_peft_and_back_it_is_the_same_file(name: str, dtype: str, tmp_path: Path) -> None:
    there = convert(HERE / name, "peft", output=tmp_path / "peft", base=BASE)
    back = convert(tmp_path / "peft", "tensorrt-llm", output=tmp_path / "back", base=BASE, dtype=dtype)
    assert there.max_error <= 1e-6
    assert back.max_error <= 1e-6
    assert_expected(BASE, merged(BASE, tmp_path / "peft", tmp_path / "out"), HERE / name / "expected.safetensors")
    theirs, ours = (np.load(folder / CONFIG) for folder in (HERE / name, tmp_path / "back"))
    weights = [np.load(folder / WEIGHTS).view(np.uint8) for folder in (HERE / name, tmp_path / "back")]
    order = [theirs[0].tolist().index(row) for row in ours[0].tolist()]
    assert len(order) == theirs.shape[1]
    assert np.array_equal(weights[0][0][order], weights[1][0])
    assert (tmp_path / "back" / WEIGHTS).read_bytes()[:128] == (HERE / name / WEIGHTS).read_bytes()[:128]


def test_a_sum_is_proved_although_its_rows_wait_for_the_base(tmp_path: Path) -> None:
    total = combine([(HERE / "all", 0.5), (HERE / "ranks", -2.0)], output=tmp_path / "sum", base=BASE)
    assert format_at(total.output) is TENSORRT_LLM
    got, before = merged(BASE, tmp_path / "sum", tmp_path / "out"), load_file(BASE / "model.safetensors")
    first, second = (load_file(HERE / name / "expected.safetensors") for name in ("all", "ranks"))
    for name, weight in first.items():
        wanted = 0.5 * (weight - before[name]) - 2.0 * (second.get(name, before[name]) - before[name])
        assert abs(got[name] - before[name] - wanted).max() <= 1e-5


@pytest.mark.parametrize("name", ["all", "half"])
def test_arrays_are_no_model(name: str, tmp_path: Path) -> None:
    with pytest.raises(FitError, match="an adapter where a full model was expected"):
        merge(HERE / name, HERE / "all", output=tmp_path / "out")


def test_a_fused_projection_is_read_where_the_base_has_it(tmp_path: Path) -> None:
    """The order of its rows is the base's own; where the base has parts, the file does not tell it."""
    base = GOLDEN / "gguf/phi3/base"
    a, b = draw(1, 2, 32), draw(2, 64, 2)
    values = np.concatenate([a.ravel(), b.ravel(), np.zeros(64, np.float32)])[None, None]
    folder = write(tmp_path / "a", [[0, 1, 2]], values)
    name = "model.layers.1.self_attn.qkv_proj.weight"
    got, before = merged(base, folder, tmp_path / "out")[name], load_file(base / "model.safetensors")[name]
    assert abs(got - before - b @ a).max() <= 1e-6 * abs(b @ a).max()
    back = convert(folder, "tensorrt-llm", output=tmp_path / "back", base=base).output
    assert np.array_equal(np.load(back / WEIGHTS), values[..., :192])
    with pytest.raises(FitError, match=r"no parameter 'model\.layers\.1\.self_attn\.qkv_proj\.weight'"):
        merge(BASE, folder, output=tmp_path / "x")
    gate = write(tmp_path / "b", [[5, 1, 2]], values)
    with pytest.raises(FitError, match=r"no parameter 'model\.layers\.1\.mlp\.gate_proj\.weight'"):
        merge(base, gate, output=tmp_path / "x")


def test_it_needs_a_base_to_be_another_format_and_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="only the base tells their sizes"):
        convert(HERE / "all", "peft", output=tmp_path / "a")
    peft = write_peft(tmp_path / "peft", {f"base_model.model.{k}": v for k, v in _pair("model.layers.0").items()})
    with pytest.raises(FitError, match="no names and no sizes"):
        convert(peft, "tensorrt-llm", output=tmp_path / "a")
    with pytest.raises(FitError, match="magnitudes that only a base's values tell"):
        convert(HERE / "dora", "tensorrt-llm", output=tmp_path / "a", base=BASE)


def _pair(layer: str) -> dict[str, np.ndarray]:
    module = f"{layer}.self_attn.q_proj"
    return {f"{module}.lora_A.weight": draw(1, 2, 32), f"{module}.lora_B.weight": draw(2, 32, 2)}


def test_what_it_cannot_hold_is_dropped_by_name(tmp_path: Path) -> None:
    tensors = {"lm_head.lora_A.weight": draw(3, 2, 32), "lm_head.lora_B.weight": draw(4, 24, 2)} | _pair(
        "model.layers.0"
    )
    peft = write_peft(tmp_path / "peft", {f"base_model.model.{k}": v for k, v in tensors.items()})
    with pytest.raises(FitError, match="no such module of a block"):
        convert(peft, "tensorrt-llm", output=tmp_path / "a", base=BASE)
    result = convert(peft, "tensorrt-llm", output=tmp_path / "a", base=BASE, allow_loss=True)
    assert sorted(entry.outcome for entry in result.entries) == ["dropped", "folded"]


def test_a_tower_for_images_is_not_taken_for_the_language_model(tmp_path: Path) -> None:
    tower, text = "model.vision_tower.vision_model.encoder.layers.0", "model.language_model.layers.0"
    shapes = {f"{layer}.self_attn.{n}_proj.weight": (32, 32) for layer in (tower, text) for n in "qk"}
    base = write_base(tmp_path / "base", shapes, {"model_type": "llava"})
    peft = write_peft(
        tmp_path / "peft", {f"base_model.model.{k}": v for at in (tower, text) for k, v in _pair(at).items()}
    )
    result = convert(peft, "tensorrt-llm", output=tmp_path / "a", base=base, allow_loss=True)
    assert {entry.site.rpartition(".self_attn")[0]: entry.outcome for entry in result.entries} == {
        tower: "dropped",
        text: "folded",
    }
    assert np.load(tmp_path / "a" / CONFIG).tolist() == [[[1, 0, 2, 0]]]


@pytest.mark.parametrize(
    ("rows", "values", "error", "said"),
    [
        (LINEAR, np.ones((1, 1, 127), np.float32), FitError, "has 127 values where 128 are needed"),
        (LINEAR, np.ones((1, 1, 129), np.float32), FitError, "more values than it needs"),
        (LINEAR, np.ones((1, 1, 128), np.int32), MalformedError, "is .1, 1, 128. of I32"),
        (LINEAR, np.ones((1, 128), np.float32), MalformedError, "is .1, 128. of F32"),
        (LINEAR, np.ones((1, 2, 128), np.float32), MalformedError, "not a row of int32 for each of 2 modules"),
        (LINEAR * 2, np.ones((1, 2, 128), np.float32), MalformedError, "a second row"),
        ([[14, 0, 2]], np.ones((1, 1, 128), np.float32), FitError, "of experts, and the file does not tell which"),
        ([[9, 0, 2]], np.ones((1, 1, 128), np.float32), FitError, "the attention to another text"),
        ([[99, 0, 2]], np.ones((1, 1, 128), np.float32), FitError, "has the number 99"),
        ([[1, -1, 2]], np.ones((1, 1, 128), np.float32), MalformedError, "none of TensorRT-LLM's"),
        ([[1, 0, 0]], np.ones((1, 1, 128), np.float32), MalformedError, "none of TensorRT-LLM's"),
        (LINEAR, np.full((1, 1, 128), np.nan, np.float32), FitError, "NaN or Inf"),
        ([[1, 7, 2]], np.ones((1, 1, 128), np.float32), FitError, "model.layers.7.self_attn.q_proj"),
    ],
)
def test_what_is_refused(
    rows: list[list[int]], values: np.ndarray, error: type[SurgeryError], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        merge(BASE, write(tmp_path / "a", rows, values), output=tmp_path / "out")


def test_another_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FitError, match=r"more values than it needs|where \d+ are needed|no parameter|lacks"):
        merge(llama(tmp_path / "other"), HERE / "half", output=tmp_path / "out")


def test_one_array_is_not_enough(tmp_path: Path) -> None:
    shutil.copytree(HERE / "half", tmp_path / "a")
    (tmp_path / "a" / CONFIG).unlink()
    assert not TENSORRT_LLM.detect(tmp_path / "a")
    for folder in (tmp_path / "a", tmp_path / "nothing"):
        with pytest.raises(NotFoundError):
            TENSORRT_LLM.read(folder)


def test_a_file_cut_short_is_never_read(tmp_path: Path) -> None:
    """What else may be wrong with an array is in ``tests/containers/test_npy.py``."""
    whole = (HERE / "ranks" / WEIGHTS).read_bytes()
    shutil.copytree(HERE / "ranks", tmp_path / "a")
    for size in (*range(140), len(whole) - 1):
        (tmp_path / "a" / WEIGHTS).write_bytes(whole[:size])
        with pytest.raises(MalformedError):
            TENSORRT_LLM.read(tmp_path / "a")


def test_a_wrong_scale_would_be_seen(tmp_path: Path) -> None:
    """The proof reads what was written: numbers that are a tenth too large do not pass."""
    from surgery_formats.adapters.tensorrt_llm import write as writer

    peft = write_peft(tmp_path / "peft", {f"base_model.model.{k}": v for k, v in _pair("model.layers.0").items()})
    honest = writer._loader
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_loader", lambda lora, width: lambda: honest(lora, width)() * 1.1)
        with pytest.raises(ProofError):
            convert(peft, "tensorrt-llm", output=tmp_path / "a", base=BASE)
