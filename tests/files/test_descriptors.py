# SPDX-License-Identifier: Apache-2.0
"""More files than descriptors: those that rest are closed, and are the same file when they are used again."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from surgery_formats.errors import ProofError
from surgery_formats.files import descriptors
from surgery_formats.files.output.folder import output_folder
from surgery_formats.files.output.manifest import verify_folder
from surgery_formats.files.raw import File, nameless_file, open_file
from tests.support.folder_jobs import PLAN, env
from tests.support.kit import ROOT

FEW = 8


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors._open, "_order", {})  # what other tests left open would be closed first
    monkeypatch.setattr(descriptors._open, "_most", FEW)


def _many(folder: Path, number: int = 40) -> list[File]:
    for index in range(number):
        (folder / f"{index}").write_bytes(bytes([index]) * 100)
    return [open_file(folder / f"{index}") for index in range(number)]


def _open_now() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_many_files_take_few_descriptors_and_read_as_ever(tmp_path: Path) -> None:
    before = _open_now()
    files = _many(tmp_path)
    assert _open_now() <= before + FEW + 2
    for _ in range(2):
        assert [bytes(file.read(7, 1)) for file in files] == [bytes([index]) for index in range(40)]
    assert _open_now() <= before + FEW + 2
    del files
    assert _open_now() <= before


def test_threads_that_read_at_once_read_their_own_files(tmp_path: Path) -> None:
    files = _many(tmp_path)
    barrier = threading.Barrier(12)

    def read(start: int) -> bool:
        barrier.wait(300)
        return all(files[(start + at) % 40].read(3, 90) == bytes([(start + at) % 40]) * 90 for at in range(400))

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(read, range(0, 36, 3)))


@pytest.mark.parametrize("change", ["written", "replaced", "gone"])
def test_a_file_that_changed_while_it_was_closed_is_no_longer_read(change: str, tmp_path: Path) -> None:
    first, *_ = files = _many(tmp_path)
    if change == "written":
        (tmp_path / "0").write_bytes(b"other")
    else:
        (tmp_path / "0").unlink()
    if change == "replaced":
        (tmp_path / "0").write_bytes(bytes(100))
    with pytest.raises(ProofError, match="disappeared while" if change == "gone" else "changed while"):
        first.read(0, 1)
    assert files[1].read(0, 1) == b"\1"


def test_what_has_no_name_stays_open(tmp_path: Path) -> None:
    nameless = nameless_file(b"here", tmp_path / "gone")
    _many(tmp_path)
    assert nameless.read(0, 4) == b"here"


def test_outputs_are_closed_between_writes_and_hold_everything(tmp_path: Path) -> None:
    before = _open_now()
    with output_folder(tmp_path / "out", PLAN) as folder:
        files = [folder.create(f"{index}", 64) for index in range(40)]
        for start in (0, 32):
            for index, file in enumerate(files):
                file.pwrite(bytes([index]) * 32, start)
        assert _open_now() <= before + FEW + 6  # folders and the journal
        for file in files:
            file.finish({})
        folder.commit({})
    verify_folder(tmp_path / "out")
    assert all((tmp_path / "out" / f"{index}").read_bytes() == bytes([index]) * 64 for index in range(40))


def test_a_model_of_more_files_than_descriptors_is_merged_and_verified(tmp_path: Path) -> None:
    made = f"""
import sys; sys.path[:0] = [{str(ROOT / "benchmarks")!r}]
from pathlib import Path
from shapes import Shape, write_adapter, write_base
shape = Shape(8, 20, 2, 1, 16, 32)
write_base(shape, Path("base"), shards=150)
write_adapter(shape, Path("lora"), rank=2)
"""
    environment = env() | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "formats", "cli"))}
    subprocess.run([sys.executable, "-c", made], cwd=tmp_path, env=environment, check=True)
    command = [sys.executable, "-m", "surgery_cli", "-q"]
    for words in (["merge", "base", "lora", "-o", "out"], ["verify", "out", "--against", "base"]):
        subprocess.run(
            [*command, *words],
            cwd=tmp_path,
            env=environment,
            check=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
        )
