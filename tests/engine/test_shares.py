# SPDX-License-Identifier: Apache-2.0
"""A merge in shares has the bytes of a merge in one process, whatever becomes of a worker."""

from __future__ import annotations

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
from surgery.engine.plan import Compute
from surgery.engine.shares import MergeRequest, Shares, merge_share
from surgery_formats.errors import FitError, ProofError
from tests.support.kit import HIDDEN, ROOT, environment, make_base, make_lora

EXAMPLES = ROOT / "examples"
WORKER = """
import os, pickle, signal, sys
from surgery.engine.execute import Run
from surgery.engine.shares import merge_share
request, plan_id, index, count, output, killed = pickle.load(sys.stdin.buffer)
progress = lambda step: os.kill(os.getpid(), signal.SIGKILL) if killed else None
merge_share(request, plan_id, index, count, output, Run(workers=1, progress=progress))
"""
SMALL = 10_000  # bytes per weight file, so that there are several


def worker(request: MergeRequest, plan_id: str, index: int, count: int, output: Path, *, killed: bool = False) -> int:
    """A process of its own, which gets nothing but plain values."""
    message = pickle.dumps((request, plan_id, index, count, str(output), killed))
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
    shares = [plan.share(index, count) for index in range(count)]
    labels = [tensor.label for share in shares for tensor in share.tensors]
    assert sorted(labels) == sorted(tensor.label for tensor in plan.tensors if isinstance(tensor.step, Compute))
    again = job.planned()[1]
    assert [again.share(index, count).nbytes for index in range(count)] == [share.nbytes for share in shares]
    with pytest.raises(FitError, match=f"no share {count} of {count}"):
        plan.share(count, count)


def test_three_shares_of_three_processes_are_one_merge(job: MergeRequest, tmp_path: Path):
    single = merge(job, output=tmp_path / "single").ledger
    assert len(single.plan.files) > 2
    output = tmp_path / "shared"
    for index in (2, 0, 1):
        worker(job, single.plan.id, index, 3, output)
    result = merge(job, output=output, engine=Shares(3))
    assert contents(output) == contents(tmp_path / "single")
    assert result.ledger.as_json() == single.as_json()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_killed_share_is_missed_and_run_again(job: MergeRequest, tmp_path: Path):
    plan_id = merge(job, output=tmp_path / "single").ledger.plan.id
    output = tmp_path / "shared"
    worker(job, plan_id, 0, 2, output)
    assert worker(job, plan_id, 1, 2, output, killed=True) == -signal.SIGKILL
    with pytest.raises(FitError, match="of 2 shares these are missing: 1"):
        merge(job, output=output, engine=Shares(2))
    assert not output.exists()
    worker(job, plan_id, 1, 2, output)
    worker(job, plan_id, 0, 2, output)  # once more does nothing
    merge(job, output=output, engine=Shares(2))
    assert contents(output) == contents(tmp_path / "single")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_worker_that_plans_another_merge_refuses(job: MergeRequest, tmp_path: Path):
    plan_id = merge(job, dry_run=True).ledger.plan.id
    with pytest.raises(ProofError, match="planned here, it is another merge"):
        merge_share(replace(job, dtype="fp16"), plan_id, 0, 2, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_damaged_share_is_noticed(job: MergeRequest, tmp_path: Path):
    plan_id = merge(job, dry_run=True).ledger.plan.id
    folder = merge_share(job, plan_id, 0, 1, tmp_path / "out")
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
        [merge_share(request, request.planned()[1].id, index, count, tmp_path / name) for index in range(count)]
        for name, request in (("out", job), ("elsewhere", other))
    ]
    shutil.rmtree(shares[0][-1])
    shares[1][-1].rename(shares[0][-1])
    with pytest.raises(ProofError, match="one of another merge"):
        merge(job, output=tmp_path / "out", engine=Shares(count))
    assert not (tmp_path / "out").exists()
    assert shares[0][-1].exists()


def test_there_is_no_merge_in_no_shares():
    with pytest.raises(FitError, match="no merge in 0 shares"):
        Shares(0)


def test_shares_of_the_shipped_example_are_one_merge(tmp_path: Path):
    request = MergeRequest(str(EXAMPLES / "base"), ((str(EXAMPLES / "dora"), 1.0),))
    single = surgery.merge(request.base, request.adapters, output=tmp_path / "single")
    for index in range(2):
        merge_share(request, single.ledger.plan.id, index, 2, tmp_path / "shared")
    surgery.merge(request.base, request.adapters, output=tmp_path / "shared", engine=Shares(2))
    assert contents(tmp_path / "shared") == contents(tmp_path / "single")
