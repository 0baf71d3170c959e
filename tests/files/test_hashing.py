# SPDX-License-Identifier: Apache-2.0
"""Hashes are those of the files on disk, in whatever order and by whomever the bytes were written."""

from __future__ import annotations

import hashlib
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from surgery_formats.errors import ProofError
from surgery_formats.files.descriptors import Descriptor
from surgery_formats.files.output import hashing
from surgery_formats.files.output.folder import SIGNED, output_folder
from surgery_formats.files.output.hashing import FollowingHash, root_digest
from surgery_formats.files.output.manifest import MANIFEST, verify_folder
from surgery_formats.files.raw import open_file
from tests.support.folder_jobs import leave_stage

PLAN = "ab" * 32
SIZE = 1 << 20


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a file of a MB is hashed while it is written, in many pieces."""
    monkeypatch.setattr(hashing, "_STEP", 100_000)
    monkeypatch.setattr(hashing, "_BLOCK", 7_000)


def _entries(folder: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((folder / MANIFEST).read_bytes())["files"]
    return found


@pytest.mark.parametrize("threads", [1, 8])
def test_bytes_that_come_in_any_order_are_hashed_in_their_own(threads: int, tmp_path: Path) -> None:
    data = random.Random(0).randbytes(SIZE)
    places = [(at, min(9_973, SIZE - at)) for at in range(0, SIZE, 9_973)]
    random.Random(1).shuffle(places)
    (tmp_path / "source").write_bytes(data)
    source = open_file(tmp_path / "source")
    with output_folder(tmp_path / "out", PLAN, hashes=SIGNED) as folder:
        file = folder.create("weights", SIZE)

        def put(place: tuple[int, int]) -> None:
            at, nbytes = place
            if at % 2:
                file.copy_from(source, at, at, nbytes)
            else:
                file.pwrite(data[at : at + nbytes], at)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(put, places))
        file.finish({})
        folder.commit({})
    entry = _entries(tmp_path / "out")["weights"]
    assert entry["sha256"] == hashlib.sha256(data).hexdigest()
    assert entry["xxh3"] == xxhash.xxh3_128_hexdigest(data)


def test_what_is_written_twice_is_hashed_as_it_is_in_the_end(tmp_path: Path) -> None:
    data = random.Random(2).randbytes(SIZE)
    with output_folder(tmp_path / "out", PLAN) as folder:
        file = folder.create("weights", SIZE)
        file.pwrite(bytes(SIZE), 0)
        file.pwrite(data[:500_000], 0)
        file.pwrite(data[500_000:], 500_000)
        file.finish({})
        folder.commit({})
    assert _entries(tmp_path / "out")["weights"]["xxh3"] == xxhash.xxh3_128_hexdigest(data)


def test_a_file_that_cannot_be_read_back_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(1000))
    with (tmp_path / "short").open("rb") as file, ThreadPoolExecutor(1) as pool:
        state = FollowingHash(Descriptor(os.dup(file.fileno()), None), SIZE, SIGNED, pool)
        state.reached(500_000, 0)
        with pytest.raises(OSError, match="ends at byte 1000"):
            state.complete().result(timeout=300)


def test_a_hash_that_is_given_up_midway_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole").write_bytes(bytes(SIZE))
    preadv = os.preadv
    with (tmp_path / "whole").open("rb") as file, ThreadPoolExecutor(1) as pool:
        state = FollowingHash(Descriptor(os.dup(file.fileno()), None), SIZE, SIGNED, pool)

        def last(fd: int, buffers: list[memoryview], offset: int) -> int:
            if offset >= SIZE - 50_000:
                state.stop()
            return preadv(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", last)
        with pytest.raises(OSError, match="canceled"):
            state.complete().result(timeout=300)


def test_threads_that_are_late_make_no_second_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    with output_folder(tmp_path / "out", PLAN) as folder:
        file = folder.create("weights", SIZE)

        def reached(written: int, changed_from: int) -> None:
            assert file._lock.locked()  # so that what is told is in the order of what was noted
            told.append((written, changed_from))

        monkeypatch.setattr(file._hash, "reached", reached)
        file.pwrite(bytes(10), 0)
        file.pwrite(bytes(10), 10)
    assert told == [(10, 0), (20, 10)]


def test_a_folder_that_is_given_up_waits_for_no_hash(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out", PLAN) as folder:
        folder.create("weights", SIZE).pwrite(bytes(SIZE), 0)
    assert not list(tmp_path.iterdir())


def test_a_resumed_file_has_the_hashes_that_are_asked_for(tmp_path: Path) -> None:
    leave_stage(tmp_path / "out", {"weights": "0123456789"}, PLAN)
    with output_folder(tmp_path / "out", PLAN, hashes=SIGNED) as folder:
        assert "weights" not in folder.finished  # its record has no sha256
    leave_stage(tmp_path / "again", {"weights": "0123456789"}, PLAN)
    with output_folder(tmp_path / "again", PLAN) as folder:
        assert "weights" in folder.finished


def test_the_digest_of_a_folder_is_that_of_model_signing() -> None:
    files = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a-b", "a/b", "a/a", "B", "é")}
    # `model_signing sign key` 1.1.1 of a folder with files that hold their own names: subject[0].digest.sha256
    assert root_digest(files) == "bf78d3fb02142690cfb1d00cc797c80f2a1ac469dd570071ce9b3d94abd8f655"


def test_a_flipped_byte_names_its_file(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out", PLAN) as folder:
        for name in ("one", "two"):
            file = folder.create(name, SIZE)
            file.pwrite(bytes(SIZE), 0)
            file.finish({})
        folder.commit({})
    verify_folder(tmp_path / "out")
    with (tmp_path / "out" / "two").open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(b"\1")
    with pytest.raises(ProofError, match="changed since it was written") as caught:
        verify_folder(tmp_path / "out")
    assert caught.value.file == str(tmp_path / "out" / "two")
