# SPDX-License-Identifier: Apache-2.0
"""Adapters of fused projections become adapters of their parts, and back, without loss: by logits of both models, and by bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file

import surgery
from surgery_formats.errors import FitError, ProofError
from tests.oracles import disk, models, peft_oracle
from tests.support.adapter_files import assert_close, draw, mlx_deltas, peft_deltas, write_peft

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A Phi-3 and the Llama that computes the same, as people rewrite it."""
    phi3 = models.build_base("phi3", tmp_path / "phi3")
    tensors = {}
    config = json.loads((phi3 / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    rows = [width * config["num_attention_heads"], *[width * config["num_key_value_heads"]] * 2]
    for name, value in disk.read_tensors(phi3).items():
        if "qkv_proj" in name:
            for part, piece in zip("qkv", value.split(rows), strict=True):
                tensors[name.replace("qkv_proj", f"{part}_proj")] = piece
        elif "gate_up_proj" in name:
            for part, piece in zip(("gate_proj", "up_proj"), value.chunk(2), strict=True):
                tensors[name.replace("gate_up_proj", part)] = piece
        else:
            tensors[name] = value
    llama = models.build_base("llama", tmp_path / "llama")
    for file in llama.glob("*.safetensors*"):
        file.unlink()
    disk.write_safetensors(llama / "model.safetensors", tensors)
    other = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**other, "rms_norm_eps": config["rms_norm_eps"]}))
    assert largest(logits("llama", llama) - logits("phi3", phi3)) < 1e-9
    return phi3, llama


def largest(values: torch.Tensor) -> float:
    return float(values.abs().max())


def logits(arch: str, base: Path, adapter: Path | None = None) -> torch.Tensor:
    model = models.load(arch, base, "float64")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).double().eval()
    return models.run(arch, model)


CASES: dict[str, dict[str, Any]] = {
    "lora": {"alpha_pattern": {"qkv_proj": 3}, "rank_pattern": {"gate_up_proj": 2}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "norms": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("base_of", ["phi3", "llama"])
@pytest.mark.parametrize("case", CASES)
def test_a_fused_adapter_runs_on_the_split_model(
    pair: tuple[Path, Path], tmp_path: Path, case: str, base_of: str
) -> None:
    """Attached and merged, whichever of the two models tells the heights."""
    phi3, llama = pair
    config = {"r": 4, "lora_alpha": 6, "target_modules": FUSED, **CASES[case]}
    peft_oracle.train("phi3", phi3, "LoraConfig", config, tmp_path / "a", seed=3)
    wanted = logits("phi3", phi3, tmp_path / "a")
    assert largest(wanted - logits("phi3", phi3)) > 1e-2
    base = phi3 if base_of == "phi3" else llama
    result = surgery.convert(tmp_path / "a", "peft", output=tmp_path / "b", base=base, projections="split")
    assert result.max_error == 0.0
    assert largest(logits("llama", llama, tmp_path / "b") - wanted) < 1e-9
    surgery.merge(llama, tmp_path / "b", output=tmp_path / "merged")
    assert largest(logits("llama", tmp_path / "merged") - wanted) < 2e-5
    surgery.convert(tmp_path / "b", "peft", output=tmp_path / "back", projections="fused")
    before, after = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("a", "back"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("targets", [SPLIT, ["q_proj", "v_proj", "up_proj"]], ids=["all", "some"])
@pytest.mark.parametrize(
    "config", [{}, {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"q_proj": 2}}], ids=["even", "uneven"]
)
def test_a_split_adapter_runs_on_the_fused_model(
    pair: tuple[Path, Path], tmp_path: Path, targets: list[str], config: dict[str, Any]
) -> None:
    phi3, llama = pair
    made = {"r": 4, "lora_alpha": 6, "target_modules": targets, **config}
    peft_oracle.train("llama", llama, "LoraConfig", made, tmp_path / "a", seed=3)
    wanted = logits("llama", llama, tmp_path / "a")
    surgery.convert(tmp_path / "a", "peft", output=tmp_path / "b", base=phi3, projections="fused")
    assert largest(logits("phi3", phi3, tmp_path / "b") - wanted) < (1e-9 if not config else 2e-6)
    surgery.merge(phi3, tmp_path / "b", output=tmp_path / "merged")
    assert largest(logits("phi3", tmp_path / "merged") - wanted) < 2e-5
    with pytest.raises(FitError, match="no parameter"):
        surgery.merge(phi3, tmp_path / "a", output=tmp_path / "no")


def test_other_formats_on_the_way(pair: tuple[Path, Path], tmp_path: Path) -> None:
    phi3, _ = pair
    config = {"r": 4, "lora_alpha": 6, "target_modules": FUSED}
    peft_oracle.train("phi3", phi3, "LoraConfig", config, tmp_path / "a", seed=3)
    surgery.convert(tmp_path / "a", "mlx", output=tmp_path / "m", base=phi3, projections="split")
    surgery.convert(tmp_path / "a", "peft", output=tmp_path / "p", base=phi3, projections="split")
    assert_close(mlx_deltas(tmp_path / "m"), peft_deltas(tmp_path / "p"))
    surgery.convert(tmp_path / "m", "peft", output=tmp_path / "back", projections="fused")
    assert_close(peft_deltas(tmp_path / "back"), peft_deltas(tmp_path / "a"))


def test_what_cannot_be_told_or_done_is_said(tmp_path: Path) -> None:
    stem = "base_model.model.model.layers.0.self_attn"
    fused = write_peft(
        tmp_path / "f",
        {f"{stem}.qkv_proj.lora_A.weight": draw(1, 2, 8), f"{stem}.qkv_proj.lora_B.weight": draw(2, 12, 2)},
        r=2,
    )
    with pytest.raises(FitError, match="how many rows") as caught:
        surgery.convert(fused, "peft", output=tmp_path / "x", projections="split")
    assert "`base=`" in str(caught.value)
    with pytest.raises(FitError, match="nothing to be fused"):
        surgery.convert(fused, "peft", output=tmp_path / "x", projections="fused")
    with pytest.raises(FitError, match="no layout"):
        surgery.convert(fused, "peft", output=tmp_path / "x", projections="shuffled")
    gate = {f"base_model.model.model.layers.0.mlp.gate_up_proj.lora_{x}.weight": draw(i, *shape)
            for i, (x, shape) in enumerate((("A", (2, 8)), ("B", (12, 2))))}  # fmt: skip
    surgery.convert(write_peft(tmp_path / "g", gate, r=2), "peft", output=tmp_path / "h", projections="split")
    assert [value.shape for value in peft_deltas(tmp_path / "h").values()] == [(6, 8), (6, 8)]  # halves need no base


def test_rows_in_a_wrong_order_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof goes back to the given names, and so does not trust the cut."""
    gate = {f"base_model.model.model.layers.0.mlp.gate_up_proj.lora_{x}.weight": draw(i, *shape)
            for i, (x, shape) in enumerate((("A", (2, 8)), ("B", (12, 2))))}  # fmt: skip
    source = write_peft(tmp_path / "g", gate, r=2)
    from surgery.algebra import projections as room

    honest = room.cut_rows

    def swapped(update: Any, site: Any, start: int, stop: int, file: Path) -> Any:
        return honest(update, site, (start + 6) % 12, (start + 6) % 12 + stop - start, file)

    monkeypatch.setattr(room, "cut_rows", swapped)
    with pytest.raises(ProofError):
        surgery.convert(source, "peft", output=tmp_path / "h", projections="split")
    assert not (tmp_path / "h").exists()
