# SPDX-License-Identifier: Apache-2.0
"""Shares with ``--device cuda`` are done where Ray has a GPU for them, with the bytes of one process on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from tests.support.held_request import HeldOnRay
from tests.support.kit import ROOT

pytestmark = pytest.mark.gpu

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

BASE, TUNED, LORA = (str(ROOT / "examples" / name) for name in ("base", "tuned", "lora"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and a node without GPUs, and two nodes with one each; on a machine with one GPU they have the same."""
    nothing = {"num_cpus": 4, "num_gpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([*(str(ROOT / name) for name in ("", "formats", "cli")), *_path()]))
        found = cluster_utils.Cluster(initialize_head=True, head_node_args=nothing)
        try:
            found.add_node(**nothing)
            for number in range(2):
                seen = {"CUDA_VISIBLE_DEVICES": str(number % torch.cuda.device_count())}
                found.add_node(**nothing | {"num_gpus": 1, "env_vars": seen})
            ray.init(found.address, log_to_driver=False, logging_level="CRITICAL")
            yield found
        finally:
            ray.shutdown()
            found.shutdown()


def _path() -> list[str]:
    return [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]


def merge(output: Path, **options: Any) -> None:
    surgery.merge(BASE, {LORA: 0.7}, output=output, shard_size=400_000, device="cuda", **options)


def extract(output: Path, **options: Any) -> None:
    surgery.extract_lora(BASE, TUNED, output=output, rank=4, device="cuda", **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("command", [merge, extract])
def test_shares_go_where_a_gpu_is(cluster: Any, tmp_path: Path, command: Callable[..., None]) -> None:
    (notes := tmp_path / "notes").mkdir()
    command(tmp_path / "here")
    command(tmp_path / "there", engine=HeldOnRay(cluster.address, notes))
    with_gpu = {node["NodeID"] for node in ray.nodes() if node["Resources"].get("GPU")}
    assert len(with_gpu) == 2
    begun = [path.name.split("-") for path in notes.iterdir()]
    assert {node for _, node, *_ in begun} == with_gpu
    assert len({process for _, _, process, _ in begun}) == 2, "CUDA starts once in a node, not once in a share"
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
