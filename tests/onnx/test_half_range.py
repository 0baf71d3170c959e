# SPDX-License-Identifier: Apache-2.0
"""float16 overflows loudly: at export by weights, and by values on a text; in `verify` by logits that are not finite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import surgery
from surgery.onnx.export import half_range
from surgery.onnx.export.half_range import Converted, load_cost, too_large
from surgery.reference.stored import watched
from surgery_formats.errors import NotFoundError, ProofError
from surgery_formats.files.raw import open_file

ROOT = Path(__file__).resolve().parents[2]
_GAIN, _DOWN, _UP = (
    f"model.layers.1.{name}.weight" for name in ("post_feedforward_layernorm", "mlp.down_proj", "mlp.up_proj")
)


def write_gemma(folder: Path, changed: dict[str, float]) -> Path:
    """A tiny random Gemma 3 in bf16; gains named are filled with the value, of other parameters the first element is set."""
    config = Gemma3TextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, sliding_window=8, query_pre_attn_scalar=8,
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
        for name, value in changed.items():
            parameter = model.get_parameter(name)
            (parameter if parameter.ndim == 1 else parameter[0, :1]).fill_(value)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def exported(tmp_path: Path, dtype: str, changed: dict[str, float], target: str = "portable") -> surgery.ExportResult:
    base = write_gemma(tmp_path / "base", changed)
    return surgery.export_onnx(base, output=tmp_path / "out", target=target, dtype=dtype, range_text="words")


@pytest.mark.parametrize("target", ["portable", "cuda"])
def test_values_beyond_float16_are_told_at_export_and_refused_by_verify(tmp_path: Path, target: str) -> None:
    (warning,) = exported(tmp_path, "fp16", {_GAIN: 6e4}, target).warnings
    assert "fp16 ends at 65,504" in warning
    assert "layers.1." in warning
    with pytest.raises(ProofError, match=r"not finite in fp16: values of the result of .*post_feedforward_layernorm"):
        surgery.verify(tmp_path / "out", against=tmp_path / "base")


def test_the_same_values_are_right_in_bfloat16(tmp_path: Path) -> None:
    assert exported(tmp_path, "bf16", {_GAIN: 6e4}).warnings == ()
    surgery.verify(tmp_path / "out", against=tmp_path / "base")


def test_a_weight_beyond_float16_is_named(tmp_path: Path) -> None:
    warnings = exported(tmp_path, "fp16", {_DOWN: 1e6}).warnings
    assert any("beyond 65,504" in one and _DOWN in one for one in warnings)
    with pytest.raises(ProofError, match=f"not finite in fp16: values of {_DOWN}"):
        surgery.verify(tmp_path / "out", against=tmp_path / "base")


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    warnings = exported(tmp_path, "fp16", {_UP: float("nan")}).warnings
    assert any("one weight holds NaN or Inf" in one and "up_proj" in one for one in warnings)
    assert any(f"not finite, first those of {_UP}" in one for one in warnings)
    with pytest.raises(ProofError, match=f"logits are not finite: the first values that are not are those of {_UP}"):
        surgery.verify(tmp_path / "out", against=tmp_path / "base")


def test_verify_says_how_large_the_values_of_a_graph_of_float16_get(tmp_path: Path) -> None:
    assert exported(tmp_path, "fp16", {}).warnings == ()
    checks = {check.name: check.detail for check in surgery.verify(tmp_path / "out", against=tmp_path / "base").checks}
    assert checks["range"].endswith("fp16 ends at 65,504")


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    base = write_gemma(tmp_path / "base", {})
    (warning,) = surgery.export_onnx(base, output=tmp_path / "out", target="portable", dtype="fp16").warnings
    assert "may not fit fp16" in warning
    assert surgery.export_onnx(base, output=tmp_path / "other", target="portable", dtype="bf16").warnings == ()


def test_values_are_measured_on_a_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The following methods are")
    result = surgery.export_onnx(
        ROOT / "examples" / "base",
        output=tmp_path / "out",
        target="portable",
        dtype="fp16",
        range_text=str(tmp_path / "text"),
    )
    assert result.warnings == ()
    assert "fp16 ends at 65,504" in str(result.summary())


def test_what_was_measured_is_said_of_every_type(tmp_path: Path) -> None:
    result = surgery.export_onnx(ROOT / "examples" / "base", output=tmp_path / "out", range_text="words")
    assert result.contract.dtype == "fp32"
    assert result.value_range.endswith("); fp16 ends at 65,504, fp32 far beyond")
    assert result.as_json()["range"] == result.value_range


def test_a_text_that_is_not_there_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        surgery.export_onnx(
            ROOT / "examples" / "base",
            output=tmp_path / "out",
            dtype="fp16",
            target="portable",
            range_text=str(tmp_path / "text"),
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [65504.0, 65519.0, 65520.0, -65536.0, -7e4, np.inf, -np.inf, np.nan, -0.0])
def test_what_float16_makes_infinite_is_told_by_bits(tmp_path: Path, stored: str, value: float) -> None:
    import ml_dtypes  # gives numpy the type

    values = np.array([0.5, value, -1.0, 2.0]).astype(getattr(ml_dtypes, stored, np.float32))
    (tmp_path / "w").write_bytes(values.tobytes())
    with np.errstate(over="ignore"):
        fits = bool(np.isfinite(values.astype(np.float32).astype(np.float16)).all())
    warnings = too_large(
        [Converted("w", open_file(tmp_path / "w"), 0, values.nbytes, 1 if stored == "float32" else 16, 10)]
    )
    assert bool(warnings) is not fits
    assert all(("NaN or Inf" in warning) == (not np.isfinite(value)) for warning in warnings)


def test_what_loading_costs_is_told_of_large_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w").touch()
    some = [Converted("w", open_file(tmp_path / "w"), 0, 64 << 20, 16, 10)]
    assert load_cost(some) == ""
    assert "of bf16 for fp16 are converted at each load" in load_cost(some * 2)
    monkeypatch.setattr(half_range, "_WORTH_TELLING", 1)
    assert any("converted at each load" in warning for warning in exported(tmp_path, "fp16", {}).warnings)


def test_nothing_is_watched_or_rounded_outside(tmp_path: Path) -> None:
    from surgery.reference import forward, open_reference

    reference = open_reference(surgery.open(write_gemma(tmp_path, {})).main)
    ids = torch.tensor([[5, 7, 9]])
    plain = forward(reference, ids).logits
    with watched(torch.float16) as seen:
        rounded = forward(reference, ids).logits
    assert torch.equal(forward(reference, ids).logits, plain)
    assert not torch.equal(rounded, plain)
    assert seen.largest >= float(rounded.abs().max())
    assert torch.equal(rounded, rounded.half().float())
