# SPDX-License-Identifier: Apache-2.0
"""A merge in shares has the bytes of a merge in one process, whatever becomes of a worker."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.engine.merge.merge_request import MergeRequest
from surgery.engine.plan import Compute
from surgery.engine.shares import planned
from surgery.engine.shares.folders import Assignment, Shares, assignments, write_share
from surgery_formats.errors import FitError, OutputExistsError, ProofError, ResourceError
from tests.support.kit import HIDDEN, ROOT, environment, make_base, make_lora

EXAMPLES = ROOT / "examples"
WORKER = """
import os, pickle, signal, sys
from surgery.engine.execute import Run
from surgery.engine.shares.folders import write_share
assignment, killed = pickle.load(sys.stdin.buffer)
progress = lambda step: os.kill(os.getpid(), signal.SIGKILL) if killed else None
write_share(assignment, Run(workers=1, progress=progress))
"""
SMALL = 10_000  # bytes per weight file, so that there are several


def share(request: MergeRequest, index: int, count: int, output: Path) -> Assignment:
    return assignments(request, request.work(), output, count)[index]


def worker(assignment: Assignment, *, killed: bool = False) -> int:
    """A process of its own, which gets nothing but plain values."""
    message = pickle.dumps((assignment, killed))
    done = subprocess.run(
        [sys.executable, "-c", WORKER], env=environment(), input=message, capture_output=True, check=False
    )
    assert done.returncode == 0 or killed, done.stderr.decode()
    return done.returncode


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def request_for(folder: Path, shard_size: int | None) -> MergeRequest:
    base = make_base(folder / "base")
    adapters = (str(make_lora(folder / "a")), 0.7), (str(make_lora(folder / "b", strength=0.3)), -0.5)
    return MergeRequest(str(base), adapters, shard_size=shard_size)


@pytest.fixture(params=[SMALL, None], ids=["shares of files", "shares of weights"])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> MergeRequest:
    return request_for(tmp_path, request.param)


@pytest.fixture
def of_files(tmp_path: Path) -> MergeRequest:
    return request_for(tmp_path, SMALL)


@pytest.fixture
def of_weights(tmp_path: Path) -> MergeRequest:
    return request_for(tmp_path, None)


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def merge(request: MergeRequest, **options: object) -> surgery.MergeResult:
    given = {"shard_size": request.shard_size, "reversible": request.reversible, **options}
    return surgery.merge(request.base, request.adapters, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 3, 50])
def test_every_computed_weight_is_in_one_share(of_weights: MergeRequest, count: int):
    plan = of_weights.work().plan
    shares = plan.shares(count)
    labels = [tensor.label for each in shares for tensor in each.tensors]
    assert sorted(labels) == sorted(tensor.label for tensor in plan.tensors if isinstance(tensor.step, Compute))
    again = of_weights.work()
    assert not again.makes_files
    assert [each.nbytes for each in again.shares(count)] == [each.nbytes for each in shares]


@pytest.mark.parametrize("count", [1, 3, 50])
def test_every_file_is_in_one_share(of_files: MergeRequest, count: int):
    work = of_files.work()
    assert work.makes_files
    files = [file for share in work.shares(count) for file in share.files]
    assert sorted(files, key=lambda file: file.name) == sorted(work.plan.files, key=lambda file: file.name)
    names = [[file.name for file in share.files] for share in work.shares(count)]
    assert [[file.name for file in share.files] for share in of_files.work().shares(count)] == names


def test_a_weight_in_two_files_is_computed_by_itself(of_files: MergeRequest):
    plan = of_files.work().plan
    first, *others = plan.files
    changed = next(tensor for file in others for tensor in file.tensors if isinstance(tensor.step, Compute))
    cut = replace(first, tensors=(*first.tensors, replace(changed, name="its scales", part=1)))
    assert plan.is_of_whole_files
    assert not replace(plan, files=(cut, *others)).is_of_whole_files
    assert not replace(plan, files=plan.files[:3]).is_of_whole_files


def test_there_are_as_many_shares_as_were_counted(job: MergeRequest, tmp_path: Path):
    with pytest.raises(FitError, match="no share 3 of 3"):
        write_share(replace(share(job, 0, 3, tmp_path / "out"), index=3))
    assert hidden(tmp_path) == []


def test_three_shares_of_three_processes_are_one_merge(job: MergeRequest, tmp_path: Path):
    single = merge(job, output=tmp_path / "single").ledger
    output = tmp_path / "shared"
    for index in (2, 0, 1):
        worker(share(job, index, 3, output))
    result = merge(job, output=output, engine=Shares(3))
    assert contents(output) == contents(tmp_path / "single")
    assert result.ledger.as_json() == single.as_json()
    assert hidden(tmp_path) == []


def test_a_killed_share_is_missed_and_run_again(job: MergeRequest, tmp_path: Path):
    merge(job, output=tmp_path / "single")
    output = tmp_path / "shared"
    worker(share(job, 0, 2, output))
    assert worker(share(job, 1, 2, output), killed=True) == -signal.SIGKILL
    with pytest.raises(FitError, match="of 2 shares these are missing: 1"):
        merge(job, output=output, engine=Shares(2))
    assert not output.exists()
    worker(share(job, 1, 2, output))
    worker(share(job, 0, 2, output))  # once more does nothing
    merge(job, output=output, engine=Shares(2))
    assert contents(output) == contents(tmp_path / "single")
    assert hidden(tmp_path) == []


def test_a_worker_that_plans_another_merge_refuses(job: MergeRequest, tmp_path: Path):
    sent = replace(share(job, 0, 2, tmp_path / "out"), request=replace(job, dtype="fp16"))
    with pytest.raises(ProofError, match="planned by a worker, it is other work"):
        write_share(sent)
    assert hidden(tmp_path) == []


def test_a_worker_of_another_version_refuses(job: MergeRequest, tmp_path: Path):
    with pytest.raises(ProofError, match=r"a worker has version .* of surgery, and the driver 0\.0\.1"):
        write_share(replace(share(job, 0, 2, tmp_path / "out"), version="0.0.1"))


def test_a_worker_that_sees_an_input_of_another_time_refuses(job: MergeRequest, tmp_path: Path):
    sent = share(job, 0, 2, tmp_path / "out")
    os.utime(Path(job.base) / "model.safetensors", ns=(0, 0))
    with pytest.raises(ProofError, match="inputs of other sizes or times"):
        write_share(sent)


def test_shares_of_an_output_with_the_longest_name(job: MergeRequest, tmp_path: Path):
    output = tmp_path / ("x" * 250)
    folders = {write_share(share(job, index, 3, output)) for index in range(3)}
    assert len(folders) == 3
    merge(job, output=output, engine=Shares(3))
    assert not any(folder.exists() for folder in folders)


def test_an_output_that_is_there_is_told_before_any_share_is_asked_for(job: MergeRequest, tmp_path: Path):
    merge(job, output=tmp_path / "out")
    with pytest.raises(OutputExistsError):
        merge(job, output=tmp_path / "out", engine=Shares(2))  # shares that nobody wrote


def test_a_damaged_share_is_noticed(job: MergeRequest, tmp_path: Path):
    folder = write_share(share(job, 0, 1, tmp_path / "out"))
    file = sorted([*folder.glob("weights"), *folder.glob("*.safetensors")])[-1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ProofError, match=r"is not what the worker (computed|wrote)"):
        merge(job, output=tmp_path / "out", engine=Shares(1))
    assert not (tmp_path / "out").exists()
    assert hidden(tmp_path) == [folder.name]
    shutil.rmtree(folder)
    worker(share(job, 0, 1, tmp_path / "out"))
    merge(job, output=tmp_path / "out", engine=Shares(1))


@pytest.mark.parametrize("left", [0, 100])
def test_a_file_of_a_share_that_is_gone_or_short_is_noticed(of_files: MergeRequest, tmp_path: Path, left: int):
    folder = write_share(share(of_files, 1, 2, tmp_path / "out"))
    write_share(share(of_files, 0, 2, tmp_path / "out"))
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:left]) if left else file.unlink()
    with pytest.raises(ProofError, match=r"is not the file of \d+ bytes that a worker wrote"):
        merge(of_files, output=tmp_path / "out", engine=Shares(2))
    assert not (tmp_path / "out").exists()


def test_files_are_taken_over_and_not_read(of_files: MergeRequest, tmp_path: Path):
    folders = [write_share(share(of_files, index, 2, tmp_path / "out")) for index in range(2)]
    inodes = {path.name: path.stat().st_ino for folder in folders for path in folder.glob("*.safetensors")}
    read: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned, "same_digest", lambda path, record: read.append(path))
        patch.setattr(planned, "open_file", lambda path: read.append(path))
        merge(of_files, output=tmp_path / "out", engine=Shares(2))
    assert read == []
    assert {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.safetensors")} == inodes
    assert all((tmp_path / "out" / name).stat().st_nlink == 1 for name in inodes)


def test_a_file_of_another_time_counts_if_it_has_the_hash(of_files: MergeRequest, tmp_path: Path):
    merge(of_files, output=tmp_path / "single")
    folder = write_share(share(of_files, 0, 1, tmp_path / "out"))
    for path in folder.glob("*.safetensors"):
        os.utime(path, ns=(0, 0))
    merge(of_files, output=tmp_path / "out", engine=Shares(1))
    assert contents(tmp_path / "out") == contents(tmp_path / "single")


@pytest.mark.parametrize("fault", [errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP])
def test_where_there_are_no_links_bytes_are_copied(
    of_files: MergeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int
):
    merge(of_files, output=tmp_path / "single")
    for index in range(3):
        write_share(share(of_files, index, 3, tmp_path / "out"))

    def refuse(*args: object, **options: object) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "link", refuse)
    merge(of_files, output=tmp_path / "out", engine=Shares(3))
    assert contents(tmp_path / "out") == contents(tmp_path / "single")
    assert hidden(tmp_path) == []


def test_a_full_disk_while_files_are_taken_over_loses_no_share(
    of_files: MergeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folders = [write_share(share(of_files, index, 2, tmp_path / "out")) for index in range(2)]
    link, calls = os.link, []

    def fail(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        link(*args, **options)

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(ResourceError, match="no space left"):
        merge(of_files, output=tmp_path / "out", engine=Shares(2))
    assert sorted(hidden(tmp_path)) == sorted(folder.name for folder in folders)
    merge(of_files, output=tmp_path / "out", engine=Shares(2))
    assert hidden(tmp_path) == []


DRIVER = """
import os, signal, sys
import surgery
from surgery.engine.shares.folders import Shares
from surgery_formats.files.output.folder import OutputFolder
base, a, b, output, size, after = sys.argv[1:]
name = "take" if int(after) < 4 else "commit"
before, calls = getattr(OutputFolder, name), []
def killed(*args):
    calls.append(args)
    result = before(*args) if name == "take" else None
    if name == "commit" or len(calls) > int(after):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(OutputFolder, name, killed)
surgery.merge(base, [(a, 0.7), (b, -0.5)], output=output, shard_size=int(size), engine=Shares(2))
"""


@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_driver_killed_while_it_takes_files_over_goes_on(of_files: MergeRequest, tmp_path: Path, after: int):
    merge(of_files, output=tmp_path / "single")
    folders = [write_share(share(of_files, index, 2, tmp_path / "out")) for index in range(2)]
    inodes = {path.stat().st_ino for folder in folders for path in folder.glob("*.safetensors")}
    words = [of_files.base, *(path for path, _ in of_files.adapters), str(tmp_path / "out"), str(SMALL), str(after)]
    done = subprocess.run([sys.executable, "-c", DRIVER, *words], env=environment(), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "out").exists()
    merge(of_files, output=tmp_path / "out", engine=Shares(2))
    assert contents(tmp_path / "out") == contents(tmp_path / "single")
    assert {path.stat().st_ino for path in (tmp_path / "out").glob("*.safetensors")} == inodes
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("option", ["verify_copies", "reversible", "overwrite"])
def test_options_of_the_command_hold_for_shares(job: MergeRequest, tmp_path: Path, option: str):
    asked = replace(job, reversible=option == "reversible")
    if option == "overwrite":
        merge(replace(job, adapters=job.adapters[:1]), output=tmp_path / "out")
    given = {} if option == "reversible" else {option: True}
    merge(asked, output=tmp_path / "single", **given)
    for index in range(3):
        every = assignments(asked, asked.work(), tmp_path / "out", 3, verify=option == "verify_copies")
        worker(every[index])
    merge(asked, output=tmp_path / "out", engine=Shares(3), **given)
    assert contents(tmp_path / "out") == contents(tmp_path / "single")
    assert hidden(tmp_path) == []
    surgery.verify(tmp_path / "out")


def test_a_share_without_the_hashes_that_are_asked_for_is_missed(of_files: MergeRequest, tmp_path: Path):
    write_share(share(of_files, 0, 1, tmp_path / "out"))
    with pytest.raises(FitError, match="of 1 shares these are missing: 0"):
        merge(of_files, output=tmp_path / "out", engine=Shares(1), verify_copies=True)


@pytest.mark.parametrize("count", [1, 2])
def test_a_share_of_another_base_under_this_name_is_noticed(job: MergeRequest, tmp_path: Path, count: int):
    other = replace(job, base=str(make_base(tmp_path / "other", **{"lm_head.weight": torch.ones(64, HIDDEN)})))
    shares = [
        [write_share(share(request, index, count, tmp_path / name)) for index in range(count)]
        for name, request in (("out", job), ("elsewhere", other))
    ]
    shutil.rmtree(shares[0][-1])
    shares[1][-1].rename(shares[0][-1])
    with pytest.raises(ProofError, match="one of other work"):
        merge(job, output=tmp_path / "out", engine=Shares(count))
    assert not (tmp_path / "out").exists()
    assert shares[0][-1].exists()


def test_there_is_no_work_in_no_shares():
    with pytest.raises(FitError, match="no work in 0 shares"):
        Shares(0)


def test_shares_of_the_shipped_example_are_one_merge(tmp_path: Path):
    request = MergeRequest(str(EXAMPLES / "base"), ((str(EXAMPLES / "dora"), 1.0),))
    surgery.merge(request.base, request.adapters, output=tmp_path / "single")
    for index in range(2):
        write_share(share(request, index, 2, tmp_path / "shared"))
    surgery.merge(request.base, request.adapters, output=tmp_path / "shared", engine=Shares(2))
    assert contents(tmp_path / "shared") == contents(tmp_path / "single")
