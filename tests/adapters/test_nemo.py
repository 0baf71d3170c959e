# SPDX-License-Identifier: Apache-2.0
"""NeMo's archives: merged, they are what its fused layers compute; all else is refused by its name."""

from __future__ import annotations

import gzip
import io
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from surgery import convert, formats, merge, resize
from surgery_formats.adapters.nemo import NEMO
from surgery_formats.adapters.nemo.config import plain_values
from surgery_formats.adapters.registry import format_at, read_adapter
from surgery_formats.errors import FitError, MalformedError, SurgeryError
from surgery_formats.testing.format import FORMAT_CHECKS, FormatCase
from tests.support.adapter_files import GOLDEN, assert_expected, draw, merged, write_base

HERE = GOLDEN / "nemo"
BASE = GOLDEN / "litgpt/base"
CASES = ("fused", "canonical", "qkv")
QKV = "model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter"
SETTINGS = """\
hidden_size: 32
ffn_hidden_size: 48
num_attention_heads: 4
num_query_groups: 2
kv_channels: null
peft:
  peft_scheme: lora
  lora_tuning:
    adapter_dim: 2
    alpha: 6
    weight_tying: false
"""


def pack(path: Path, files: Mapping[str, bytes], mode: str = "w:", **options: Any) -> Path:
    with tarfile.open(path, mode, **options) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def saved(tensors: Mapping[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, stream)
    return stream.getvalue()


def pair(stem: str = QKV, out: int = 64, inputs: int = 32, rank: int = 2) -> dict[str, np.ndarray]:
    return {f"{stem}.linear_in.weight": draw(1, rank, inputs), f"{stem}.linear_out.weight": draw(2, out, rank)}


def write(path: Path, tensors: Mapping[str, np.ndarray], settings: str = SETTINGS) -> Path:
    return pack(path / "a.nemo", {"./model_config.yaml": settings.encode(), "./model_weights.ckpt": saved(tensors)})


@pytest.mark.parametrize("name", CASES)
def test_merges_to_what_the_fused_layers_compute(name: str, tmp_path: Path) -> None:
    file = HERE / name / "adapter.nemo"
    assert format_at(file) is NEMO
    assert read_adapter(file).unconsumed() == ()
    assert_expected(BASE, merged(BASE, file, tmp_path / "out"), HERE / name / "expected.safetensors")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", ["peft", "mlx"])
def test_as_another_format_it_does_the_same(name: str, target: str, tmp_path: Path) -> None:
    assert convert(HERE / name / "adapter.nemo", target, output=tmp_path / "to").max_error <= 1e-6
    assert_expected(BASE, merged(BASE, tmp_path / "to", tmp_path / "out"), HERE / name / "expected.safetensors")


def test_before_megatron_core_every_head_has_a_key_of_its_own(tmp_path: Path) -> None:
    """``query_key_value`` gives ``(heads, 3, size)``, as megatron's ``ParallelAttention`` views it."""
    prefix = "model.language_model.encoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter"
    settings = SETTINGS.replace("num_query_groups: 2\n", "").replace("    alpha: 6\n", "")
    tensors = pair(prefix, 96)
    shapes = {f"model.layers.0.self_attn.{n}_proj.weight": (32, 32) for n in "qkv"}
    base = write_base(tmp_path / "base", shapes, {"model_type": "llama"})
    got, before = (
        merged(base, write(tmp_path, tensors, settings), tmp_path / "out"),
        load_file(base / "model.safetensors"),
    )
    delta = (tensors[f"{prefix}.linear_out.weight"] @ tensors[f"{prefix}.linear_in.weight"]).reshape(4, 3, 8, 32)
    for number, part in enumerate("qkv"):
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        assert np.allclose(got[name] - before[name], delta[:, number].reshape(32, 32), atol=1e-5)
    with pytest.raises(FitError, match="heads share keys"):
        read_adapter(write(tmp_path, pair(prefix)))


def test_alpha_is_stated_absent_or_asked_for(tmp_path: Path) -> None:
    def scale(settings: str, alpha: float | None = None) -> float:
        chain = next(iter(read_adapter(write(tmp_path, pair(), settings), alpha).updates.values()))
        return float(chain[0].scale or 0)

    assert scale(SETTINGS) == 3.0
    assert scale(SETTINGS.replace("    alpha: 6\n", "")) == 1.0  # of versions that had none
    assert scale(SETTINGS.replace("alpha: 6", "alpha: null")) == 1.0
    assert scale(SETTINGS.replace("alpha: 6", "alpha: ${.adapter_dim}")) == 1.0
    with pytest.raises(FitError, match="the scale of its LoRAs is not in its file"):
        scale(SETTINGS.replace("alpha: 6", "alpha: ${my.alpha}"))
    assert scale(SETTINGS.replace("alpha: 6", "alpha: ${my.alpha}"), 8.0) == 4.0
    with pytest.raises(FitError, match="says otherwise"):
        scale(SETTINGS, 8.0)


@pytest.mark.parametrize(
    ("tensors", "settings", "error", "said"),
    [
        (pair(), SETTINGS.replace("adapter_dim: 2", "adapter_dim: 3"), FitError, "the rank is 3"),
        (pair(), SETTINGS.replace("    adapter_dim: 2\n", ""), FitError, "does not tell peft.lora_tuning.adapter_dim"),
        (
            pair(),
            SETTINGS.replace("num_attention_heads: 4", "num_attention_heads: x"),
            FitError,
            "does not tell num_att",
        ),
        (pair(), SETTINGS.replace("num_query_groups: 2", "num_query_groups: 3"), FitError, "4 heads in 3 groups"),
        (pair(), SETTINGS.replace("weight_tying: false", "weight_tying: true"), FitError, "share one LoRA"),
        (
            pair(),
            SETTINGS.replace("adapter_dim: 2", "adapter_dim: 02"),
            FitError,
            "does not tell peft.lora_tuning.adap",
        ),
        (pair(), SETTINGS.replace("alpha: 6", "alpha: 010"), FitError, "not in its file: its alpha is '010'"),
        (
            pair("model.decoder.layers.0.mlp.adapter_layer.lora_hto4h_adapter", 48),
            SETTINGS + "activation: swiglu\n",
            FitError,
            "an activation 'swiglu' takes two",
        ),
        (pair(), SETTINGS + "megatron_legacy: true\n", FitError, "Megatron before 2021"),
        (pair(), SETTINGS + "hidden_size: 8\n", MalformedError, "appears twice"),
        (pair(out=63), SETTINGS, FitError, "not the 64 rows of q, k and v"),
        (pair(QKV.replace("lora_kqv", "lora_other")), SETTINGS, FitError, "no adapter that is read"),
        (
            pair("model.decoder.layers.0.mlp.adapter_layer.lora_hto4h_adapter", 50),
            SETTINGS,
            FitError,
            "neither 48 rows",
        ),
        (pair("model.encoder.layers.0.x.adapter_layer.lora_kqv_adapter"), SETTINGS, FitError, "no factor of a LoRA"),
        ({"model.embedding.weight": draw(1, 4, 4)}, SETTINGS, FitError, "no factor of a LoRA"),
        (dict([next(iter(pair().items()))]), SETTINGS, MalformedError, "without its linear_out"),
        (pair() | pair(QKV.replace("decoder", "module.decoder")), SETTINGS, MalformedError, "a second factor"),
        ({}, SETTINGS, FitError, "no adapter in its weights"),
    ],
)
def test_what_is_refused(
    tensors: dict[str, np.ndarray], settings: str, error: type[SurgeryError], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        NEMO.read(write(tmp_path, tensors, settings))


def test_other_archives_are_refused_by_name(tmp_path: Path) -> None:
    settings, path = {"model_config.yaml": SETTINGS.encode()}, tmp_path / "a.nemo"
    for files, said in (
        ({**settings, "model_weights/.metadata": b"x"}, "a distributed checkpoint"),
        ({**settings, "mp_rank_00/model_weights.ckpt": b"x", "mp_rank_01/model_weights.ckpt": b"y"}, "several ranks"),
        (settings, "no model_weights.ckpt in it, but nothing else"),
        ({"model_weights.ckpt": b"x"}, "no model_config.yaml"),
        ({**settings, "model_weights.ckpt": b"not torch"}, "not a torch checkpoint"),
    ):
        with pytest.raises((FitError, MalformedError), match=said):
            NEMO.read(pack(path, files))
    path.write_bytes(gzip.compress(bytes(2000)))
    assert NEMO.detect(path)
    with pytest.raises(FitError, match="compressed"):
        merge(BASE, path, output=tmp_path / "out")
    assert NEMO.render(read_adapter(HERE / "qkv/adapter.nemo"), None).tensors == ()


@pytest.mark.parametrize(
    "path", ["nemo/fused/adapter.nemo", "mlx/llama/npz/adapters.npz", "keras/llama/lora/adapter.lora.h5"]
)
def test_files_of_other_programs_are_no_models(path: str, tmp_path: Path) -> None:
    with pytest.raises(FitError, match="an adapter where a full model was expected"):
        merge(GOLDEN / path, HERE / "fused/adapter.nemo", output=tmp_path / "out")


def test_an_archive_cut_short_is_never_read(tmp_path: Path) -> None:
    """What else may be wrong with an archive is in ``tests/containers/test_tar.py``."""
    whole = (HERE / "qkv/adapter.nemo").read_bytes()
    for size in (0, 100, 511, 512, 600, 1200, 2000, len(whole) - 11000):
        (tmp_path / "a.nemo").write_bytes(whole[:size])
        with pytest.raises(MalformedError):
            NEMO.read(tmp_path / "a.nemo")


def test_what_continues_a_text_is_no_value() -> None:
    text = "a: |\n  hidden_size: 3\nb:\n- hidden_size: 4\n  x: 1\n- x: 2\nhidden_size: 5\nc:\n    d: 'e'\n  f: 1\n"
    found = plain_values(text, Path("x"))
    assert found["hidden_size"] == "5"
    assert found["c.d"] == "e"
    assert found["a.hidden_size"] == "3"


def test_what_lies_below_a_strange_key_is_not_of_the_key_before() -> None:
    text = "peft:\n  x: 1\n# of PEFT's own\n7:\n  alpha: 9\n'peft.beta': 8\n'tail':\n  'alpha': 2\n"
    assert plain_values(text, Path("x")) == {"peft.x": "1", "[3].alpha": "9", "tail.alpha": "2"}


def test_a_configuration_of_any_form_is_read_in_the_time_of_its_size() -> None:
    """A value with a gap, a long name with many lines below it, and lines ever deeper."""
    gap = "a: b" + " " * 60_000 + "c\n"
    wide = "w" * 400_000 + ":\n" + " b: 1\n" * 80_000
    deep = "".join(" " * at + "d" * 64 + ":\n" for at in range(1300))
    start = time.process_time()
    assert plain_values(gap, Path("x"))["a"].endswith(" c")
    assert plain_values(deep + gap, Path("x")).keys() == {"a"}
    with pytest.raises(MalformedError, match="appears twice"):
        plain_values(wide, Path("x"))
    assert time.process_time() - start < 5


@pytest.mark.parametrize("check", FORMAT_CHECKS, ids=lambda check: check.__name__)
def test_a_format_that_is_only_read_conforms(check: Any, tmp_path: Path) -> None:
    check(FormatCase(NEMO, lambda folder: HERE / "qkv/adapter.nemo"), tmp_path)


def test_it_is_said_to_be_only_read(tmp_path: Path) -> None:
    for verb in (
        lambda: convert(GOLDEN / "gguf/llama/lora/peft", "nemo", output=tmp_path / "x.nemo"),
        lambda: resize(HERE / "qkv/adapter.nemo", output=tmp_path / "x.nemo", rank=1),
    ):
        with pytest.raises(FitError, match=r"^nemo is only read: a \.nemo describes its whole model; choose another"):
            verb()
    listed = {entry.name: entry.only_read for entry in formats().formats}
    assert [name for name, why in listed.items() if why] == ["nemo"]
    assert "only read" in str(formats().summary())
