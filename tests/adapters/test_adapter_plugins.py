# SPDX-License-Identifier: Apache-2.0
"""A plugin's format and a plugin's kind of update go through every verb, though no verb knows them."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import surgery
from surgery_formats.adapters.peft import PEFT
from surgery_formats.adapters.registry import format_named, read_adapter
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.testing.format import FORMAT_CHECKS, FormatCase
from surgery_formats.testing.plugins import installed_project
from surgery_formats.testing.update import UPDATE_CHECKS, UpdateCase
from tests.oracles import disk, measure, recipes
from tests.support.adapter_files import GOLDEN, draw, write_peft
from tests.support.kit import ROOT
from tests.support.sessions import Plain

PLUGINS = ROOT / "tests" / "plugins"
MODULES = {"self_attn.q_proj": (64, 64), "mlp.up_proj": (96, 64)}
RANK, ALPHA = 3, 6.0
IDS = np.array([[5, 17, 3, 88, 42, 9, 61]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return recipes.build("llama", tmp_path / "base", hidden_size=64, intermediate_size=96)


@pytest.fixture
def kind() -> Iterator[None]:
    with installed_project(PLUGINS / "toy_low_rank"):
        yield


@pytest.fixture
def format() -> Iterator[None]:
    with installed_project(PLUGINS / "toy_format"):
        yield


def core_file(folder: Path, seed: int = 0, modules: dict[str, tuple[int, int]] | None = None) -> Path:
    """A PEFT folder of the plugin's kind."""
    tensors = {}
    shapes = {f"model.layers.0.{module}": shape for module, shape in MODULES.items()} if modules is None else modules
    for number, (module, (out, inputs)) in enumerate(shapes.items()):
        key = f"base_model.model.{module}.core"
        tensors[f"{key}_A"] = 0.2 * draw(seed + number, RANK, inputs)
        tensors[f"{key}_c"] = draw(seed + number + 50, RANK)
        tensors[f"{key}_B"] = 0.2 * draw(seed + number + 100, out, RANK)
    return write_peft(folder, tensors, peft_type="CORE", r=RANK, lora_alpha=ALPHA)


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """``alpha / r B diag(c) A`` by parameter."""
    tensors = {name: value.double() for name, value in disk.adapter(folder)[1].items()}
    found = {}
    for name in tensors:
        if name.endswith(".core_A"):
            stem = name.removesuffix("_A")
            product = tensors[f"{stem}_B"] @ torch.diag(tensors[f"{stem}_c"]) @ tensors[f"{stem}_A"]
            found[f"{name.removeprefix('base_model.model.').removesuffix('.core_A')}.weight"] = ALPHA / RANK * product
    return found


def assert_adds(base: Path, merged: Path, wanted: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    before, after = disk.read_tensors(base), disk.read_tensors(merged)
    for name, value in before.items():
        if name in wanted:
            assert measure.relative_error(after[name].double() - value.double(), wanted[name]) < tolerance, name
        else:
            assert torch.equal(after[name], value), name


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("check", UPDATE_CHECKS, ids=lambda check: check.__name__)
def test_a_plugin_kind_conforms(check: Callable[[UpdateCase], None], tmp_path: Path) -> None:
    chain = next(iter(read_adapter(core_file(tmp_path / "core")).updates.values()))
    check(UpdateCase(chain[0]))


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("check", FORMAT_CHECKS, ids=lambda check: check.__name__)
def test_peft_conforms_with_the_kind(check: Callable[[FormatCase, Path], None], tmp_path: Path) -> None:
    check(FormatCase(PEFT, lambda folder: core_file(folder / "core")), tmp_path)


@pytest.mark.usefixtures("kind")
def test_a_plugin_kind_is_merged(base: Path, tmp_path: Path) -> None:
    adapter = core_file(tmp_path / "core")
    surgery.merge(base, [(adapter, 0.5)], output=tmp_path / "out")
    assert_adds(base, tmp_path / "out", {name: 0.5 * delta for name, delta in deltas(adapter).items()})


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize(("target", "kinds"), [("peft", {"Core"}), ("mlx", {"LoRA"}), ("compact", {"LoRA"})])
def test_a_plugin_kind_is_converted(target: str, kinds: set[str], base: Path, tmp_path: Path) -> None:
    adapter = core_file(tmp_path / "core")
    surgery.convert(adapter, target, output=tmp_path / "out", base=base)
    assert {update.kind for chain in read_adapter(tmp_path / "out").updates.values() for update in chain} == kinds
    surgery.merge(base, tmp_path / "out", output=tmp_path / "merged")
    assert_adds(base, tmp_path / "merged", deltas(adapter), 0.05 if target == "compact" else 1e-5)


@pytest.mark.usefixtures("kind")
def test_the_kind_is_converted_to_kohya(tmp_path: Path) -> None:
    pipeline = GOLDEN / "kohya/sd1/base"
    stored = open_checkpoint(pipeline).components["unet"].tensors
    name = next(name for name in stored if name.endswith("attn1.to_q.weight"))
    adapter = core_file(tmp_path / "core", modules={name.removesuffix(".weight"): stored[name].shape})
    out = tmp_path / "out.safetensors"
    surgery.convert(adapter, "kohya", output=out, base=pipeline, component="unet")
    surgery.merge(pipeline, out, output=tmp_path / "merged")
    assert_adds(pipeline / "unet", tmp_path / "merged" / "unet", deltas(adapter))


@pytest.mark.usefixtures("kind")
def test_the_kind_is_combined_with_itself_and_with_lora(base: Path, tmp_path: Path) -> None:
    one, other = core_file(tmp_path / "one"), core_file(tmp_path / "other", seed=7)
    name = "model.layers.0.self_attn.q_proj"
    pair = {
        f"base_model.model.{name}.lora_A.weight": draw(1, 2, 64),
        f"base_model.model.{name}.lora_B.weight": draw(2, 64, 2),
    }
    lora = write_peft(tmp_path / "lora", pair, r=2, lora_alpha=2)
    surgery.combine([(one, 0.5), (other, -2.0), (lora, 1.0)], output=tmp_path / "out")
    wanted = {key: 0.5 * delta - 2.0 * deltas(other)[key] for key, delta in deltas(one).items()}
    A, B = (torch.from_numpy(value).double() for value in pair.values())
    wanted[f"{name}.weight"] += B @ A
    surgery.merge(base, tmp_path / "out", output=tmp_path / "merged")
    assert_adds(base, tmp_path / "merged", wanted)


@pytest.mark.usefixtures("kind")
def test_a_plugin_kind_is_resized(tmp_path: Path) -> None:
    adapter = core_file(tmp_path / "core")
    surgery.resize(adapter, rank=2, output=tmp_path / "out")
    for site, (update,) in read_adapter(tmp_path / "out").updates.items():
        U, S, V = torch.linalg.svd(deltas(adapter)[site.path])
        best = U[:, :2] @ torch.diag(S[:2]) @ V[:2]
        assert update.rank == 2
        assert measure.relative_error(torch.from_numpy(update.low_rank().delta(DType.F64)), best) < 1e-5


@pytest.mark.usefixtures("kind")
def test_the_kind_takes_turns_in_slots(base: Path, tmp_path: Path) -> None:
    adapter = core_file(tmp_path / "core")
    surgery.export_onnx(base, swap=[adapter], output=tmp_path / "swap", target="portable", dtype="fp32")
    surgery.export_onnx(base, [adapter], output=tmp_path / "merged", target="portable", dtype="fp32")
    merged, swapped = (_logits(tmp_path / name / "model.onnx") for name in ("merged", "swap"))
    active = _logits(tmp_path / "swap" / "model.onnx", tmp_path / "swap" / "adapters" / "core.onnx_adapter")
    assert np.abs(active - merged).max() < 1e-4
    assert np.abs(swapped - merged).max() > 1e-2


def _logits(model: Path, *files: Path) -> np.ndarray:
    """As onnxruntime computes them with these adapters active."""
    plain, options, loaded = Plain(model), onnxruntime.RunOptions(), []
    for file in files:
        loaded.append(onnxruntime.LoraAdapter())
        loaded[-1].Load(str(file))
        options.add_active_adapter(loaded[-1])
    feed = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **plain.past}
    return plain.session.run(["logits"], feed, options)[0]


@pytest.mark.usefixtures("kind")
def test_the_kind_is_told_apart_from_another_and_from_the_same(tmp_path: Path) -> None:
    one, other = core_file(tmp_path / "one"), core_file(tmp_path / "other", seed=7)
    assert surgery.diff(one, one).equal
    found = surgery.diff(one, other)
    assert not found.equal
    wanted = sum(float((deltas(other)[k] - v).square().sum()) for k, v in deltas(one).items())
    whole = sum(float(v.square().sum()) for v in deltas(one).values())
    assert found.difference == pytest.approx((wanted / whole) ** 0.5, rel=1e-5)


@pytest.mark.usefixtures("kind")
def test_a_plugin_kind_is_reported(base: Path, tmp_path: Path) -> None:
    adapter = core_file(tmp_path / "core")
    count = sum(value.numel() for value in disk.adapter(adapter)[1].values())
    assert surgery.report(adapter, base=base).adapters[0].trained == count
    found = surgery.inspect(adapter)
    assert found.kinds == {"Core": 2}
    assert found.ranks == {RANK: 2}


@pytest.mark.usefixtures("format")
@pytest.mark.parametrize("check", FORMAT_CHECKS, ids=lambda check: check.__name__)
def test_a_plugin_format_conforms(check: Callable[[FormatCase, Path], None], tmp_path: Path) -> None:
    def write(folder: Path) -> Path:
        from safetensors.numpy import save_file

        (folder / "toy").mkdir(exist_ok=True)
        save_file({"layer.q:down": draw(1, 3, 40), "layer.q:up": draw(2, 24, 3)}, folder / "toy" / "toy.safetensors")
        (folder / "toy" / "toy.json").write_text('{"toy": "base"}')
        return folder / "toy"

    check(FormatCase(importlib.import_module("toy_format").TOY, write), tmp_path)


@pytest.mark.usefixtures("format", "kind")
def test_the_format_takes_the_kind_and_gives_it_to_every_other(base: Path, tmp_path: Path) -> None:
    adapter = core_file(tmp_path / "core")
    surgery.convert(adapter, "toy", output=tmp_path / "toy")
    assert read_adapter(tmp_path / "toy").format == "toy"
    for target in ("peft", "mlx"):
        surgery.convert(tmp_path / "toy", target, output=tmp_path / target)
        surgery.merge(base, tmp_path / target, output=tmp_path / f"{target} merged")
        assert_adds(base, tmp_path / f"{target} merged", deltas(adapter))
    surgery.combine([(tmp_path / "toy", 2.0), (tmp_path / "peft", -1.0)], output=tmp_path / "sum", to="toy")
    surgery.merge(base, tmp_path / "sum", output=tmp_path / "sum merged")
    assert_adds(base, tmp_path / "sum merged", deltas(adapter))


@pytest.mark.usefixtures("format", "kind")
def test_a_folder_with_a_model_and_a_plugins_adapter_is_an_adapter(base: Path, tmp_path: Path) -> None:
    surgery.convert(core_file(tmp_path / "core"), "peft", output=tmp_path / "peft")
    surgery.convert(tmp_path / "peft", "toy", output=tmp_path / "toy")
    for file in base.iterdir():
        shutil.copy(file, tmp_path / "toy")
    opened = surgery.open(tmp_path / "toy")
    assert isinstance(opened, surgery.Adapter)
    assert opened.format == "toy"
    (tmp_path / "toy" / "toy.safetensors").unlink()
    assert isinstance(surgery.open(tmp_path / "toy"), surgery.Checkpoint)  # a merged model that kept toy.json


def test_a_plugin_is_known_while_it_is_installed() -> None:
    from surgery_formats.adapters.peft.kinds import kinds
    from surgery_formats.errors import NotFoundError

    with installed_project(PLUGINS / "toy_low_rank"), installed_project(PLUGINS / "toy_format"):
        assert "CORE" in kinds()
        assert format_named("toy").name == "toy"
    assert "CORE" not in kinds()
    with pytest.raises(NotFoundError):
        format_named("toy")
