# SPDX-License-Identifier: Apache-2.0
"""GGUF LoRAs: what llama.cpp's converter made of PEFT adapters does what they do, and what we write is what it writes."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import surgery
from surgery import convert
from surgery_formats.adapters.gguf import GGUF_LORA
from surgery_formats.adapters.registry import format_at, read_adapter
from surgery_formats.containers.gguf.header import Header, read_header
from surgery_formats.containers.gguf.layout import lay_out_new
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError, SurgeryError, UsageError
from surgery_formats.files.raw import open_file
from surgery_formats.updates import LoRA, PairedRows, Stacked
from tests.support.adapter_files import GOLDEN, assert_expected, draw, merged, write_peft

HERE = GOLDEN / "gguf"
FILES = sorted(HERE.glob("*/*/adapter*.gguf"))
Q = "blk.0.attn_q.weight"


def _name(path: Path) -> str:
    return f"{path.parent.parent.name}-{path.parent.name}-{path.stem}"


def raw(path: Path) -> tuple[Header, dict[str, np.ndarray]]:
    header = read_header(open_file(path))
    return header, {tensor.name: tensor.read() for tensor in header.tensors}


def write_gguf(path: Path, tensors: dict[str, np.ndarray], **entries: str | int | float) -> Path:
    """A file by hand."""
    known = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    known |= {key.replace("__", "."): value for key, value in entries.items()}
    plan = lay_out_new([(name, DType.F32, values.shape) for name, values in tensors.items()], known)
    data = bytearray(plan.nbytes)
    data[: len(plan.header)] = plan.header
    for name, (offset, nbytes) in plan.ranges.items():
        data[offset : offset + nbytes] = np.ascontiguousarray(tensors[name], np.float32).tobytes()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_merges_to_what_the_adapter_was_before_it_was_converted(file: Path, tmp_path: Path) -> None:
    tolerance = {"adapter-q8_0": 2e-2, "adapter-f16": 1e-3}.get(file.stem, 1e-6)
    base = file.parent.parent / "base"
    got, expected = merged(base, file, tmp_path / "out"), load_file(file.parent / "expected.safetensors")
    before = load_file(base / "model.safetensors")
    assert {name for name in got if not np.array_equal(got[name], before[name])} == expected.keys()
    for name, values in expected.items():
        assert np.abs(got[name] - values).max() <= tolerance * np.abs(values - before[name]).max(), name


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_merges_into_a_gguf_as_llama_cpp_adds_it(name: str, tmp_path: Path) -> None:
    """``W + alpha / r lora_b lora_a`` on the rows as they lie in both files."""
    file = HERE / name / "lora/adapter.gguf"
    surgery.merge(HERE / name / "base.gguf", file, output=tmp_path / "merged")
    header, factors = raw(file)
    before, after = raw(HERE / name / "base.gguf")[1], raw(tmp_path / "merged" / "base.gguf")[1]
    alpha = header.value("adapter.lora.alpha")
    changed = 0
    for stored, weight in before.items():
        expected = weight.astype(np.float64)
        if (a := factors.get(f"{stored}.lora_a")) is not None:
            b = factors[f"{stored}.lora_b"].astype(np.float64)
            expected = expected + alpha / b.shape[-1] * b @ a
            changed += 1
        assert np.abs(after[stored] - expected).max() <= 1e-6 * max(1e-3, np.abs(expected - weight).max()), stored
    assert changed == len(factors) // 2


@pytest.mark.parametrize("file", [file for file in FILES if file.stem == "adapter"], ids=_name)
def test_what_is_written_of_the_same_adapter_is_the_converters(file: Path, tmp_path: Path) -> None:
    result = convert(file.parent / "peft", "gguf", output=tmp_path / "mine.gguf", base=file.parent.parent / "base")
    assert result.max_error <= 1e-6
    (mine, ours), (theirs, converters) = raw(tmp_path / "mine.gguf"), raw(file)
    for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha"):
        assert mine.value(key) == theirs.value(key), key
    assert ours.keys() == converters.keys()
    for name, values in converters.items():
        assert ours[name].dtype == values.dtype, name
        assert np.array_equal(ours[name], values), name


@pytest.mark.parametrize("file", [file for file in FILES if file.stem == "adapter"], ids=_name)
def test_back_to_peft_and_again(file: Path, tmp_path: Path) -> None:
    base = file.parent.parent / "base"
    there = convert(file, "peft", output=tmp_path / "peft", base=base)
    back = convert(tmp_path / "peft", "gguf", output=tmp_path / "back.gguf", base=base)
    assert max(there.max_error, back.max_error) <= 1e-6
    assert_expected(base, merged(base, tmp_path / "peft", tmp_path / "out"), file.parent / "expected.safetensors")
    ours, theirs = raw(tmp_path / "back.gguf")[1], raw(file)[1]
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_is_told_from_a_model_and_shown() -> None:
    file = HERE / "llama/lora/adapter.gguf"
    assert format_at(file) is GGUF_LORA
    assert not GGUF_LORA.detect(HERE / "llama/base.gguf")
    report = surgery.inspect(file)
    assert "gguf" in str(report)
    assert "LoRA" in str(report)
    adapter = read_adapter(file)
    kinds = {type(update) for chain in adapter.updates.values() for update in chain}
    assert kinds == {LoRA, PairedRows}
    assert adapter.unconsumed() == ()
    assert {
        type(c[0]) for s, c in read_adapter(HERE / "mixtral/lora/adapter.gguf").updates.items() if "mlp." in s.path
    } == {Stacked}


def test_written_again_without_a_base_it_keeps_its_rows(tmp_path: Path) -> None:
    for name in ("llama", "mixtral"):
        convert(HERE / name / "lora/adapter.gguf", "gguf", output=tmp_path / f"{name}.gguf")
        ours, theirs = raw(tmp_path / f"{name}.gguf")[1], raw(HERE / name / "lora/adapter.gguf")[1]
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_another_format_needs_the_base_that_tells_the_heads(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="only the base tells how many rows a head has"):
        convert(HERE / "llama/lora/adapter.gguf", "peft", output=tmp_path / "peft")
    convert(HERE / "qwen2/lora/adapter.gguf", "peft", output=tmp_path / "peft")  # its rows are transformers'


@pytest.mark.parametrize("root", [False, True])
def test_a_scale_for_each_module_is_multiplied_in(root: bool, tmp_path: Path) -> None:
    prefix = "base_model.model.model.layers.0"
    tensors = {}
    for name, rank, seed in (("self_attn.q_proj", 2, 1), ("self_attn.v_proj", 3, 2), ("mlp.up_proj", 3, 3)):
        out = {"self_attn.q_proj": 32, "self_attn.v_proj": 16, "mlp.up_proj": 64}[name]
        tensors[f"{prefix}.{name}.lora_A.weight"] = draw(seed, rank, 32)
        tensors[f"{prefix}.{name}.lora_B.weight"] = draw(seed + 9, out, rank)
    config = {
        "r": 3,
        "lora_alpha": 6,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 1},
        "use_rslora": root,
    }
    folder = write_peft(tmp_path / "peft", tensors, **config)
    result = convert(folder, "gguf", output=tmp_path / "out.gguf", base=HERE / "llama/base")
    assert result.max_error <= 1e-6
    base = HERE / "llama/base"
    mine, theirs = merged(base, tmp_path / "out.gguf", tmp_path / "a"), merged(base, folder, tmp_path / "b")
    for name, values in load_file(base / "model.safetensors").items():
        assert np.abs(mine[name] - theirs[name]).max() <= 1e-6 * max(1, np.abs(theirs[name] - values).max()), name
    assert {entry.outcome for entry in result.entries} == ({"folded"} if root else {"exact", "folded"})


def test_without_alpha_the_scale_is_one(tmp_path: Path) -> None:
    factors = {f"{Q}.lora_a": draw(1, 2, 32), f"{Q}.lora_b": draw(2, 32, 2)}
    for number, entries in enumerate(({}, {"adapter__lora__alpha": 0.0})):
        adapter = read_adapter(write_gguf(tmp_path / f"{number}.gguf", factors, **entries))
        (chain,) = adapter.updates.values()
        assert chain[0].scale == 1.0
        assert any("no alpha" in issue for issue in adapter.known_issues())


def test_norms_in_it_do_nothing(tmp_path: Path) -> None:
    factors = {f"{Q}.lora_a": draw(1, 2, 32), f"{Q}.lora_b": draw(2, 32, 2), "blk.0.attn_norm.weight": draw(3, 32)}
    adapter = read_adapter(write_gguf(tmp_path / "a.gguf", factors, adapter__lora__alpha=2.0))
    assert len(adapter.ignored) == 1
    assert adapter.unconsumed() == ()
    assert any("passes over" in issue for issue in adapter.known_issues())


@pytest.mark.parametrize(
    ("tensors", "entries", "error", "said"),
    [
        ({f"{Q}.lora_a": (2, 32)}, {}, MalformedError, "without its 'lora_b'"),
        ({f"{Q}.lora_a": (2, 32), f"{Q}.lora_b": (32, 3)}, {}, FitError, r"its lora_b \[32, 3\]"),
        ({f"{Q}": (2, 32)}, {}, MalformedError, "neither lora_a, lora_b nor a norm"),
        (
            {"blk.0.ffn_up_exps.weight.lora_a": (3, 2, 32), "blk.0.ffn_up_exps.weight.lora_b": (2, 64, 2)},
            {},
            FitError,
            "lora_b",
        ),
        ({}, {"adapter__type": "control"}, FitError, "adapter.type 'control' is not read"),
        ({}, {"general__architecture": "mamba"}, FitError, "architecture 'mamba' is not read"),
        ({}, {"adapter__alora__invocation_tokens": 3}, FitError, "activated LoRA"),
        ({}, {"adapter__lora__alpha": float("nan")}, MalformedError, "not a finite number"),
    ],
)
def test_what_is_refused(tensors: dict, entries: dict, error: type[SurgeryError], said: str, tmp_path: Path) -> None:
    values = {name: draw(number, *sizes) for number, (name, sizes) in enumerate(tensors.items())}
    with pytest.raises(error, match=said):
        read_adapter(write_gguf(tmp_path / "a.gguf", values, **entries))


def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path: Path) -> None:
    factors = {f"{Q}.lora_a": draw(1, 2, 32), f"{Q}.lora_b": draw(2, 30, 2)}
    file = write_gguf(tmp_path / "a.gguf", factors, adapter__lora__alpha=2.0)
    with pytest.raises(FitError, match="30 rows are not 4 heads"):
        surgery.merge(HERE / "llama/base", file, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        (
            {"model.embed_tokens.lora_embedding_A": (2, 24), "model.embed_tokens.lora_embedding_B": (32, 2)},
            {},
            "head and embedding are one tensor",
        ),
        (
            {
                "model.layers.0.mlp.up_proj.lora_A.weight": (2, 32),
                "model.layers.0.mlp.up_proj.lora_B.weight": (64, 2),
                "model.layers.0.mlp.up_proj.lora_magnitude_vector": (64,),
            },
            {"use_dora": True},
            "no DoRA",
        ),
    ],
)
def test_what_it_cannot_hold_is_dropped_by_name(tensors: dict, config: dict, said: str, tmp_path: Path) -> None:
    values = {f"base_model.model.{name}": draw(7, *sizes) for name, sizes in tensors.items()}
    folder = write_peft(tmp_path / "peft", values, r=2, **config)
    with pytest.raises(FitError, match=said):
        convert(folder, "gguf", output=tmp_path / "out.gguf", base=HERE / "qwen2/base")
    assert not (tmp_path / "out.gguf").exists()


def test_it_needs_a_base_whose_names_are_known(tmp_path: Path) -> None:
    folder = HERE / "llama/lora/peft"
    with pytest.raises(FitError, match="those of the base's architecture"):
        convert(folder, "gguf", output=tmp_path / "out.gguf")
    with pytest.raises(UsageError, match=r"must end in \.gguf"):
        convert(folder, "gguf", output=tmp_path / "out.safetensors", base=HERE / "llama/base")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.floats(0.125, 64, width=32), st.integers(0, 2**16))
def test_any_lora_survives_the_way_there_and_back(rank: int, alpha: float, seed: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        folder, base = Path(place), HERE / "llama/base"
        prefix = "base_model.model.model.layers.1.self_attn"
        tensors = {}
        for name, out in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
            tensors[f"{prefix}.{name}.lora_A.weight"] = draw(seed, rank, 32)
            tensors[f"{prefix}.{name}.lora_B.weight"] = draw(seed + 1, out, rank)
        write_peft(folder / "peft", tensors, r=rank, lora_alpha=alpha)
        convert(folder / "peft", "gguf", output=folder / "a.gguf", base=base)
        convert(folder / "a.gguf", "peft", output=folder / "back", base=base)
        back = load_file(folder / "back/adapter_model.safetensors")
        assert back.keys() == tensors.keys()
        assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    whole, path = (HERE / "llama/lora/adapter.gguf").read_bytes(), tmp_path / "cut.gguf"
    for nbytes in (*range(0, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:nbytes])
        with pytest.raises(SurgeryError, match=re.escape(str(path))):
            GGUF_LORA.read(path)


def test_damage_is_refused_or_leaves_every_tensor_in_use(tmp_path: Path) -> None:
    """Every byte of the header in turn. A name may become another one, an alpha another: the file stays one that can be."""
    file, path = HERE / "llama/lora/adapter.gguf", tmp_path / "damaged.gguf"
    whole, header = file.read_bytes(), raw(file)[0]
    end = min(tensor.offset for tensor in header.tensors)
    named: list[str | None] = []
    for at in range(end):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        try:
            adapter = GGUF_LORA.read(path)
        except SurgeryError as error:
            named.append(error.file)
            continue
        assert adapter.unconsumed() == (), at
        assert len(adapter.tensors) == len(header.tensors), at
        for factor in (factor for chain in adapter.updates.values() for u in chain for factor in u.factors().values()):
            assert factor.load(DType.F32).shape == factor.shape, at
    assert set(named) == {str(path)}
    assert len(named) >= 0.99 * end  # what is left: an alpha, text, padding


def test_the_header_is_small_and_of_version_three(tmp_path: Path) -> None:
    convert(HERE / "llama/lora/peft", "gguf", output=tmp_path / "a.gguf", base=HERE / "llama/base")
    assert struct.unpack("<I", (tmp_path / "a.gguf").read_bytes()[4:8]) == (3,)
