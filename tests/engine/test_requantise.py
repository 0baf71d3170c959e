# SPDX-License-Identifier: Apache-2.0
"""A merge that keeps a quantised format: which codes move, what is said of it, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.engine import blocks
from surgery_formats.arrays import as_torch
from surgery_formats.errors import FitError, NothingChangedError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.base import read_rows
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.testing.plugins import installed
from tests.support.kit import ROOT, make_base, make_lora
from tests.support.quantised_folders import quantise_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "toy_storage"))
from toy_storage import CODES, SCALES, ToyWeight, quantised  # a package of its own


@dataclass(frozen=True, slots=True)
class Turned(ToyWeight):
    """A toy weight whose rows are inputs."""

    transposed = True

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.shape[::-1]


class Storage:
    name, title = "toy", "for tests"

    def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[ToyWeight]:
        kind = Turned if config.get("turned") else ToyWeight
        for name in tensors:
            if name.endswith(CODES):
                weight = name.removesuffix(CODES)
                yield kind(weight, tensors[name], tensors[weight + SCALES])


@pytest.fixture(autouse=True)
def storage() -> Iterator[None]:
    with installed("surgery.storages", "toy", Storage()):
        yield


def quantise(folder: Path, *, turned: bool, band: int = 1) -> Path:
    make_base(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        values = tensors.pop(name).float().numpy()
        values = np.ascontiguousarray(values.T) if turned else values
        codes, scales, _ = quantised(values, len(values) // band, 2)
        tensors |= {name + CODES: as_torch(codes).contiguous(), name + SCALES: as_torch(scales).contiguous()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "turned": turned}))
    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Every logical weight, float64."""
    return {
        name: np.asarray(read_rows(one.storage), np.float64)
        for name, one in open_checkpoint(folder).main.parameters.items()
    }


def deltas(lora: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every update, and the inputs it listens to."""
    factors = load_file(lora / "adapter_model.safetensors")
    config = json.loads((lora / "adapter_config.json").read_text())
    found = {}
    for key in factors:
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            A, B = factors[key].double().numpy(), factors[f"{stem}.lora_B.weight"].double().numpy()
            name = f"{stem.removeprefix('base_model.model.')}.weight"
            found[name] = config["lora_alpha"] / config["r"] * B @ A, np.linalg.qr(A.T)[0].T
    assert found
    return found


@pytest.mark.parametrize("band", [1, 4])
@pytest.mark.parametrize("turned", [False, True])
def test_small_updates_survive_with_feedback_where_nearest_loses_them(turned: bool, band: int, tmp_path: Path) -> None:
    base, lora = quantise(tmp_path / "base", turned=turned, band=band), make_lora(tmp_path / "lora", strength=0.01)
    before, missing = weights(base), {}
    for rounding in ("nearest", "feedback"):
        surgery.merge(
            base, lora, output=tmp_path / rounding, quantized="requantize", rounding=rounding, accept_loss=True
        )
        after = weights(tmp_path / rounding)
        left = sum(
            float((((after[name] - before[name] - delta) @ basis.T) ** 2).sum())
            for name, (delta, basis) in deltas(lora).items()
        )
        missing[rounding] = left / sum(float((delta**2).sum()) for delta, _ in deltas(lora).values())
    assert missing["nearest"] > 0.3
    assert missing["feedback"] < 0.4 * missing["nearest"]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.03])
def test_the_account_is_what_the_files_hold(turned: bool, strength: float, tmp_path: Path) -> None:
    base, lora = quantise(tmp_path / "base", turned=turned), make_lora(tmp_path / "lora", strength=strength)
    result = surgery.merge(base, lora, output=tmp_path / "out", quantized="requantize")
    before, after = weights(base), weights(tmp_path / "out")
    sums = np.zeros(4)
    for name, (delta, basis) in deltas(lora).items():
        change = after[name] - before[name]
        account = result.as_json()["ledger"]["tensors"][name + CODES]["codes"]
        cosine = (change * delta).sum() / np.linalg.norm(change) / np.linalg.norm(delta)
        inside = np.linalg.norm((change - delta) @ basis.T) / np.linalg.norm(delta)
        assert account["correlation"] == pytest.approx(cosine, abs=1e-4)
        assert account["inside"]["error"] == pytest.approx(inside, abs=1e-4)
        codes = [load_file(folder / "model.safetensors")[name + CODES] for folder in (base, tmp_path / "out")]
        moved = [((one ^ other) & mask != 0).float().mean() for one, other in [codes] for mask in (15, 240)]
        assert account["moved"] == pytest.approx(float(sum(moved)) / 2, abs=1e-6)
        sums += [(delta**2).sum(), (change * delta).sum(), ((change - delta) ** 2).sum(), 1]
    whole = result.as_json()["ledger"]["requantised"]
    assert (whole["weights"], whole["survival"]) == (sums[3], pytest.approx(sums[1] / sums[0], abs=1e-4))
    assert whole["error"] == pytest.approx(np.sqrt(sums[2] / sums[0]), abs=1e-4)
    manifest = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())
    assert manifest["ledger"]["requantised"] == whole


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
def test_the_bytes_do_not_depend_on_workers_or_blocks(
    turned: bool, rounding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora = quantise(tmp_path / "base", turned=turned, band=4), make_lora(tmp_path / "lora", strength=0.03)
    for workers, elements in ((1, 1 << 19), (4, 1 << 19), (2, 64)):
        monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)
        out = tmp_path / f"{workers}"
        surgery.merge(base, lora, output=out, quantized="requantize", rounding=rounding, workers=workers)
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "1" / "model.safetensors").read_bytes()


def test_codes_that_do_not_hold_the_update_are_refused_by_name(tmp_path: Path) -> None:
    base, lora = quantise(tmp_path / "base", turned=False), make_lora(tmp_path / "lora", strength=0.01)
    with pytest.raises(
        NothingChangedError, match=r"only \d+% of the update is in the codes.*no merge.*_proj"
    ) as refused:
        surgery.merge(base, lora, output=tmp_path / "out", quantized="requantize", rounding="nearest")
    assert "accept_loss=True" in str(refused.value.hint)
    assert not (tmp_path / "out").exists()
    result = surgery.merge(
        base, lora, output=tmp_path / "out", quantized="requantize", rounding="nearest", accept_loss=True
    )
    assert any("of the update is in the codes" in warning for warning in result.warnings)


@pytest.mark.parametrize("turned", [False, True])
def test_an_adapter_without_input_space_is_rounded_to_nearest(turned: bool, tmp_path: Path) -> None:
    base, saved = quantise(tmp_path / "base", turned=turned), make_lora(tmp_path / "saved", modules_to_save=["o_proj"])
    factors = load_file(saved / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    trained = torch.randn(weights(base)[name].shape)
    save_file({**factors, f"base_model.model.{name}": trained}, saved / "adapter_model.safetensors")
    surgery.merge(base, saved, output=tmp_path / "out", quantized="requantize")
    stored = trained.numpy().T if turned else trained.numpy()
    _, _, best = quantised(stored, len(stored), 2)
    found = weights(tmp_path / "out")[name]
    assert np.array_equal(found, np.asarray(best.T if turned else best, np.float64))


def test_options_that_contradict_each_other_are_refused() -> None:
    for options, found in (
        ({"quantized": "never"}, "quantized is one of"),
        ({"quantized": "requantize", "rounding": "up"}, "rounding is one of"),
        ({"quantized": "requantize", "only_touched": True}, "computed anyway"),
        ({"rounding": "nearest"}, "alone"),
    ):
        with pytest.raises(FitError, match=found):
            surgery.merge("base", "lora", output="out", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("turned", [False, True])
def test_a_dequantised_weight_lies_as_the_model_has_it(turned: bool, tmp_path: Path) -> None:
    base, lora = quantise(tmp_path / "base", turned=turned), make_lora(tmp_path / "lora")
    surgery.merge(base, lora, output=tmp_path / "out", dtype="fp32")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    wanted = weights(base)
    for name, (delta, _) in deltas(lora).items():
        wanted[name] = wanted[name] + delta
    for name, values in wanted.items():
        assert np.allclose(merged[name].numpy(), values, atol=1e-5), name


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("raw", [False, True])
def test_errors_are_made_up_for_along_the_inputs_of_a_calibration(turned: bool, raw: bool, tmp_path: Path) -> None:
    base, lora = quantise(tmp_path / "base", turned=turned), make_lora(tmp_path / "lora", strength=0.1)
    before, generator = weights(base), np.random.default_rng(0)
    inputs = {name: generator.normal(size=(400, 3)) @ generator.normal(size=(3, 32)) for name in deltas(lora)}
    parts = {
        f"{name.removesuffix('.weight')}.{'activations' if raw else 'gram'}": x if raw else x.T @ x / len(x)
        for name, x in inputs.items()
    }
    save_file(
        {key: torch.from_numpy(value).float().contiguous() for key, value in parts.items()},
        tmp_path / "inputs.safetensors",
    )
    off = {}
    for name, given in (("without", None), ("with", tmp_path / "inputs.safetensors")):
        surgery.merge(base, lora, output=tmp_path / name, quantized="requantize", calibration=given)
        after = weights(tmp_path / name)
        off[name] = sum(
            float((((after[each] - before[each] - delta) @ inputs[each].T) ** 2).sum())
            for each, (delta, _) in deltas(lora).items()
        )
    assert off["with"] < 0.4 * off["without"]


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    base, lora = quantise(tmp_path / "base", turned=False), make_lora(tmp_path / "lora")
    module = "model.layers.0.self_attn.q_proj"
    for name, size, found in ((module, 31, "31 inputs of a module that has 32"), (module + "s", 32, "the model lacks")):
        save_file({f"{name}.gram": torch.eye(size)}, tmp_path / "inputs.safetensors")
        with pytest.raises(FitError, match=found):
            surgery.merge(
                base, lora, output=tmp_path / "out", quantized="requantize", calibration=tmp_path / "inputs.safetensors"
            )
    with pytest.raises(FitError, match="feedback alone"):
        surgery.merge(base, lora, output=tmp_path / "out", calibration=tmp_path / "inputs.safetensors")


def test_scales_in_which_the_greatest_values_would_be_cut_off_are_chosen_anew(tmp_path: Path) -> None:
    """A row's greatest value is at the end of int8's grid: an update moves some of them beyond."""
    base = quantise_folder(ROOT / "examples" / "base", tmp_path / "base", "int8")
    lora = ROOT / "examples" / "lora"
    surgery.merge(base, lora, output=tmp_path / "out", quantized="requantize")
    before, after, left, update, fitted = weights(base), weights(tmp_path / "out"), 0.0, 0.0, 0.0
    for name, (delta, _) in deltas(lora).items():
        wanted = before[name] + delta
        scale = abs(wanted).max(1, keepdims=True) / 127
        left += float(((after[name] - wanted) ** 2).sum())
        fitted += float(((np.round(wanted / scale) * scale - wanted) ** 2).sum())
        update += float((delta**2).sum())
    assert left <= 1.1 * fitted < 0.04**2 * update
