# SPDX-License-Identifier: Apache-2.0
"""A conversion whose SVDs were worked out in shares has the bytes of one in a single process."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery import Rank
from surgery.algebra.convert_request import ConvertRequest
from surgery.engine.execute import Run
from surgery.engine.shares.folders import Assignment, Shares, assignments, write_share
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError, ProofError, UsageError
from tests.algebra.test_lora_form import trained
from tests.support.kit import environment

WORKER = """
import os, pickle, signal, sys
from surgery.engine.execute import Run
from surgery.engine.shares import piece_file
from surgery.engine.shares.folders import write_share
assignment, killed_after = pickle.load(sys.stdin.buffer)
write, written = piece_file.write_piece, []
def counted(*arguments):
    if len(written) == killed_after:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments)
    written.append(1)
import surgery.algebra.convert_request as module
module.write_piece = counted
write_share(assignment, Run(workers=1))
"""


def worker(assignment: Assignment, *, killed_after: int = -1) -> int:
    """A process of its own, which gets nothing but plain values; killed when it has written so many SVDs."""
    message = pickle.dumps((assignment, killed_after))
    done = subprocess.run(
        [sys.executable, "-c", WORKER], env=environment(), input=message, capture_output=True, check=False
    )
    assert done.returncode == 0 or killed_after >= 0, done.stderr.decode()
    return done.returncode


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def left_beside(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def convert(adapter: Path | str, base: Path | str, output: Path, **options: Any) -> None:
    options = {"to": "peft", "rank": 3} | options
    surgery.convert(adapter, output=output, base=base, as_lora=True, **options)


@pytest.fixture
def oft(tmp_path: Path) -> tuple[str, str]:
    """Base and adapter: what it adds depends on the base, and has to be formed."""
    _, base, adapter = trained("oft", tmp_path / "oft")
    return str(base), str(adapter)


@pytest.mark.parametrize("options", [{}, {"rank": Rank.energy(0.8)}, {"to": "mlx", "allow_loss": True}], ids=str)
@pytest.mark.parametrize("name", ["oft", "boft", "hra"])
def test_shares_in_any_order_are_one_conversion(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    _, base, adapter = trained(name, tmp_path / name)
    convert(adapter, base, tmp_path / "single", **options)
    request = ConvertRequest(str(adapter), str(base), options.get("rank", 3))
    assert request.work().pieces > 1
    for count in (1, 2, 3, 4):
        output = tmp_path / f"shared{count}"
        for assignment in reversed(assignments(request, request.work(), output, count)):
            write_share(assignment, Run(workers=count))
        convert(adapter, base, output, engine=Shares(count), **options)
        assert contents(output) == contents(tmp_path / "single")
    assert left_beside(tmp_path) == []


def test_the_driver_works_out_none(oft: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = oft
    request = ConvertRequest(adapter, base, 3)
    for assignment in assignments(request, request.work(), tmp_path / "out", 2):
        write_share(assignment)

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("worked out")

    monkeypatch.setattr("surgery.algebra.lora_of_weight.truncated_svd", fail)
    convert(adapter, base, tmp_path / "out", engine=Shares(2))
    assert contents(tmp_path / "out")


def test_the_number_of_threads_changes_nothing(oft: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = oft
    for workers in (1, 4):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("surgery.algebra.lora_form.default_workers", lambda count=workers: count)
            convert(adapter, base, tmp_path / str(workers))
    assert contents(tmp_path / "1") == contents(tmp_path / "4")


def test_a_killed_share_is_missed_and_goes_on(oft: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = oft
    convert(adapter, base, tmp_path / "single")
    request, output = ConvertRequest(adapter, base, 3), tmp_path / "out"
    shares = assignments(request, request.work(), output, 2)
    worker(shares[0])
    assert worker(shares[1], killed_after=1) == -signal.SIGKILL
    with pytest.raises(FitError, match="of 2 shares these are missing: 1"):
        convert(adapter, base, output, engine=Shares(2))
    (stage,) = [path for path in tmp_path.iterdir() if ".surgery-" in path.name and not path.name.endswith("-0-of-2")]
    (written,) = stage.glob("svd-*")
    before = written.stat().st_mtime_ns
    folder = write_share(shares[1])
    assert (folder / written.name).stat().st_mtime_ns == before
    convert(adapter, base, output, engine=Shares(2))
    assert contents(output) == contents(tmp_path / "single")
    assert left_beside(tmp_path) == []


def test_shares_of_another_configuration_are_none_of_this(tmp_path: Path) -> None:
    _, base, adapter = trained("hra", tmp_path / "hra")
    request = ConvertRequest(str(adapter), str(base), 3)
    for assignment in assignments(request, request.work(), tmp_path / "out", 2):
        write_share(assignment)
    config = Path(adapter) / "adapter_config.json"
    asked = json.loads(config.read_text())
    config.write_text(json.dumps(asked | {"apply_GS": not asked["apply_GS"]}))  # no byte of a tensor differs
    with pytest.raises(FitError, match="of 2 shares these are missing: 0, 1"):
        convert(adapter, base, tmp_path / "out", engine=Shares(2))


@pytest.mark.parametrize("place", ["head", "factors"])
def test_a_damaged_share_is_named(place: str, oft: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = oft
    request, output = ConvertRequest(adapter, base, 3), tmp_path / "out"
    folder = write_share(assignments(request, request.work(), output, 1)[0])
    path = max(folder.glob("svd-*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[40 if place == "head" else -1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ProofError, match="is not what the worker computed") as error:
        convert(adapter, base, output, engine=Shares(1))
    assert error.value.file == str(path)
    assert not output.exists()
    assert folder.exists()


@pytest.mark.parametrize("other", [{"rank": 4}, {"rank": Rank.error(0.5)}, {"without": ("*.0.*",)}], ids=str)
def test_a_worker_that_plans_another_conversion_refuses(
    other: dict[str, Any], oft: tuple[str, str], tmp_path: Path
) -> None:
    base, adapter = oft
    request = ConvertRequest(adapter, base, 3)
    assignment = assignments(request, request.work(), tmp_path / "out", 2)[0]
    with pytest.raises(ProofError, match="it is other work"):
        write_share(replace(assignment, request=replace(request, **other)))
    assert left_beside(tmp_path) == []


def test_what_is_not_shared_out_is_refused(oft: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = oft
    with pytest.raises(UsageError, match="nothing else is shared out"):
        surgery.convert(adapter, "peft", output=tmp_path / "out", engine=Shares(1))
    opened = surgery.open(adapter)
    assert isinstance(opened, Adapter)
    with pytest.raises(UsageError, match="adapter was opened here"):
        surgery.convert(opened, "peft", output=tmp_path / "out", base=base, as_lora=True, rank=3, engine=Shares(1))


def test_a_conversion_without_svds_needs_no_cluster(tmp_path: Path) -> None:
    _, base, adapter = trained("loha", tmp_path / "loha")
    convert(adapter, base, tmp_path / "single", rank=None)
    assert not ConvertRequest(str(adapter), str(base)).work().tasks
    convert(adapter, base, tmp_path / "out", rank=None, engine=Shares(1))
    assert contents(tmp_path / "out") == contents(tmp_path / "single")
