# SPDX-License-Identifier: Apache-2.0
"""A merge in shares has the bytes of a merge in one process, whatever becomes of a worker."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import surgery
from surgery.engine.merge.merge_request import MergeRequest
from surgery.engine.plan import Compute
from surgery.engine.shares.folders import Assignment, Shares, assignments, write_share
from surgery_formats.errors import FitError, OutputExistsError, ProofError
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


@pytest.fixture
def job(tmp_path: Path) -> MergeRequest:
    base = make_base(tmp_path / "base")
    adapters = (str(make_lora(tmp_path / "a")), 0.7), (str(make_lora(tmp_path / "b", strength=0.3)), -0.5)
    return MergeRequest(str(base), adapters, shard_size=SMALL)


def merge(request: MergeRequest, **options: object) -> surgery.MergeResult:
    return surgery.merge(request.base, request.adapters, shard_size=request.shard_size, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 3, 50])
def test_every_computed_weight_is_in_one_share(job: MergeRequest, count: int):
    _, plan = job.planned()
    shares = plan.shares(count)
    labels = [tensor.label for each in shares for tensor in each.tensors]
    assert sorted(labels) == sorted(tensor.label for tensor in plan.tensors if isinstance(tensor.step, Compute))
    again = job.planned()[1]
    assert [again.share(index, count).nbytes for index in range(count)] == [each.nbytes for each in shares]
    with pytest.raises(FitError, match=f"no share {count} of {count}"):
        plan.share(count, count)


def test_three_shares_of_three_processes_are_one_merge(job: MergeRequest, tmp_path: Path):
    single = merge(job, output=tmp_path / "single").ledger
    assert len(single.plan.files) > 2
    output = tmp_path / "shared"
    for index in (2, 0, 1):
        worker(share(job, index, 3, output))
    result = merge(job, output=output, engine=Shares(3))
    assert contents(output) == contents(tmp_path / "single")
    assert result.ledger.as_json() == single.as_json()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


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
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_worker_that_plans_another_merge_refuses(job: MergeRequest, tmp_path: Path):
    sent = replace(share(job, 0, 2, tmp_path / "out"), request=replace(job, dtype="fp16"))
    with pytest.raises(ProofError, match="planned by a worker, it is other work"):
        write_share(sent)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


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
    data = bytearray((folder / "weights").read_bytes())
    data[-1] ^= 1
    (folder / "weights").write_bytes(data)
    with pytest.raises(ProofError, match="is not what the worker computed"):
        merge(job, output=tmp_path / "out", engine=Shares(1))
    assert not (tmp_path / "out").exists()
    assert folder.exists()


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
