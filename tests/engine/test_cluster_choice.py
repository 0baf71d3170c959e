# SPDX-License-Identifier: Apache-2.0
"""What can be said about an engine before anything is sent to it."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import surgery
from surgery.engine.merge.merge_request import MergeRequest
from surgery.engine.shares.folders import Shares
from surgery.engine.shares.ray import Ray, share_count
from surgery.engine.shares.ray import _connected as connected
from surgery_formats.errors import MissingPackageError, ResourceError, UsageError
from tests.support.kit import ROOT, spawn

BASE, LORA = ROOT / "examples" / "base", ROOT / "examples" / "lora"


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("spark", "'spark' is no engine"),
        ("ray:", None),
        ("ray:host", "'host' is not HOST:PORT"),
        ("ray:host:port", "'host:port' is not HOST:PORT"),
        ("ray:host:70000", "'host:70000' is not HOST:PORT"),
        ("ray:ray://host:10001", "is not HOST:PORT"),
    ],
)
def test_an_engine_is_named_or_refused(engine: str, said: str | None):
    if said is None:
        assert surgery.merge(BASE, LORA, dry_run=True, engine=engine).ledger
        return
    with pytest.raises(UsageError, match=said):
        surgery.merge(BASE, LORA, dry_run=True, engine=engine)


def test_the_command_refuses_an_engine_as_a_usage_error():
    done = spawn("merge", BASE, LORA, "-o", "out", "--engine", "spark")
    assert done.returncode == 2
    assert "'spark' is no engine" in done.stderr


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'model-surgery\[ray\]'"):
        surgery.merge(BASE, LORA, output=tmp_path / "out", engine="ray")
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_that_is_not_there_is_told_in_seconds(tmp_path: Path):
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ResourceError, match=f"no Ray cluster answers at 127.0.0.1:{port}"):
        surgery.merge(BASE, LORA, output=tmp_path / "out", engine=f"ray:127.0.0.1:{port}")
    assert list(tmp_path.iterdir()) == []


def test_what_was_opened_here_cannot_be_sent():
    with pytest.raises(UsageError, match="base was opened here"):
        surgery.merge(surgery.open(BASE), LORA, dry_run=True, engine=Shares(2))
    with pytest.raises(UsageError, match="adapters was opened here"):
        surgery.merge(BASE, surgery.open(LORA), dry_run=True, engine=Shares(2))


def test_workers_get_their_gpus_from_the_cluster():
    with pytest.raises(UsageError, match="'cuda:1' is a device of this machine"):
        surgery.merge(BASE, LORA, dry_run=True, engine="ray", device="cuda:1")
    assert surgery.merge(BASE, LORA, dry_run=True, engine="ray", device="cuda").ledger


def test_references_become_absolute_and_weights_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(BASE.parent)
    for given in ({"lora": 0.5}, ("lora", 0.5), [("lora", 0.5)], [(Path("lora"), 0.5)]):
        assert MergeRequest("base", given).portable().adapters == ((str(LORA), 0.5),)
    request = MergeRequest("base", ["lora", "hf://org/name"], as_trained="nf4").portable()
    assert (request.base, request.as_trained) == (str(BASE), "nf4")
    assert request.adapters == ((str(LORA), 1.0), ("hf://org/name", 1.0))
    assert MergeRequest("s3://bucket/base", "lora").portable().base == "s3://bucket/base"


def test_the_number_of_shares_follows_from_the_work_alone():
    class Large:
        pieces, nbytes = 900, 810 << 30

    class Small:
        pieces, nbytes = 5, 1000

    assert share_count(Large()) == 810  # type: ignore[arg-type]
    assert share_count(Small()) == 5  # type: ignore[arg-type]


def test_a_ray_cluster_says_what_an_address_is():
    assert Ray("10.0.0.1:6379").address == "10.0.0.1:6379"
    assert Ray("[::1]:6379").address == "[::1]:6379"


@pytest.mark.parametrize(("address", "running", "asked"), [
    ("", True, ["auto"]), ("auto", True, ["auto"]), ("auto", False, ["auto", "local"]), ("local", True, ["local"]),
])  # fmt: skip
def test_rays_own_words_for_an_address_are_no_host(
    address: str, running: bool, asked: list[str], monkeypatch: pytest.MonkeyPatch
):
    seen: list[str] = []

    def init(address: str, **options: object) -> None:
        seen.append(address)
        if address == "auto" and not running:
            raise ConnectionError

    ray = SimpleNamespace(is_initialized=lambda: False, init=init, shutdown=lambda: None)
    monkeypatch.setattr("surgery.engine.shares.ray._library", lambda: ray)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with connected("") as found:
        assert found is ray
    assert seen == asked
