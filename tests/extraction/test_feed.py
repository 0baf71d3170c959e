# SPDX-License-Identifier: Apache-2.0
"""What brings rows to a device, and the lanes that share it: every row once, in bounded memory, whatever fails."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from surgery.extraction.stream import feed, lanes
from surgery.extraction.stream.feed import DirectFeed, RowPair, StagedFeed
from surgery.extraction.stream.lanes import DeviceMemory, Lanes
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.plain import Plain


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
        staged = StagedFeed("cpu", 3)
        try:
            for way in (DirectFeed(), staged):
                seen = bytearray()

                def observe(offset: int, data: memoryview, seen: bytearray = seen) -> None:
                    assert offset == start * cols * 4 + len(seen), "in order"
                    seen += data

                got = [
                    RowPair(r.first, r.base.copy(), r.tuned.copy()) for r in way.pairs(one, other, start, stop, observe)
                ]
                assert [r.first for r in got] == [start + sum(len(r.base) for r in got[:at]) for at in range(len(got))]
                read = [np.concatenate([getattr(r, side) for r in got]) for side in ("base", "tuned") if got]
                expected = [values[start:stop].numpy(), -values[start:stop].bfloat16().float().numpy()]
                assert [side.astype(np.float32).tolist() for side in read] == [
                    side.tolist() for side in expected if got
                ]
                assert bytes(seen) == values[start:stop].numpy().tobytes()
        finally:
            staged.close()


@pytest.mark.parametrize(("readers", "most"), [(2, 64), (3, 80), (12, 320)])
def test_page_locked_memory_is_little_more_than_the_buffers(
    readers: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In MB, after torch's allocator has rounded each block up to a power of two."""
    blocks: list[np.ndarray] = []

    def allocated(device: str, nbytes: int) -> np.ndarray:
        blocks.append(np.empty(nbytes, np.uint8))  # the system gives no page that nobody touches
        return blocks[-1]

    taken: list[tuple[int, int]] = []
    take = feed._Buffers.take

    def counted(self: feed._Buffers) -> feed._Buffer:
        buffer = take(self)
        start = buffer.memory.ctypes.data
        taken.append((start, start + len(buffer.raw)))
        return buffer

    monkeypatch.setattr(feed, "_page_locked", allocated)
    monkeypatch.setattr(feed._Buffers, "take", counted)
    StagedFeed("cpu", readers).close()
    assert [stop - start for start, stop in taken] == [feed._CHUNK] * (2 * readers)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(sorted(taken))), "each has its own"
    assert sum(1 << (len(block) - 1).bit_length() for block in blocks) == most << 20


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
        thread.join(300)
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
