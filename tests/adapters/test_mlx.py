# SPDX-License-Identifier: Apache-2.0
"""MLX-LM folders: what mlx-lm itself saved merges to what mlx-lm itself fused."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surgery import convert
from surgery_formats.adapters.mlx import MLX
from surgery_formats.adapters.peft import PEFT
from surgery_formats.adapters.registry import format_at, read_adapter
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError, NotFoundError
from surgery_formats.updates import DoRA, LoRA
from tests.support.adapter_files import (
    GOLDEN,
    assert_close,
    assert_expected,
    config_of,
    draw,
    llama,
    merged,
    mlx_deltas,
    peft_deltas,
    write_mlx,
    write_peft,
)

CASES = sorted(path for path in (GOLDEN / "mlx").glob("*/*") if (path / "adapters.safetensors").exists())
Q = "model.layers.0.self_attn.q_proj"


def _name(path: Path) -> str:
    return f"{path.parent.name}-{path.name}"


@pytest.mark.parametrize("folder", CASES, ids=_name)
def test_merges_to_what_mlx_lm_fuses(folder: Path, tmp_path: Path) -> None:
    base = folder.parent / "base"
    assert_expected(base, merged(base, folder, tmp_path / "out"), folder / "expected.safetensors")


@pytest.mark.parametrize("folder", CASES, ids=_name)
def test_every_tensor_is_consumed(folder: Path) -> None:
    adapter = read_adapter(folder)
    assert adapter.format == "mlx"
    assert adapter.unconsumed() == ()
    assert not PEFT.detect(folder)


@pytest.mark.parametrize(
    "folder", [c for c in CASES if "embed" not in c.name and c.name not in ("full", "dora-tied")], ids=_name
)
@pytest.mark.parametrize("with_base", [False, True])
def test_survives_the_way_through_peft(folder: Path, tmp_path: Path, with_base: bool) -> None:
    base = folder.parent / "base"
    if folder.parent.name == "gpt_oss" and not with_base:  # its paths are those of PEFT's stacks
        with pytest.raises(FitError, match="only the base"):
            convert(folder, "peft", output=tmp_path / "peft")
        return
    there = convert(folder, "peft", output=tmp_path / "peft", base=base if with_base else None)
    back = convert(tmp_path / "peft", "mlx", output=tmp_path / "mlx", base=base if with_base else None)
    assert max(there.max_error, back.max_error) <= 1e-6
    assert_expected(base, merged(base, tmp_path / "mlx", tmp_path / "out"), folder / "expected.safetensors")
    embeddings = ("embed_tokens",)
    assert_close(mlx_deltas(tmp_path / "mlx", embeddings), mlx_deltas(folder, embeddings))


def test_a_peft_folder_of_stacked_experts_merges_the_same(tmp_path: Path) -> None:
    folder = GOLDEN / "mlx/mixtral/lora"
    convert(folder, "peft", output=tmp_path / "peft")
    base = folder.parent / "base"
    assert_expected(base, merged(base, tmp_path / "peft", tmp_path / "out"), folder / "expected.safetensors")


@pytest.mark.parametrize(
    ("config", "scale", "trap"),
    [
        ({"num_layers": 2, "lora_parameters": {"rank": 2, "scale": 5.0}}, 5.0, ""),
        ({"lora_layers": 2, "lora_parameters": {"rank": 2, "scale": 5.0, "alpha": 8}}, 20.0, "before 2024-04"),
        ({"num_layers": 2, "lora_parameters": {"rank": 2, "scale": 5.0, "alpha": 8}}, 5.0, "ignores it"),
        ({"num_layers": 2, "lora_parameters": {"rank": 2}}, 20.0, "no scale"),
    ],
)
def test_scale_by_generation_of_the_configuration(
    tmp_path: Path, config: dict[str, object], scale: float, trap: str
) -> None:
    write_mlx(tmp_path / "a", {f"{Q}.lora_a": draw(1, 6, 2), f"{Q}.lora_b": draw(2, 2, 6)}, **config)
    adapter = read_adapter(tmp_path / "a")
    (update,) = next(iter(adapter.updates.values()))
    assert isinstance(update, LoRA)
    assert update.scale == scale
    assert trap in " ".join(adapter.stated_issues)
    assert bool(trap) == bool(adapter.stated_issues)


def test_ranks_are_padded_and_scales_folded(tmp_path: Path) -> None:
    prefix = "base_model.model.model.layers"
    tensors = {}
    for layer, name, rank, shape in ((0, "q_proj", 2, (6, 6)), (1, "q_proj", 4, (6, 6)), (1, "k_proj", 2, (4, 6))):
        tensors[f"{prefix}.{layer}.self_attn.{name}.lora_A.weight"] = draw(layer, rank, shape[1])
        tensors[f"{prefix}.{layer}.self_attn.{name}.lora_B.weight"] = draw(layer + 9, shape[0], rank)
    source = write_peft(
        tmp_path / "a",
        tensors,
        r=2,
        lora_alpha=3,
        rank_pattern={"layers.1.self_attn.q_proj": 4},
        alpha_pattern={"k_proj": 7},
    )
    result = convert(source, "mlx", output=tmp_path / "b")
    assert [entry.outcome for entry in result.entries] == ["folded", "folded", "exact"]
    parameters = config_of(tmp_path / "b")["lora_parameters"]
    assert isinstance(parameters, dict)
    assert (parameters["rank"], parameters["scale"]) == (4, 0.75)
    assert_close(mlx_deltas(tmp_path / "b"), peft_deltas(source))


def test_keys_are_relative_only_where_every_block_has_them(tmp_path: Path) -> None:
    def tensors(modules: list[str]) -> dict[str, np.ndarray]:
        return {
            f"base_model.model.{m}.lora_{side}.weight": draw(1, *((2, 6) if side == "A" else (6, 2)))
            for m in modules
            for side in "AB"
        }

    same = write_peft(
        tmp_path / "a", tensors([f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)] + ["lm_head"]), r=2
    )
    convert(same, "mlx", output=tmp_path / "same")
    other = write_peft(tmp_path / "b", tensors(["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.x"]), r=2)
    convert(other, "mlx", output=tmp_path / "other")
    keys = [config_of(tmp_path / name)["lora_parameters"]["keys"] for name in ("same", "other")]  # type: ignore[index]
    assert keys == [["lm_head", "self_attn.q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.x"]]
    assert config_of(tmp_path / "same")["num_layers"] == -1


def test_biases_that_a_tied_base_need_not_have_are_not_asked_for(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tied=True)
    scales = {f"base_model.model.{Q}.ia3_l": draw(1, 6, 1)}
    source = write_peft(tmp_path / "a", scales, peft_type="IA3", target_modules=["q_proj"], feedforward_modules=[])
    assert read_adapter(source).optional
    with pytest.raises(FitError, match="has no IA3"):
        convert(source, "mlx", output=tmp_path / "b", base=base)


def test_a_tied_head_follows_the_embedding_in_mlx_only(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tied=True)
    stem = "model.embed_tokens"
    source = write_mlx(
        tmp_path / "mlx",
        {f"{stem}.lora_a": draw(1, 11, 2), f"{stem}.lora_b": draw(2, 2, 6)},
        lora_parameters={"rank": 2, "scale": 3.0},
    )
    after = merged(base, source, tmp_path / "out")
    assert "lm_head.weight" not in after, "mlx-lm keeps head and embedding one tensor"
    convert(source, "peft", output=tmp_path / "peft", base=base)
    deltas = peft_deltas(tmp_path / "peft")
    assert_close({"lm_head": deltas["lm_head"]}, {"lm_head": deltas[stem]})
    assert_close(merged(base, tmp_path / "peft", tmp_path / "out2"), after, 1e-7)
    alone = write_peft(
        tmp_path / "alone",
        {
            f"base_model.model.{stem}.lora_embedding_A": draw(1, 2, 11),
            f"base_model.model.{stem}.lora_embedding_B": draw(2, 6, 2),
        },
        r=2,
    )
    with pytest.raises(FitError, match="head and embedding are one tensor in mlx-lm"):
        convert(alone, "mlx", output=tmp_path / "no", base=base)


def test_what_it_cannot_hold_is_named(tmp_path: Path) -> None:
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    source = write_peft(
        tmp_path / "a",
        {
            f"{stem}.lora_A.weight": draw(1, 2, 6),
            f"{stem}.lora_B.weight": draw(2, 6, 2),
            f"{stem}.lora_B.bias": draw(3, 6),
        },
        r=2,
        lora_bias=True,
    )
    with pytest.raises(FitError, match=r"q_proj\.bias") as caught:
        convert(source, "mlx", output=tmp_path / "b")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "b").exists()
    result = convert(source, "mlx", output=tmp_path / "b", allow_loss=True)
    assert [entry.outcome for entry in result.entries] == ["dropped", "exact"]


@pytest.mark.parametrize(
    ("tensors", "config", "fault"),
    [
        ({f"{Q}.lora_a": draw(1, 6, 2)}, {}, "without its 'lora_b'"),
        ({f"{Q}.lora_b": draw(1, 2, 6)}, {}, "without its 'lora_a'"),
        ({f"{Q}.weight": draw(1, 6, 6)}, {}, "neither lora_a"),
        ({f"{Q}.lora_a": draw(1, 6, 2), f"{Q}.lora_b": draw(1, 3, 6)}, {}, "is \\[6, 2\\]"),
        ({f"{Q}.lora_a": draw(1, 6, 2), f"{Q}.lora_b": draw(1, 2, 6)}, {"fine_tune_type": "dora"}, "no magnitude"),
        ({f"{Q}.lora_a": draw(1, 6, 2), f"{Q}.lora_b": draw(1, 2, 6), f"{Q}.m": draw(1, 6)}, {}, "not DoRA"),
        ({f"{Q}.lora_a": draw(1, 6, 2), f"{Q}.lora_b": draw(1, 2, 6)}, {"fine_tune_type": "x"}, "not known"),
        (
            {f"{Q}.lora_a": draw(1, 6, 2), f"{Q}.lora_b": draw(1, 2, 6)},
            {"lora_parameters": {"scale": "x"}},
            "not a number",
        ),
    ],
)
def test_a_malformed_folder_is_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], config: dict[str, object], fault: str
) -> None:
    write_mlx(tmp_path / "a", tensors, **{"lora_parameters": {"rank": 2, "scale": 1.0}, **config})
    with pytest.raises((MalformedError, FitError), match=fault):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("place", ["file", "folder", "folder with a configuration"])
def test_an_old_npz_merges_to_what_mlx_lm_fuses(place: str, tmp_path: Path) -> None:
    """The archive is mlx.core.savez's; no file beside it states the scale, which is asked for."""
    old = GOLDEN / "mlx/llama/npz"
    path = old / "adapters.npz"
    if place != "file":
        path = tmp_path / "a"
        path.mkdir()
        shutil.copy(old / "adapters.npz", path)
    if place == "folder with a configuration":
        (path / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 2, "scale": 20.0}}))
    assert format_at(path) is MLX
    stated = place == "folder with a configuration"
    if not stated:
        with pytest.raises(FitError, match="the scale of its LoRAs is not in its file"):
            read_adapter(path)
    adapter = read_adapter(path) if stated else read_adapter(path, alpha=20)
    assert adapter.unconsumed() == ()
    expected = GOLDEN / "mlx/llama/lora-zero/expected.safetensors"
    assert_expected(GOLDEN / "mlx/llama/base", merged(GOLDEN / "mlx/llama/base", adapter, tmp_path / "out"), expected)
    assert convert(adapter, "mlx", output=tmp_path / "new").max_error <= 1e-6
    written = tmp_path / "new/adapters.safetensors"
    assert_close(load_file(written), load_file(GOLDEN / "mlx/llama/lora-zero/adapters.safetensors"), 0)


def test_rows_and_columns_that_mlx_calls_fortrans_are_read(tmp_path: Path) -> None:
    """A LoRA of rank 1: mlx 0.32.4 writes ``'fortran_order': True`` for an array of one row or column."""
    factors = {"x.lora_a": draw(1, 6, 1), "x.lora_b": draw(2, 1, 4)}

    def fortran(values: np.ndarray) -> bytes:
        array = io.BytesIO()
        np.save(array, values)
        return array.getvalue().replace(b"False", b"True", 1).replace(b" \n", b"  \n", 1)

    file = tmp_path / "adapters.npz"
    members = {f"{name}.npy": fortran(values) for name, values in factors.items()}
    (chain,) = read_adapter(_zip(file, members), alpha=3).updates.values()
    lora = chain[0]
    assert isinstance(lora, LoRA)
    assert np.array_equal(lora.A.load(DType.F32), factors["x.lora_a"].T)
    assert np.array_equal(lora.B.load(DType.F32), factors["x.lora_b"].T)
    members["x.lora_a.npy"] = fortran(draw(1, 6, 2))
    with pytest.raises(MalformedError, match="fortran_order"):
        MLX.with_alpha(3.0).read(_zip(file, members))


def test_another_scale_than_the_stated_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="its configuration says otherwise"):
        read_adapter(GOLDEN / "mlx/llama/lora-zero", alpha=2)
    with pytest.raises(FitError, match="its configuration says otherwise"):
        read_adapter(GOLDEN / "mlx/llama/full", alpha=20)
    assert read_adapter(GOLDEN / "mlx/llama/lora-zero", alpha=20).updates


def _zip(path: Path, members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    whole = (GOLDEN / "mlx/llama/npz/adapters.npz").read_bytes()
    file = tmp_path / "adapters.npz"
    for size in (0, 3, 40, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(MalformedError):
            MLX.read(file)
        assert not MLX.detect(file)
    array = io.BytesIO()
    np.save(array, draw(1, 4, 2))
    for members, said in (
        ({"../x.lora_a.npy": array.getvalue()}, "without its 'lora_b'"),  # a name: nothing is unpacked
        ({"x.lora_a": array.getvalue()}, "is no array"),
        ({"x.weight.npy": array.getvalue()}, "neither lora_a"),
        ({"x.lora_a.npy": array.getvalue() + b"0"}, "for the sizes"),
        ({"x.lora_a.npy": b"\x93NUMPY"}, "not an array of numpy's"),
    ):
        with pytest.raises(MalformedError, match=said):
            MLX.with_alpha(1.0).read(_zip(file, members))
    with pytest.raises(MalformedError, match="only members stored as they are"):
        MLX.read(_zip(file, {"x.lora_a.npy": bytes(100000)}, zipfile.ZIP_DEFLATED))
    np.savez(file, **{"x.lora_a": np.array([{}], object)})
    with pytest.raises(MalformedError, match="not numbers that are read"):
        MLX.read(file)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(NotFoundError, match=r"no adapters\.safetensors"):
        MLX.read(tmp_path / "nothing")


def test_magnitudes_of_an_embedding_belong_to_its_rows() -> None:
    adapter = read_adapter(GOLDEN / "mlx/llama/dora-embed")
    (update,) = next(chain for site, chain in adapter.updates.items() if "embed" in site.path)
    assert isinstance(update, DoRA)
    assert update.per_row
    assert update.shape == (64, 32)


def test_an_older_folder_of_mlx_vlm(tmp_path: Path) -> None:
    """Its layer is ``y + alpha / rank (x A) B`` (mlx-vlm 0.7.10, ``trainer/peft/lora.py``)."""
    base = llama(tmp_path / "base")
    out, inputs = load_file(base / "model.safetensors")[f"{Q}.weight"].shape
    folder = tmp_path / "vlm"
    folder.mkdir()
    a, b = draw(1, inputs, 2), draw(2, 2, out)
    save_file({f"language_model.{Q}.A": a, f"language_model.{Q}.B": b}, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"rank": 2, "alpha": 0.5, "dropout": 0.1}))
    assert any("mlx-vlm" in issue for issue in read_adapter(folder).known_issues())
    before, after = load_file(base / "model.safetensors"), merged(base, folder, tmp_path / "out")
    expected = before[f"{Q}.weight"] + 0.25 * (a @ b).T
    assert np.abs(after[f"{Q}.weight"] - expected).max() <= 1e-6 * np.abs(0.25 * a @ b).max()
    (folder / "adapter_config.json").write_text(json.dumps({"rank": 0, "alpha": 0.5}))
    with pytest.raises(MalformedError, match="no numbers above 0"):
        read_adapter(folder)
