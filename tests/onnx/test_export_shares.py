# SPDX-License-Identifier: Apache-2.0
"""An export whose weights were computed in shares has the bytes of one in a single process."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import surgery
from surgery.engine.shares.folders import Assignment, Shares, assignments, write_share
from surgery.onnx.export.request import ExportRequest, WeightsAsked
from surgery.onnx.export.weight_options import WeightOptions
from surgery_formats.errors import FitError, ProofError, UsageError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.models.families.tasks import FEATURES
from tests.oracles import recipes
from tests.support import trained
from tests.support.kit import environment

WORKER = """
import os, pickle, signal, sys
from surgery.engine.execute import Run
from surgery.engine.shares.folders import write_share
assignment, killed = pickle.load(sys.stdin.buffer)
progress = lambda step: os.kill(os.getpid(), signal.SIGKILL) if killed else None
write_share(assignment, Run(workers=1, progress=progress))
"""


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


def left_beside(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def request_of(base: Path, merge: list[tuple[str, float]], options: dict[str, Any]) -> ExportRequest:
    """What the command makes of its options."""
    of_weights = {name: value for name, value in options.items() if name in WeightOptions.__slots__}
    others = {name: value for name, value in options.items() if name in WeightsAsked.__slots__}
    return ExportRequest(
        str(base), merge=tuple(merge), asked=WeightsAsked(**others, options=WeightOptions(**of_weights))
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipes.build("llama", tmp_path_factory.mktemp("llama") / "base", hidden_size=64, intermediate_size=96)


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained.train("llama", base, trained.MERGED["lora q v"], tmp_path_factory.mktemp("adapter") / "lora")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inputs") / "inputs.safetensors"
    rows = np.random.default_rng(4).normal(size=(64, 64)).astype(np.float32)
    save_file({"model.layers.1.mlp.up_proj.activations": rows}, path)
    return path


CODED: list[dict[str, Any]] = [
    {"weights_type": "int4"},
    {"weights_type": "int8", "symmetric": False, "head": "int4"},
    {"weights_type": "int4", "scales": "search", "dtype": "fp16", "target": "cuda"},
    {"weights_type": "mixed", "budget": 120_000},
    {"weights_type": "fp8"},
    {"weights_type": "int4", "layout": "transformers.js"},
    {"linear": "matmul"},
    {"merge_to": "full"},
    {},
]


@pytest.mark.parametrize("options", CODED, ids=str)
def test_shares_in_any_order_are_one_export(options: dict[str, Any], base: Path, lora: Path, tmp_path: Path) -> None:
    merge = [(str(lora), 0.7)]
    surgery.export_onnx(base, merge=merge, output=tmp_path / "single", **options)
    request = request_of(base, merge, options)
    for count in (1, 2, 3, 4):
        output = tmp_path / str(count) / "single"
        output.parent.mkdir()
        for assignment in reversed(assignments(request, request.work(), output, count)):
            write_share(assignment)
        surgery.export_onnx(base, merge=merge, output=output, engine=Shares(count), **options)
        assert contents(output) == contents(tmp_path / "single")
        assert left_beside(output.parent) == []


def test_codes_of_a_calibration(base: Path, lora: Path, inputs: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"weights_type": "int4", "calibration": str(inputs)}
    surgery.export_onnx(base, merge=lora, output=tmp_path / "single", **options)
    request = request_of(base, [(str(lora), 1.0)], options)
    (tmp_path / "shared").mkdir()
    for assignment in assignments(request, request.work(), tmp_path / "shared" / "single", 2):
        worker(assignment)
    surgery.export_onnx(base, merge=lora, output=tmp_path / "shared" / "single", engine=Shares(2), **options)
    assert contents(tmp_path / "shared" / "single") == contents(tmp_path / "single")


def test_codes_of_stacked_experts(tmp_path: Path) -> None:
    base = recipes.build("gpt_oss", tmp_path / "base", hidden_size=64, intermediate_size=64, num_local_experts=3)
    surgery.export_onnx(base, output=tmp_path / "single", weights_type="int4")
    request = request_of(base, [], {"weights_type": "int4"})
    (tmp_path / "shared").mkdir()
    for assignment in assignments(request, request.work(), tmp_path / "shared" / "single", 3):
        write_share(assignment)
    surgery.export_onnx(base, output=tmp_path / "shared" / "single", weights_type="int4", engine=Shares(3))
    assert contents(tmp_path / "shared" / "single") == contents(tmp_path / "single")


def test_weights_that_go_into_the_graph_or_beside_the_base(base: Path, lora: Path, tmp_path: Path) -> None:
    """Both have a way of their own to the output."""
    request = request_of(base, [(str(lora), 1.0)], {"weights_type": "int4"})
    for name in ("single", "shared"):
        (tmp_path / name).mkdir()
        output = tmp_path / name / "graph"
        if name == "shared":
            for assignment in assignments(request, request.work(), output, 2):
                write_share(assignment)
        engine = Shares(2) if name == "shared" else None
        surgery.export_onnx(base, merge=lora, output=output, weights="embed", weights_type="int4", engine=engine)
        assert left_beside(tmp_path / name) == []
    assert contents(tmp_path / "shared" / "graph") == contents(tmp_path / "single" / "graph")
    for name in ("single", "shared"):
        here = tmp_path / name / "base"
        here.mkdir()
        for path in base.iterdir():
            (here / path.name).write_bytes(path.read_bytes())
            os.utime(here / path.name, ns=(1, 1))
        if name == "shared":
            request = request_of(here, [(str(lora), 1.0)], {})
            for assignment in assignments(request, request.work(), here, 2):
                write_share(assignment)
        surgery.export_onnx(here, merge=lora, output=here, engine=Shares(2) if name == "shared" else None)
        assert left_beside(tmp_path / name) == []
    assert contents(tmp_path / "shared" / "base") == contents(tmp_path / "single" / "base")


def test_a_killed_share_is_missed_and_run_again(base: Path, tmp_path: Path) -> None:
    request, output = request_of(base, [], {"weights_type": "int4"}), tmp_path / "out"
    shares = assignments(request, request.work(), output, 2)
    worker(shares[0])
    assert worker(shares[1], killed=True) == -signal.SIGKILL
    with pytest.raises(FitError, match="of 2 shares these are missing: 1"):
        surgery.export_onnx(base, output=output, weights_type="int4", engine=Shares(2))
    assert not output.exists()
    worker(shares[1])
    surgery.export_onnx(base, output=output, weights_type="int4", engine=Shares(2))
    (tmp_path / "single").mkdir()
    surgery.export_onnx(base, output=tmp_path / "single" / "out", weights_type="int4")
    assert contents(output) == contents(tmp_path / "single" / "out")
    assert left_beside(tmp_path) == []


def test_a_damaged_share_is_named(base: Path, tmp_path: Path) -> None:
    request, output = request_of(base, [], {"weights_type": "int8"}), tmp_path / "out"
    (folder,) = [write_share(assignment) for assignment in assignments(request, request.work(), output, 1)]
    data = bytearray((folder / "weights").read_bytes())
    data[-1] ^= 1
    (folder / "weights").write_bytes(data)
    with pytest.raises(ProofError, match="is not what the worker computed") as error:
        surgery.export_onnx(base, output=output, weights_type="int8", engine=Shares(1))
    assert error.value.file == str(folder / "weights")
    assert not output.exists()


@pytest.mark.parametrize(
    "other",
    [
        {"weights_type": "int8"},
        {"block": 64},
        {"symmetric": False},
        {"scales": "search"},
        {"head": "keep"},
        {"dtype": "fp16", "target": "cuda"},
    ],
    ids=str,
)
def test_a_worker_that_plans_other_codes_refuses(other: dict[str, Any], base: Path, tmp_path: Path) -> None:
    request = request_of(base, [], {"weights_type": "int4"})
    assignment = assignments(request, request.work(), tmp_path / "out", 2)[0]
    with pytest.raises(ProofError, match="it is other work"):
        write_share(replace(assignment, request=request_of(base, [], {"weights_type": "int4", **other})))
    assert left_beside(tmp_path) == []


def test_bits_that_a_budget_chose_are_a_part_of_the_work(base: Path) -> None:
    ids = {request_of(base, [], {"weights_type": "mixed", "budget": size}).work().id for size in (110_000, 120_000)}
    assert len(ids) == 2


def test_weights_that_only_some_tasks_read_are_a_part_of_the_work(base: Path) -> None:
    works = [
        request_of(base, [], {"weights_type": "int4", "task": task}).work() for task in ("text-generation", FEATURES)
    ]
    assert len({work.nbytes for work in works}) == 2, "one has a head"
    assert len({work.id for work in works}) == 2


def test_what_cannot_travel_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="base was opened here"):
        surgery.export_onnx(open_checkpoint(base), output=tmp_path / "out", weights_type="int4", engine=Shares(1))
    with pytest.raises(FitError, match="nothing is computed"):
        request_of(base, [], {}).work()
    surgery.export_onnx(base, output=tmp_path / "out", engine=Shares(1))  # a graph of the base's own weights needs none
