# SPDX-License-Identifier: Apache-2.0
"""An extraction in shares has the bytes of one in a single process, whatever becomes of a worker."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery import Rank
from surgery.engine.execute import Run
from surgery.engine.shares.folders import Assignment, Shares, assignments, write_share
from surgery.extraction.request import ExtractRequest
from surgery.extraction.stream.unit_file import unit_name
from surgery_formats.errors import FitError, ProofError, UsageError
from surgery_formats.files.raw import File
from surgery_formats.models.checkpoint import open_checkpoint
from tests.oracles import disk, recipes
from tests.support import expert_models
from tests.support.extractions import everything, only, tune
from tests.support.kit import ROOT, environment, make_base
from tests.support.quantised_folders import quantise_folder

WORKER = """
import os, pickle, signal, sys
from surgery.engine.execute import Run
from surgery.engine.shares.folders import write_share
assignment, after = pickle.load(sys.stdin.buffer)
steps = iter(range(1 << 30))
kill = lambda step: os.kill(os.getpid(), signal.SIGKILL) if next(steps) == after else None
write_share(assignment, Run(workers=1, progress=kill))
"""


def worker(assignment: Assignment, *, killed_after: int = -1) -> int:
    """A process of its own, which gets nothing but plain values; killed when it has read so many units, and not yet written the last."""
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


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """All matrices changed but one, and no norm."""
    base, tuned = make_base(tmp_path / "base"), make_base(tmp_path / "tuned")
    generator = torch.Generator().manual_seed(1)
    tensors = disk.read_tensors(base)
    for name, value in tensors.items():
        if value.ndim == 2 and "layers.1.mlp.up_proj" not in name:
            tensors[name] = (value.float() + 0.02 * torch.randn(value.shape, generator=generator)).to(value.dtype)
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    return str(base), str(tuned)


ASKED: list[dict[str, Any]] = [
    {},
    {"rank": 3, "alpha": 5.0, "dtype": "fp16"},
    {"rank": Rank(2, {"mlp.*": 4}), "embeddings": "full"},
    {"rank": Rank.energy(0.7)},
    {"rank": Rank.error(0.4), "rslora": True},
    {"rank": Rank.auto},
    {"rank": Rank.budget("40kB")},
    {"rank": 4, "factors": "int8"},
    {"rank": 4, "to": "mlx"},
    {"rank": 4, "table": True},
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_shares_in_any_order_are_one_extraction(asked: dict[str, Any], pair: tuple[str, str], tmp_path: Path) -> None:
    request = ExtractRequest(*pair, **asked)
    surgery.extract_lora(*pair, output=tmp_path / "single", **asked)
    for count in (1, 2, 3, 4):
        output = tmp_path / f"shared{count}"
        for assignment in reversed(assignments(request, request.work(), output, count)):
            write_share(assignment, Run(workers=count))
        surgery.extract_lora(*pair, output=output, engine=Shares(count), **asked)
        assert contents(output) == contents(tmp_path / "single")
    assert left_beside(tmp_path) == []


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
def test_three_processes_in_any_order(order: tuple[int, ...], pair: tuple[str, str], tmp_path: Path) -> None:
    surgery.extract_lora(*pair, output=tmp_path / "single", rank=4)
    request = ExtractRequest(*pair, rank=4)
    shares = assignments(request, request.work(), tmp_path / "shared", 3)
    for index in order:
        worker(shares[index])
    surgery.extract_lora(*pair, output=tmp_path / "shared", rank=4, engine=Shares(3))
    assert contents(tmp_path / "shared") == contents(tmp_path / "single")


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_every_tensor_is_in_one_share(pair: tuple[str, str], count: int) -> None:
    work = ExtractRequest(*pair).work()
    shares = work.plan.shares(count)
    assert sorted(number for share in shares for number in share) == list(range(work.pieces))
    names = [name for share in shares for unit in share.values() for name in unit.names]
    assert sorted(names) == sorted(open_checkpoint(pair[1]).main.tensors)
    assert [*map(list, shares)] == [*map(list, ExtractRequest(*pair).work().plan.shares(count))]


def test_the_driver_evaluates_what_shares_have_factorised(tmp_path: Path) -> None:
    """Of the ranks of a table more directions are kept than are written."""
    text = tmp_path / "text"
    text.write_text("A text of a few words, and some more.")
    options: dict[str, Any] = {"rank": 4, "table": True, "eval": text}
    pair = str(ROOT / "examples" / "base"), str(ROOT / "examples" / "tuned")
    single = surgery.extract_lora(*pair, output=tmp_path / "single", **options)
    request = ExtractRequest(*pair, rank=4, table=True, evaluated=True)
    for assignment in assignments(request, request.work(), tmp_path / "shared", 2):
        write_share(assignment)
    shared = surgery.extract_lora(*pair, output=tmp_path / "shared", engine=Shares(2), **options)
    assert contents(tmp_path / "shared") == contents(tmp_path / "single")
    assert single.recovery is not None
    assert len(single.recovery.ranks) >= 5
    assert single.recovery == shared.recovery


def test_what_the_driver_decides_needs_no_other_shares(pair: tuple[str, str], tmp_path: Path) -> None:
    """A LoRA and a DoRA are chosen from the same measurements."""
    request = ExtractRequest(*pair, rank=4)
    for kind in ("lora", "dora"):
        options: dict[str, Any] = {"rank": 4, "kind": kind, "dense": ("norm",)}
        surgery.extract_lora(*pair, output=tmp_path / f"single-{kind}", **options)
        for assignment in assignments(request, request.work(), tmp_path / kind, 2):
            write_share(assignment)
        surgery.extract_lora(*pair, output=tmp_path / kind, engine=Shares(2), **options)
        assert contents(tmp_path / kind) == contents(tmp_path / f"single-{kind}")


def test_the_driver_reads_neither_checkpoint_again(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what survival looks at, which is one row of each matrix here, and fingerprints, one byte."""
    for name in ("identity._WHOLE", "identity._HEAD", "identity._SAMPLE"):
        monkeypatch.setattr(f"surgery_formats.models.{name}", 1)
    monkeypatch.setattr("surgery.extraction.sampling._LOOKED_AT", 1)
    request, output = ExtractRequest(*pair, rank=4), tmp_path / "shared"
    for assignment in assignments(request, request.work(), output, 2):
        write_share(assignment)
    seen = dict.fromkeys(pair, 0)
    read = File.read_into

    def counting(self: File, buffer: memoryview, offset: int) -> None:
        if (folder := str(self.path.parent)) in seen:
            seen[folder] += len(buffer)
        read(self, buffer, offset)

    monkeypatch.setattr(File, "read_into", counting)
    surgery.extract_lora(*pair, output=output, rank=4, kind="lora", engine=Shares(2), workers=1)
    size = sum(tensor.nbytes for tensor in open_checkpoint(pair[0]).main.tensors.values())
    assert seen[pair[0]] < size / 4
    assert seen[pair[1]] < size / 4


def test_a_killed_share_is_missed_and_goes_on(pair: tuple[str, str], tmp_path: Path) -> None:
    surgery.extract_lora(*pair, output=tmp_path / "single", rank=4)
    request, output = ExtractRequest(*pair, rank=4), tmp_path / "shared"
    shares = assignments(request, request.work(), output, 2)
    worker(shares[0])
    assert worker(shares[1], killed_after=5) == -signal.SIGKILL
    with pytest.raises(FitError, match="of 2 shares these are missing: 1"):
        surgery.extract_lora(*pair, output=output, rank=4, engine=Shares(2))
    assert not output.exists()
    (stage,) = [path for path in tmp_path.iterdir() if ".surgery-" in path.name and not path.name.endswith("-0-of-2")]
    written = {path.name: path.stat().st_mtime_ns for path in stage.glob("unit-*")}
    assert len(written) == 5, "each unit is on disk before the next begins"
    folder = write_share(shares[1])
    assert {name: (folder / name).stat().st_mtime_ns for name in written} == written
    assert len([*folder.glob("unit-*")]) > len(written)
    worker(shares[0])  # once more does nothing
    surgery.extract_lora(*pair, output=output, rank=4, engine=Shares(2))
    assert contents(output) == contents(tmp_path / "single")
    assert left_beside(tmp_path) == []


@pytest.mark.parametrize(
    "other",
    [
        {"rank": 5},
        {"rank": Rank(4, {"mlp.*": 5})},
        {"rank": Rank.energy(0.5)},
        {"alpha": 3.0},
        {"rslora": True, "alpha": 3.0},
        {"dtype": "fp32"},
        {"embeddings": "full"},
        {"matrices": "full"},
        {"factors": "int4"},
        {"table": True},
        {"on_gpus": True},
    ],
    ids=str,
)
def test_a_worker_that_plans_another_extraction_refuses(
    other: dict[str, Any], pair: tuple[str, str], tmp_path: Path
) -> None:
    request = ExtractRequest(*pair, rank=4)
    assignment = assignments(request, request.work(), tmp_path / "out", 2)[0]
    with pytest.raises(ProofError, match="it is other work"):
        write_share(replace(assignment, request=replace(request, **other)))
    assert left_beside(tmp_path) == []


def test_a_share_of_another_fine_tune_is_not_taken(pair: tuple[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_share(assignments(request := ExtractRequest(*pair, rank=4), request.work(), output, 1)[0])
    tensors = disk.read_tensors(Path(pair[1]))
    save_file({name: value + 1 for name, value in tensors.items()}, Path(pair[1], "model.safetensors"))
    with pytest.raises(FitError, match="of 1 shares these are missing: 0"):
        surgery.extract_lora(*pair, output=output, rank=4, engine=Shares(1))


@pytest.mark.parametrize("place", ["head", "factors", "length"])
def test_a_damaged_share_is_named(place: str, pair: tuple[str, str], tmp_path: Path) -> None:
    request, output = ExtractRequest(*pair, rank=4), tmp_path / "out"
    folders = [write_share(assignment) for assignment in assignments(request, request.work(), output, 2)]
    largest = max(folders[1].glob("unit-*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    if place == "length":
        del data[-1]
    else:
        data[40 if place == "head" else -1] ^= 1
    largest.write_bytes(data)
    with pytest.raises(ProofError, match="is not what the worker computed") as error:
        surgery.extract_lora(*pair, output=output, rank=4, engine=Shares(2))
    assert error.value.file == str(largest)
    assert not output.exists()
    assert all(folder.exists() for folder in folders)


def test_a_share_without_a_unit_is_named(pair: tuple[str, str], tmp_path: Path) -> None:
    request, output = ExtractRequest(*pair, rank=4), tmp_path / "out"
    folder = write_share(assignments(request, request.work(), output, 1)[0])
    (folder / unit_name(3)).unlink()
    with pytest.raises(surgery.SurgeryError) as error:
        surgery.extract_lora(*pair, output=output, rank=4, engine=Shares(1))
    assert unit_name(3) in f"{error.value.file} {error.value.message}"


def test_a_failed_extraction_keeps_its_shares(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ProofError("not what was meant")

    request, output = ExtractRequest(*pair, rank=4), tmp_path / "out"
    folder = write_share(assignments(request, request.work(), output, 1)[0])
    with monkeypatch.context() as patched:
        patched.setattr("surgery.verbs.extract_lora.write_extraction", fail)
        with pytest.raises(ProofError, match="not what was meant"):
            surgery.extract_lora(*pair, output=output, rank=4, engine=Shares(1))
    assert folder.exists()
    surgery.extract_lora(*pair, output=output, rank=4, engine=Shares(1))
    assert left_beside(tmp_path) == []


def test_what_cannot_travel_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="base was opened here"):
        surgery.extract_lora(open_checkpoint(pair[0]), pair[1], output=tmp_path / "out", engine=Shares(1))
    with pytest.raises(UsageError, match="a dry run has none"):
        surgery.extract_lora(*pair, dry_run=True, engine=Shares(1))
    request = ExtractRequest(*pair, on_gpus=True)
    with pytest.raises(FitError, match="planned for GPUs, and run on cpu"):
        write_share(assignments(request, request.work(), tmp_path / "out", 1)[0])
    assert left_beside(tmp_path) == []


@pytest.mark.parametrize("name", ["experts", "tied head", "nf4"])
def test_shares_of_unusual_models_are_one_extraction(name: str, tmp_path: Path) -> None:
    """Several matrices in one unit; a tensor of BASE that two units read; rounding to codes, which the driver tells."""
    if name == "nf4":
        base, tuned = (quantise_folder(ROOT / "examples" / part, tmp_path / part, "nf4") for part in ("base", "tuned"))
    elif name == "experts":
        base = expert_models.build("mixtral", tmp_path / "base")
        tuned = tune(base, tmp_path / "tuned", everything)
    else:
        base = recipes.build("llama", tmp_path / "base", tie_word_embeddings=True)
        tuned = tune(base, tmp_path / "tuned", only("norm", everything))
        tensors = disk.read_tensors(tuned)
        head = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = head + 0.1 * torch.randn(head.shape, generator=torch.Generator().manual_seed(3))
        disk.write_safetensors(tuned / "model.safetensors", tensors)
    rank = Rank.auto if name == "nf4" else 2
    single = surgery.extract_lora(base, tuned, output=tmp_path / "single", rank=rank)
    request = ExtractRequest(str(base), str(tuned), rank)
    for assignment in assignments(request, request.work(), tmp_path / "shared", 3):
        write_share(assignment)
    shared = surgery.extract_lora(base, tuned, output=tmp_path / "shared", rank=rank, engine=Shares(3))
    assert contents(tmp_path / "shared") == contents(tmp_path / "single")
    assert shared.quantised == single.quantised


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Of a worker, and of the driver: numpy tells of what it allocates."""
    peaks: dict[int, list[int]] = {}
    for layers in (1, 6):
        folder = tmp_path / str(layers)
        folder.mkdir()
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
        base = recipes.build("llama", folder / "base", num_hidden_layers=layers, **sizes)
        tuned = tune(base, folder / "tuned", only("_proj", everything))
        request = ExtractRequest(str(base), str(tuned), 64, dtype="bf16")
        shares = assignments(request, request.work(), folder / "out", 1)
        peaks[layers] = [
            peak_of(lambda shares=shares: write_share(shares[0], Run(workers=1))),
            peak_of(
                lambda base=base, tuned=tuned, out=folder / "out": surgery.extract_lora(
                    base, tuned, output=out, rank=64, dtype="bf16", kind="lora", workers=1, engine=Shares(1)
                )
            ),
        ]
    assert all(large < 1.5 * small for small, large in zip(peaks[1], peaks[6], strict=True)), peaks


def peak_of(call: Callable[[], object]) -> int:
    """Bytes of arrays that a call holds at most."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
