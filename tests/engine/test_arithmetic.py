# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a weight: the same on numpy and on torch, and refused where a value has no place in the stored type."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from surgery.engine.arithmetic import compute
from surgery.engine.merge.merge_plan import planned_merge
from surgery.engine.plan import Compute
from surgery_formats.errors import FitError
from tests.support.kit import make_base, make_lora

TORCH = "cpu:0"  # torch's own name for the CPU stands in for a GPU


def computed(base: Path, lora: Path, dtype: str, device: str) -> dict[str, tuple[np.ndarray, object]]:
    """Values and measurements by tensor."""
    _, plan = planned_merge(str(base), ((str(lora), 1.0),), dtype, None, "keep")
    found = {}
    for tensor in plan.computed():
        assert isinstance(tensor.step, Compute)
        parts: list[bytes] = []
        (measured,) = compute(
            tensor.label, tensor.step, lambda _, at, raw, to=parts: to.append(bytes(raw)), lambda: False, device
        )
        found[tensor.label] = np.frombuffer(b"".join(parts), tensor.dtype.numpy).astype(np.float64), measured
    return found


@pytest.mark.parametrize("elements", [1, 100, 1 << 19])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_numpy_and_torch_compute_the_same(
    dtype: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.engine.blocks.BLOCK_ELEMENTS", elements)
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora", 0.02)
    mine, theirs = (computed(base, lora, dtype, device) for device in ("cpu", TORCH))
    spacing = {"bf16": 2.0**-7, "fp16": 2.0**-10, "fp32": 2.0**-22}[dtype]
    assert mine.keys() == theirs.keys()
    for name, (values, measured) in mine.items():
        other, beside = theirs[name]
        assert abs(values - other).max() <= spacing * abs(other).max()
        assert (values != other).mean() < (0.5 if dtype == "fp32" else 0.002)
        assert (measured.changed, measured.sampled) == (beside.changed, beside.sampled)
        assert measured.survival == pytest.approx(beside.survival, rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("dtype", ["keep", "fp16"])
def test_blocks_that_are_computed_together_are_measured_as_those_one_by_one(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.engine.blocks.BLOCK_ELEMENTS", 100)
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora", 0.02)
    _, plan = planned_merge(str(base), ((str(lora), 1.0),), dtype, None, "keep")
    counts: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        for tensor in plan.computed():
            assert isinstance(tensor.step, Compute)
            written: list[list[tuple[int, int, bytes]]] = [[], []]
            measured = [
                compute(
                    tensor.label,
                    tensor.step,
                    lambda part, at, raw, to=to: to.append((part, at, bytes(raw))),
                    lambda: False,
                    blocks=together,
                )
                for together, to in zip((None, pool), written, strict=True)
            ]
            counts.append(len(written[0]))
            assert written[0] == written[1]
            assert measured[0] == measured[1]
    assert max(counts) > 10, "more blocks than are ahead"


@pytest.mark.parametrize("device", ["cpu", TORCH])
@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (65000.0, "fp16", r"a value of 6\.\d+e\+04 does not fit F16"),
        (1e30, "fp16", r"a value of 1e\+30 does not fit F16"),
        (float("nan"), "bf16", "a value is nan"),
        (float("-inf"), "fp32", "a value is inf"),
    ],
)
def test_a_value_without_a_place_in_the_stored_type_is_named(
    value: float, dtype: str, message: str, device: str, tmp_path: Path
) -> None:
    weight = torch.zeros(32, 32)
    weight[3] = value
    name = "model.layers.0.self_attn.q_proj.weight"
    base = make_base(tmp_path / "base", torch.float32, **{name: weight})
    lora = make_lora(tmp_path / "lora", 100.0 if value == 65000.0 else 0.1)
    with pytest.raises(FitError, match=message):
        computed(base, lora, dtype, device)


@pytest.mark.parametrize("device", ["cpu", TORCH])
def test_the_largest_values_of_a_type_are_stored(device: str, tmp_path: Path) -> None:
    """Their squares overflow, so that the quick check cannot tell, and each value is looked at."""
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = torch.full((32, 32), 3e38)
    base = make_base(tmp_path / "base", torch.float32, **{name: weight})
    found = computed(base, make_lora(tmp_path / "lora"), "bf16", device)
    assert found[name][0].max() == pytest.approx(3e38, rel=0.01)


@pytest.mark.parametrize("scale", [1e21, 1e36])
def test_a_great_update_is_measured_though_its_squares_overflow(
    scale: float, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    base, lora = make_base(tmp_path / "base", torch.float32), make_lora(tmp_path / "lora", scale)
    records = [measured for _, measured in computed(base, lora, "bf16", "cpu").values()]
    assert np.isfinite([(record.update, record.stored, record.noise) for record in records]).all()
    assert max(record.update for record in records) > (scale / 100) ** 2
    assert all(record.survival == pytest.approx(1, abs=0.01) for record in records if record.update)
    assert not recwarn.list


@pytest.mark.filterwarnings("error")
def test_an_update_that_overflows_is_refused_without_numpy_s_warnings(tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora", 1e38)
    with pytest.raises(FitError, match=r"after the update a value is (inf|nan)"):
        computed(base, lora, "fp32", "cpu")
