# SPDX-License-Identifier: Apache-2.0
"""A merge on a real Ray cluster has the bytes of a merge here, whatever becomes of nodes, workers and the driver."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.engine.merge.merge_request import MergeRequest
from surgery.progress import Progress
from surgery_formats.errors import FitError, ProofError, ResourceError
from surgery_formats.files.remote import bucket
from tests.support.held_request import HOLD, HeldOnRay, SwappedOnRay
from tests.support.kit import ROOT, environment, make_base, make_lora
from tests.support.quantised_folders import quantise_folder
from tests.support.s3 import Storage, serve

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

ALL = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
SMALL = 4_500  # bytes per weight file: eight of them
STORE = 80 << 20
DRIVER = """
import sys
from pathlib import Path
import surgery
from tests.support.held_request import HeldOnRay
base, lora, output, address, notes = sys.argv[1:]
surgery.merge(base, {lora: 0.7}, output=output, shard_size=4_500, engine=HeldOnRay(address, Path(notes)))
"""


@dataclass
class Nodes:
    """A cluster that grows, and a server of S3 that its workers know."""

    cluster: Any
    s3: str

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    @property
    def engine(self) -> str:
        return f"ray:{self.address}"

    def grow(self, count: int) -> None:
        while len(self.alive()) < count:
            self.add()

    def add(self, **more: object) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=STORE, include_dashboard=False, **more)

    def alive(self) -> list[str]:
        return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]

    def kill(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)
        until(lambda: node.node_id not in self.alive())


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "formats", "cli"))
    with serve() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": url,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
        }.items():
            patch.setenv(name, value)
        bucket.connect.cache_clear()
        cluster = cluster_utils.Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "object_store_memory": STORE,
                "include_dashboard": False,
                "_system_config": {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000},
            },
        )
        try:
            ray.init(cluster.address, log_to_driver=False, logging_level="CRITICAL")
            yield Nodes(cluster, url)
        finally:
            ray.shutdown()
            cluster.shutdown()
            bucket.connect.cache_clear()


@dataclass(frozen=True)
class Job:
    base: Path
    lora: Path
    single: Path

    def merge(self, output: Path, **options: Any) -> surgery.MergeResult:
        return surgery.merge(self.base, {self.lora: 0.7}, output=output, shard_size=SMALL, **options)

    @property
    def request(self) -> MergeRequest:
        return MergeRequest(str(self.base), ((str(self.lora), 0.7),), shard_size=SMALL)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    job = Job(make_base(folder / "base"), make_lora(folder / "lora", targets=ALL), folder / "single")
    job.merge(job.single)
    return job


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def until(true: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def noted(notes: Path) -> list[tuple[int, str]]:
    """Share and node of everything that has begun."""
    found = [path.name.split("-") for path in notes.iterdir() if not path.name.startswith(HOLD)]
    return [(int(index), node) for index, node, *_ in found]


@contextmanager
def meanwhile(work: Callable[[], None], hold: Path) -> Iterator[None]:
    """`work` in a thread beside the block; then shares go on."""

    def do() -> None:
        try:
            work()
        finally:
            hold.unlink()

    hold.touch()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(do)
        yield
        future.result()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_nodes_gives_the_same_bytes(nodes: Nodes, job: Job, tmp_path: Path, count: int):
    nodes.grow(count)
    (notes := tmp_path / "notes").mkdir()
    steps: list[Progress] = []
    with meanwhile(lambda: until(lambda: len({node for _, node in noted(notes)}) == count), notes / f"{HOLD}0"):
        job.merge(tmp_path / "out", engine=HeldOnRay(nodes.address, notes), progress=steps.append)
    assert contents(tmp_path / "out") == contents(job.single)
    assert sorted(index for index, _ in noted(notes)) == list(range(8))
    phases = [step.phase for step in steps if step.phase.startswith("shares")]
    assert (phases[0], phases[-1]) == ("shares 0 of 8", "shares 8 of 8")
    assert list(tmp_path.glob(".*")) == []


def test_a_node_that_is_killed_loses_nothing(nodes: Nodes, job: Job, tmp_path: Path):
    nodes.grow(1)
    (notes := tmp_path / "notes").mkdir()
    doomed = nodes.add()
    killed: list[int] = []

    def kill() -> None:
        until(lambda: any(node == doomed.node_id for _, node in noted(notes)))
        killed.extend(index for index, node in noted(notes) if node == doomed.node_id)
        nodes.kill(doomed)

    with meanwhile(kill, notes / f"{HOLD}0"):
        job.merge(tmp_path / "out", engine=HeldOnRay(nodes.address, notes))
    assert contents(tmp_path / "out") == contents(job.single)
    begun = Counter(index for index, _ in noted(notes))
    assert killed
    assert all(begun[index] == 2 for index in killed)
    assert sorted(begun) == list(range(8))


def test_a_killed_driver_goes_on_with_the_shares_that_are_there(nodes: Nodes, job: Job, tmp_path: Path):
    nodes.grow(1)
    (notes := tmp_path / "notes").mkdir()
    (hold := notes / f"{HOLD}3").touch()
    words = [job.base, job.lora, tmp_path / "out", nodes.address, notes]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *map(str, words)], env=environment(), cwd=tmp_path)
    try:
        until(lambda: len(list(tmp_path.glob(".out.surgery-*.share-*-of-8/surgery_manifest.json"))) == 3)
    finally:
        driver.kill()
        driver.wait()
    assert not (tmp_path / "out").exists()
    hold.unlink()
    before = len(noted(notes))
    job.merge(tmp_path / "out", engine=HeldOnRay(nodes.address, notes))
    again = Counter(index for index, _ in noted(notes))
    assert contents(tmp_path / "out") == contents(job.single)
    assert again[0] == again[1] == again[2] == 1
    assert len(noted(notes)) - before <= 5
    assert list(tmp_path.glob(".*")) == []


def test_a_worker_that_sees_other_inputs_is_refused(nodes: Nodes, job: Job, tmp_path: Path):
    nodes.grow(1)
    shutil.copytree(job.base, tmp_path / "touched")
    os.utime(tmp_path / "touched" / "model.safetensors", ns=(0, 0))
    other = make_base(tmp_path / "other", **{"lm_head.weight": torch.ones(64, 32)})
    for base, said in ((tmp_path / "touched", "inputs of other sizes or times"), (other, "it is other work")):
        seen = MergeRequest(str(base), job.request.adapters, shard_size=SMALL)
        with pytest.raises(ProofError, match=said):
            job.merge(tmp_path / "out", engine=SwappedOnRay(nodes.address, seen))
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".*")) == []


def test_a_node_with_another_version_is_refused(nodes: Nodes, job: Job, tmp_path: Path):
    (old := tmp_path / "old" / "surgery").mkdir(parents=True)
    for path in (ROOT / "surgery").iterdir():
        if path.name not in ("_version.py", "__pycache__"):
            (old / path.name).symlink_to(path)
    (old / "_version.py").write_text('__version__ = "0.0.1"\n')
    path = os.pathsep.join([str(old.parent), str(ROOT / "formats"), str(ROOT / "cli")])
    node = nodes.add(env_vars={"PYTHONPATH": path})
    try:
        words = ["-q", "merge", job.base, job.lora, "-o", tmp_path / "out", "--engine", nodes.engine]
        done = subprocess.run(
            [sys.executable, "-m", "surgery_cli", *map(str, words)],
            env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        nodes.kill(node)
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith("error: a worker has version 0.0.1 of surgery, and the driver "), done.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_shows_what_it_always_shows(nodes: Nodes, job: Job, tmp_path: Path):
    nodes.grow(1)
    shown: list[list[str]] = []
    for name, engine in (("here", []), ("there", ["--engine", nodes.engine])):
        words = ["merge", job.base, job.lora, "-o", tmp_path / name, *engine]
        done = subprocess.run(
            [sys.executable, "-m", "surgery_cli", *map(str, words)],
            env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = done.stderr.replace(name, "NAME").splitlines()
        shown.append([line for line in lines if not line.startswith("merging")])  # progress: as slow as the machine
    assert shown[0] == shown[1]
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


def test_an_error_of_a_worker_is_that_error(nodes: Nodes, job: Job, tmp_path: Path):
    nodes.grow(1)
    shutil.copytree(job.lora, tmp_path / "nan")
    file = tmp_path / "nan" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if "layers.1.self_attn.o_proj" in name)[0, 0] = float("nan")
    save_file(tensors, file)
    errors = []
    for options in ({}, {"engine": nodes.engine}):
        with pytest.raises(FitError) as caught:
            surgery.merge(job.base, tmp_path / "nan", output=tmp_path / "out", **options)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]
    assert not (tmp_path / "out").exists()


def test_a_share_that_no_node_can_hold_is_told_at_once(nodes: Nodes, job: Job, tmp_path: Path):
    nodes.grow(1)
    with pytest.raises(
        ResourceError, match=r"a share takes 200 cores with .*, and no node of the Ray cluster has that"
    ):
        job.merge(tmp_path / "out", engine=nodes.engine, workers=200)
    with pytest.raises(ResourceError, match="and a GPU, and no node"):
        job.merge(tmp_path / "out", engine=nodes.engine, device="cuda")
    assert not (tmp_path / "out").exists()


BASE, TUNED, LORA = (ROOT / "examples" / name for name in ("base", "tuned", "lora"))


def extract(folder: Path, name: str, engine: str | None) -> None:
    surgery.extract_lora(BASE, TUNED, output=folder / name, rank=4, engine=engine)


def requantise(folder: Path, name: str, engine: str | None) -> None:
    if not (base := folder / "nf4").exists():
        quantise_folder(BASE, base, "nf4")
    surgery.merge(base, LORA, output=folder / name, quantized="requantize", accept_loss=True, engine=engine)


def export(folder: Path, name: str, engine: str | None) -> None:
    surgery.export_onnx(BASE, merge=[(str(LORA), 0.7)], output=folder / name, weights_type="int4", engine=engine)


@pytest.mark.parametrize("command", [extract, requantise, export])
def test_every_command_with_shares_gives_the_same_bytes(
    nodes: Nodes, tmp_path: Path, command: Callable[[Path, str, str | None], None]
):
    nodes.grow(2)
    command(tmp_path, "here", None)
    command(tmp_path, "there", nodes.engine)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    assert list(tmp_path.glob(".*")) == []


def test_from_bucket_to_bucket(nodes: Nodes, job: Job):
    nodes.grow(2)
    bucket.connect.cache_clear()
    storage = Storage(nodes.s3, f"bucket-{os.getpid()}")
    base, lora = storage.upload(job.base, "base"), storage.upload(job.lora, "lora")
    for name, options in (("here", {}), ("there", {"engine": nodes.engine})):
        surgery.merge(base, {lora: 0.7}, output=storage.url(name), shard_size=SMALL, **options)
    everything = storage.objects()
    here, there = (
        {key.removeprefix(name): data for key, data in everything.items() if key.startswith(name)}
        for name in ("here/", "there/")
    )
    assert here == there
    assert {key.split("/")[0] for key in everything} == {"base", "lora", "here", "there"}
    single = contents(job.single)
    weights = [name for name in single if name.endswith(".safetensors")]
    assert weights
    assert all(there[name] == single[name] for name in weights)
