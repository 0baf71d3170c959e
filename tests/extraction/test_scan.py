# SPDX-License-Identifier: Apache-2.0
"""The one pass of an extraction: each byte is read once, wherever the arithmetic runs, and what is written is what was measured."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import surgery
from surgery import Rank
from surgery.engine.devices import devices_of
from surgery.engine.proof import read_back
from surgery.extraction.stream import feed, lanes
from surgery.extraction.stream.feed import DirectFeed, RowPair, StagedFeed
from surgery.extraction.stream.lanes import DeviceMemory, Lane, Lanes
from surgery.extraction.stream.scan import layout_of, warm
from surgery.extraction.stream.tally import Tally
from surgery_formats.adapters.format import Format
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError, MalformedError, ProofError
from surgery_formats.files.raw import File
from surgery_formats.linalg.noise import NoiseTally
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
    monkeypatch.setattr("surgery.extraction.noise._LOOKED_AT", 1)  # survival looks at samples of BASE: here at one row
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
    """The way to a GPU, with buffers so small that every matrix needs several and the lanes compete for them."""
    surgery.extract_lora(*pair, output=tmp_path / "direct")
    monkeypatch.setattr(feed, "_CHUNK", 256)
    used = []

    def staged() -> StagedFeed:
        used.append(StagedFeed(torch.device("cpu"), 3, 2))
        return used[-1]

    monkeypatch.setattr(lanes, "DirectFeed", staged)
    surgery.extract_lora(*pair, output=tmp_path / "staged", workers=4)
    assert len(used) == 4
    assert adapter_bytes(tmp_path / "direct") == adapter_bytes(tmp_path / "staged")


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), cols=st.integers(1, 9), cut=st.tuples(st.integers(0, 39), st.integers(1, 40)))
def test_feeds_hand_out_every_row_once(
    tmp_path_factory: pytest.TempPathFactory, rows: int, cols: int, cut: tuple[int, int]
) -> None:
    folder = tmp_path_factory.mktemp("feed")
    values = torch.arange(rows * cols, dtype=torch.float32).reshape(rows, cols)
    save_file({"a": values, "b": -values.bfloat16()}, folder / "model.safetensors")
    found = open_checkpoint(folder / "model.safetensors").main.tensors
    one, other = Plain.of(found["a"]), Plain.of(found["b"])
    start, stop = min(cut[0], rows), min(cut[0] + cut[1], rows)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("HOST_BLOCK", 20), ("DEVICE_BLOCK", 50), ("_CHUNK", 12)):
            patch.setattr(feed, name, value)
        staged = StagedFeed(torch.device("cpu"), 2, 3)
        try:
            for way in (DirectFeed(), staged):
                got = [RowPair(r.first, r.base.clone(), r.tuned.clone()) for r in way.pairs(one, other, start, stop)]
                assert [r.first for r in got] == [start + sum(len(r.base) for r in got[:at]) for at in range(len(got))]
                assert torch.equal(torch.cat([values[:0], *(r.base for r in got)]), values[start:stop])
                assert torch.equal(
                    torch.cat([values[:0].bfloat16(), *(r.tuned for r in got)]), -values[start:stop].bfloat16()
                )
        finally:
            staged.close()


def test_a_file_that_ends_early_ends_the_reading(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """And every buffer comes back, so that others are not left waiting."""
    monkeypatch.setattr(feed, "_CHUNK", 64)
    tensors = [open_checkpoint(folder).main.tensors["lm_head.weight"] for folder in pair]
    staged = StagedFeed(torch.device("cpu"), 2, 4)
    try:
        with open(pair[1] / "model.safetensors", "r+b") as file:
            file.truncate(tensors[1].offset + 1000)
        for _ in range(3):
            with pytest.raises(MalformedError, match="ends"):
                list(staged.pairs(Plain.of(tensors[0]), Plain.of(tensors[1]), 0, 64))
            assert staged._free.qsize() == 4
    finally:
        staged.close()


def test_memory_of_a_device_is_shared_out() -> None:
    memory, inside, peak, lock = DeviceMemory(100), [], [], threading.Lock()

    def job(size: int) -> None:
        with memory.reserve(size):
            with lock:
                inside.append(size)
                peak.append(sum(inside))
            threading.Event().wait(0.005)
            with lock:
                inside.remove(size)

    threads = [threading.Thread(target=job, args=(size,)) for size in (60, 30, 50, 400, 20, 70, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert max(size for size in peak if size != 400) <= 100
    assert 400 in peak, "what is larger than all of it comes alone"


def test_the_first_failure_stops_the_others() -> None:
    ran = []
    made = Lanes(("cpu", "cpu"), 2)

    def fail(lane: lanes.Lane, stop: lanes.Stop) -> None:
        raise FitError("no")

    try:
        with pytest.raises(FitError, match="no"):
            made.run([fail, *(lambda lane, stop: ran.append(stop()) for _ in range(200))])
        assert len(ran) < 200 or any(ran)
        made.run([lambda lane, stop: ran.append(stop())])
        assert ran[-1] is False, "and the lanes can be used again"
    finally:
        made.close()


@pytest.mark.parametrize(
    "text", ["gpu", "cuda:", "cuda:0,", "cuda:0,0", "cuda:99", "cpu,cuda", "cuda:all,0", "", "cuda:-1"]
)
def test_a_device_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(FitError, match=r"device|machine"):
        devices_of(text)


def test_devices_are_listed_by_number_or_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices_of("cpu") == ("cpu",)
    assert devices_of("cuda") == ("cuda:0",)
    assert devices_of("cuda:2,0") == ("cuda:2", "cuda:0")
    assert devices_of("cuda:all") == devices_of("auto") == ("cuda:0", "cuda:1", "cuda:2")


@pytest.mark.parametrize("height", [1, 3, 8, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_tally_is_right_in_blocks_of_any_height(dtype: torch.dtype, height: int, tmp_path: Path) -> None:
    """Against float64 and the definitions; rows that do not differ have no noise in them."""
    generator = torch.Generator().manual_seed(0)
    old = (torch.randn(64, 48, generator=generator, dtype=torch.float64) * 0.02).to(dtype)
    new = (old.double() + 1e-3 * torch.randn(64, 48, generator=generator, dtype=torch.float64)).to(dtype)
    new[10:30] = old[10:30]
    new[:, 7] = old[:, 7]
    save_file({"a": old, "b": new}, tmp_path / "x.safetensors")
    found = open_checkpoint(tmp_path / "x.safetensors").main.tensors
    one, other = Plain.of(found["a"]), Plain.of(found["b"])
    tally, noise = Tally(one, other, 64, 100), NoiseTally()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made = torch.empty(64, 48, dtype=wide)
    for at in range(0, 64, height):
        rows = slice(at, at + height)
        tally.subtract(at, old[rows], new[rows], made[rows], noise)
    change = new.double() - old.double()
    measure = tally.result()
    bits = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}[dtype]
    spacing = torch.exp2(torch.frexp(new.double()).exponent.double() - 1 - bits)
    hit = (change != 0).any(1)
    rounding = spacing[hit].square() / 12
    assert torch.equal(made, change.to(wide))
    assert measure.changed
    assert measure.rows == tuple(torch.nonzero(hit).flatten().tolist())
    assert measure.moved == int((change != 0).sum())
    assert measure.moved_share == measure.moved / change.numel()
    assert measure.energy == pytest.approx(float(change.square().sum()), rel=1e-6)
    assert measure.noise == pytest.approx(float(rounding.sum()), rel=1e-5)
    assert measure.ulp == float(spacing[hit].flatten().sort().values[(rounding.numel() - 1) // 2])
    assert noise.edge == pytest.approx(float(rounding.sum(1).max().sqrt() + rounding.sum(0).max().sqrt()), rel=1e-5)


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

    monkeypatch.setattr(File, "read_into", refuse)
    monkeypatch.setattr(Tally, "subtract", told)
    warm(layout, Lane(torch.device("cpu"), DirectFeed(), DeviceMemory(None)), lambda: False)
    assert len(done) == 1
    assert layout.targets, "a pair with matrices"


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
