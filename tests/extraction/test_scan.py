# SPDX-License-Identifier: Apache-2.0
"""The one pass of an extraction: each byte is read once, wherever the arithmetic runs, and what is written is what was measured."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery import Rank
from surgery.engine.proof import read_back
from surgery.extraction.extraction_plan import stored_factor_specs
from surgery.extraction.factorise import FactorisedStack
from surgery.extraction.ranks import rank_goal
from surgery.extraction.stream import batch, feed, lanes
from surgery.extraction.stream.feed import DirectFeed, StagedFeed
from surgery.extraction.stream.lanes import DeviceMemory, Lane
from surgery.extraction.stream.scan import warming
from surgery.extraction.stream.scan_plan import layout_of, plan_scan
from surgery.extraction.stream.tally import Tally
from surgery_formats.adapters.format import Format, Scaling
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError, ProofError
from surgery_formats.files.raw import File
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.models.identity import content_id
from surgery_formats.storage.plain import Plain
from tests.oracles import disk
from tests.support.kit import make_base


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Bf16, so that every difference has rounding in it; all matrices change, one norm does."""
    base, tuned = make_base(tmp_path / "base"), make_base(tmp_path / "tuned")
    generator = torch.Generator().manual_seed(1)
    tensors = disk.read_tensors(base)
    for name, value in tensors.items():
        change = 0.02 * torch.randn(value.shape, generator=generator)
        tensors[name] = (value.float() + change).to(value.dtype)
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    return base, tuned


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "ask", [{"rank": 4}, {"rank": 2, "alpha": 3.0}, {"rank": Rank.energy(0.5)}, {"rank": Rank.error(0.5)}], ids=str
)
def test_each_matrix_is_read_once(
    ask: dict[str, float], pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[Path, list[tuple[int, int]]] = {folder: [] for folder in pair}
    read, lock = File.read_into, threading.Lock()

    def counting(self: File, buffer: memoryview, offset: int) -> None:
        if self.path.parent in seen:
            with lock:
                seen[self.path.parent].append((offset, offset + len(buffer)))
        read(self, buffer, offset)

    monkeypatch.setattr("surgery_formats.models.identity._WHOLE", 0)  # fingerprints of large files read samples
    monkeypatch.setattr("surgery_formats.models.identity._HEAD", 1)
    monkeypatch.setattr("surgery_formats.models.identity._SAMPLE", 1)
    before = content_id(open_checkpoint(pair[0]))
    monkeypatch.setattr(File, "read_into", counting)
    monkeypatch.setattr(
        "surgery.extraction.sampling._LOOKED_AT", 1
    )  # survival looks at samples of BASE: here at one row
    result = surgery.extract_lora(*pair, output=tmp_path / "out", kind="lora", **ask)  # type: ignore[arg-type]
    monkeypatch.undo()
    assert result.base_id == before
    for folder in pair:
        for tensor in open_checkpoint(folder).main.tensors.values():
            start, stop = tensor.offset, tensor.offset + tensor.nbytes
            total = sum(max(0, min(stop, b) - max(start, a)) for a, b in seen[folder] if b - a > 1)
            if len(tensor.shape) == 2:
                sample = tensor.nbytes // tensor.shape[0] if folder == pair[0] else 0
                assert total == tensor.nbytes + sample, tensor.name


def test_what_is_left_of_each_matrix_is_that_of_the_written_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """In float64, from the files alone: bf16 factors, so that rounding them counts."""
    before, after = (disk.read_tensors(folder) for folder in pair)
    for ask in ({"rank": 4}, {"rank": 32}, {"rank": 16, "alpha": 5.0, "rslora": True}, {"rank": Rank.energy(0.7)}):
        out = tmp_path / "out"
        result = surgery.extract_lora(*pair, output=out, overwrite=True, **ask)  # type: ignore[arg-type]
        written, config = (
            load_file(out / "adapter_model.safetensors"),
            json.loads((out / "adapter_config.json").read_text()),
        )
        seen = 0
        for row in result.rows:
            if row.kind != "low-rank" or "embed" in row.name:
                continue
            module = row.name.removesuffix(".weight")
            a, b = (written[f"base_model.model.{module}.lora_{k}.weight"].double() for k in "AB")
            alpha = config["alpha_pattern"].get(f"^{module.replace('.', chr(92) + '.')}", config["lora_alpha"])
            scale = alpha / (math.sqrt(row.rank) if config["use_rslora"] else row.rank)
            change = after[row.name].double() - before[row.name].double()
            true = float((change - scale * b @ a).norm() / change.norm())
            assert row.residual == pytest.approx(true, rel=1e-3)
            seen += 1
        assert seen == 11


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("device", ["cpu", "cpu,cpu", "cpu,cpu,cpu"])
def test_the_same_bytes_on_any_number_of_devices(
    device: str, workers: int, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    surgery.extract_lora(*pair, output=tmp_path / "one", workers=1)
    surgery.extract_lora(*pair, output=tmp_path / "many", device=device, workers=workers)
    assert adapter_bytes(tmp_path / "one") == adapter_bytes(tmp_path / "many")


def test_the_same_bytes_through_staging_buffers(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way to a GPU, with buffers so small that every matrix needs several and readers share it out."""
    surgery.extract_lora(*pair, output=tmp_path / "direct")
    monkeypatch.setattr(feed, "_CHUNK", 256)
    used = []

    def staged() -> StagedFeed:
        used.append(StagedFeed("cpu", 3))
        return used[-1]

    monkeypatch.setattr(lanes, "DirectFeed", staged)
    surgery.extract_lora(*pair, output=tmp_path / "staged", workers=4)
    assert len(used) == 4
    assert adapter_bytes(tmp_path / "direct") == adapter_bytes(tmp_path / "staged")


def test_a_file_that_ends_early_ends_the_reading(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without leaving a reader waiting for bytes that never come."""
    monkeypatch.setattr(feed, "_CHUNK", 64)
    old, new = (Plain.of(open_checkpoint(folder).main.tensors["lm_head.weight"]) for folder in pair)
    staged = StagedFeed("cpu", 4)
    try:
        with open(pair[0] / "model.safetensors", "r+b") as file:
            file.truncate(old.sources[0].offset + 1000)
        for _ in range(3):
            with pytest.raises(MalformedError, match="ends"):
                list(staged.pairs(old, new, 0, 64, lambda offset, data: None))
        assert [len(rows.tuned) for rows in staged.pairs(new, new, 0, 64)] == [64], "and it can be used again"
    finally:
        staged.close()


def test_an_extraction_says_where_it_was_computed_if_that_was_left_open(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    left_open = surgery.extract_lora(*pair, output=tmp_path / "open", rank=4, device="auto")
    chosen = surgery.extract_lora(*pair, output=tmp_path / "chosen", rank=4)
    assert left_open.as_json()["devices"] == chosen.as_json()["devices"] == ["cpu"]
    assert "sooner done there" in left_open.summary().as_text()
    assert "computed" not in chosen.summary().as_text()


def test_alike_matrices_are_batched_and_give_the_same(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the same figures up to rounding, whatever number of lanes runs the batches."""
    tensors = {folder: disk.read_tensors(folder) for folder in pair}
    same = next(name for name in tensors[pair[1]] if name.endswith("layers.1.self_attn.q_proj.weight"))
    tensors[pair[1]][same] = tensors[pair[0]][same]
    save_file(tensors[pair[1]], pair[1] / "model.safetensors", {"format": "pt"})
    alone = surgery.extract_lora(*pair, output=tmp_path / "alone", rank=4)
    monkeypatch.setattr("surgery.verbs.extract_lora.on_gpus", lambda devices: True)
    monkeypatch.setattr("surgery_formats.linalg.svd_stack.SMALL", 1)
    monkeypatch.setattr("surgery.extraction.stream.batch._ELEMENTS", 3 * 64 * 64)
    calls: list[int] = []
    stacked = batch.factorise_stack

    def counted(stack: Array, *args: Any, **options: Any) -> FactorisedStack:
        calls.append(len(stack))
        return stacked(stack, *args, **options)

    monkeypatch.setattr(batch, "factorise_stack", counted)
    for workers in (1, 3):
        surgery.extract_lora(*pair, output=tmp_path / f"many{workers}", rank=4, workers=workers)
    together = surgery.extract_lora(*pair, output=tmp_path / "together", rank=4, workers=2)
    assert max(calls) >= 2
    assert (
        adapter_bytes(tmp_path / "many1") == adapter_bytes(tmp_path / "many3") == adapter_bytes(tmp_path / "together")
    )
    for one, other in zip(alone.rows, together.rows, strict=True):
        assert (one.name, one.kind, one.moved) == (other.name, other.kind, other.moved)
        assert other.residual == pytest.approx(one.residual, rel=1e-3)
        assert other.noise == pytest.approx(one.noise, rel=1e-6)
        assert other.bound <= max(one.bound, 1.001)
    assert next(row.kind for row in together.rows if row.name == same) == "unchanged"
    assert together.base_id == alone.base_id
    assert together.kind.rows == pytest.approx(alone.kind.rows, abs=1e-5)
    assert together.survival == pytest.approx(alone.survival, rel=1e-5)


def corrupted(folder: Path, what: str) -> None:
    """After writing, before the proof."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    names = sorted(name for name in tensors if "layers.1" in name and "lora_B" in name)
    if what == "one bit":
        tensors[names[0]].view(torch.int16)[0, 0] ^= 1
    elif what == "two modules exchanged":
        tensors[names[1]], tensors[names[2]] = tensors[names[2]], tensors[names[1]]
    elif what == "another scale":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1.01 * config["lora_alpha"]}))
    elif what == "a scale for one":
        config = json.loads((folder / "adapter_config.json").read_text())
        pattern = {"^model\\.layers\\.1\\.self_attn\\.q_proj": 5}
        (folder / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": pattern}))
    elif what == "a norm":
        name = next(name for name in tensors if "norm" in name)
        tensors[name][3] += 0.5
    save_file(tensors, path)


@pytest.mark.parametrize("what", ["one bit", "two modules exchanged", "another scale", "a scale for one", "a norm"])
def test_what_is_not_what_was_measured_is_no_output(
    what: str, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after(target: Format, folder: Path) -> Adapter:
        corrupted(folder, what)
        return read_back(target, folder)

    monkeypatch.setattr("surgery.extraction.output.read_back", after)
    with pytest.raises(ProofError):
        surgery.extract_lora(*pair, output=tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()


def test_timings_are_told_and_not_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = surgery.extract_lora(*pair, output=tmp_path / "out", rank=4)
    parts = dict(result.timings)
    whole, starting = parts.pop("first_read_to_synced"), parts.pop("starting")
    assert starting >= 0
    assert {"reading", "kind", "noise", "writing", "syncing", "proving", "committing"} <= set(parts)
    assert sum(parts.values()) == pytest.approx(whole, abs=0.05)  # nothing that takes long has no name
    assert "timings" not in json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())


def test_a_lane_is_warmed_without_reading(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (open_checkpoint(folder).main for folder in pair)
    layout, done = layout_of(old, new, full=False), []
    subtract = Tally.subtract

    def refuse(self: File, buffer: memoryview, offset: int) -> None:
        raise AssertionError("read")

    def told(self: Tally, *args: object) -> None:
        done.append(args)
        subtract(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr("surgery.extraction.stream.scan._WARM", (512, 384))
    monkeypatch.setattr(File, "read_into", refuse)
    monkeypatch.setattr(Tally, "subtract", told)
    monkeypatch.setattr(batch, "_measured", lambda group, *sides: group)
    monkeypatch.setattr(batch, "_factorised", lambda like, *rest: done.append(like))
    goal = rank_goal(Rank.of(4))
    specs = stored_factor_specs(goal, Scaling(None, False, 4), DType.BF16)
    warm = warming(plan_scan(layout, goal, specs, on_gpus=True))
    for _ in range(2):
        warm(Lane("cpu", DirectFeed(), DeviceMemory(None)), lambda: False)
    shapes = {group.like.shape for group in batch.batches_of(layout.factorised, goal, specs)}
    assert len(shapes) >= 2
    assert len(done) == 2 + len(shapes), "each lane a matrix, and all of them together one batch of each shape"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_same_on_a_gpu(pair: tuple[Path, Path], tmp_path: Path) -> None:
    here = surgery.extract_lora(*pair, output=tmp_path / "cpu", rank=4)
    there = surgery.extract_lora(*pair, output=tmp_path / "gpu", rank=4, device="cuda")
    again = surgery.extract_lora(*pair, output=tmp_path / "again", rank=4, device="cuda:all", workers=3)
    assert adapter_bytes(tmp_path / "gpu") == adapter_bytes(tmp_path / "again")
    for one, other in zip(here.rows, there.rows, strict=True):
        assert (one.name, one.kind, one.moved) == (other.name, other.kind, other.moved)
        assert one.residual == pytest.approx(other.residual, rel=1e-3)
        assert one.noise == pytest.approx(other.noise, rel=1e-4)
    assert again.residual == there.residual


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("elements", [1 << 28, 3 * 640 * 512])
def test_batches_on_a_gpu_give_the_same(elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of matrices large enough for Krylov, both ways round; one did not change."""
    monkeypatch.setattr(batch, "_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, dict[str, torch.Tensor]] = {"base": {}, "tuned": {}}
    for number in range(10):
        shape = (640, 512) if number % 2 else (512, 640)
        old = 0.02 * torch.randn(shape, generator=generator)
        new = old + 1e-3 * torch.randn(shape, generator=generator) if number else old
        for side, value in (("base", old), ("tuned", new)):
            tensors[side][f"model.layers.{number}.mlp.up_proj.weight"] = value.bfloat16()
    for side, values in tensors.items():
        save_file(values, tmp_path / f"{side}.safetensors")
    ends = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    here = surgery.extract_lora(*ends, output=tmp_path / "cpu", rank=8)
    made = []
    for number, options in enumerate([{"workers": 1}, {"workers": 3}, {"device": "cuda:all"}]):
        out = tmp_path / str(number)
        made.append(surgery.extract_lora(*ends, output=out, rank=8, **{"device": "cuda", **options}))  # type: ignore[arg-type]
        assert adapter_bytes(out) == adapter_bytes(tmp_path / "0")
    for one, other in zip(here.rows, made[0].rows, strict=True):
        assert (one.name, one.kind, one.moved) == (other.name, other.kind, other.moved)
        assert one.residual == pytest.approx(other.residual, rel=1e-3)
        assert one.noise == pytest.approx(other.noise, rel=1e-4)
